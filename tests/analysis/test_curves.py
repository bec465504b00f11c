"""Knees, safe sparsity, fronts and summary numbers: the worked examples, known error rates, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas import DataFrame

from sparsebench.analysis import curves, frontiers

LEVELS = np.arange(10) / 10
ACCURACY = [0.80, 0.80, 0.80, 0.79, 0.79, 0.78, 0.70, 0.55, 0.40, 0.30]
DENSE = [10.2, 10.0, 10.4, 10.1, 10.3, 10.0, 10.5, 10.2, 10.1, 10.3]
SPARSE = [6.8, 6.7, 7.0, 6.7, 6.9, 6.6, 7.1, 6.8, 6.9, 6.7]

qualities = st.lists(st.floats(-10, 10), min_size=5, max_size=12)


def test_the_four_knees_of_the_example() -> None:
    assert curves.tolerance_knee(LEVELS, ACCURACY) == 0.4
    broken = curves.breakpoint_knee(LEVELS, ACCURACY)
    assert (broken.at, broken.sse) == (0.5, pytest.approx(0.0016133, abs=1e-7))
    assert broken.slopes == pytest.approx((-0.040, -1.260)) and broken.sharpness == pytest.approx(31.5)
    hinge = curves.hinge_knee(LEVELS, ACCURACY)
    assert hinge.at == pytest.approx(0.532, abs=1e-9) and hinge.sse == pytest.approx(0.00080, abs=5e-6)
    assert hinge.slopes == pytest.approx((-0.0402, -1.3506), abs=5e-5) and hinge.accepted
    assert curves.chord_knee(LEVELS, ACCURACY) == 0.5


def test_perplexity_has_its_own_tolerance() -> None:
    """The log tolerance on an embedded-size model: 4.06 4.09 4.18 4.40 5.10 7.50 has its knee at .5."""
    levels, ppl = [0, 0.3, 0.5, 0.6, 0.7, 0.8], np.array([4.06, 4.09, 4.18, 4.40, 5.10, 7.50])
    assert curves.tolerance_knee(levels, -np.log(ppl), curves.LOG_TOLERANCE) == 0.5


def test_a_straight_line_has_no_knee() -> None:
    """About 1% of noisy lines of 10 points pass for one, every true knee is found."""
    random, false, errors = np.random.default_rng(0), 0, []
    for _ in range(100):
        false += curves.hinge_knee(LEVELS, 0.8 - 0.3 * LEVELS + 0.01 * random.standard_normal(10)).accepted
        bent = 0.8 - 0.05 * LEVELS - 1.2 * np.maximum(LEVELS - 0.53, 0) + 0.01 * random.standard_normal(10)
        found = curves.hinge_knee(LEVELS, bent)
        assert found.accepted
        errors.append(abs(found.at - 0.53))
    assert false <= 3 and np.quantile(errors, 0.95) < 0.025


def test_the_hinge_has_an_interval_over_samples() -> None:
    random = np.random.default_rng(1)
    chance = 0.8 - 1.2 * np.maximum(LEVELS - 0.5, 0)
    outcomes = random.random(400) < chance[:, None]
    low, high = curves.hinge_interval(LEVELS, outcomes, resamples=200)
    assert low < 0.5 < high and high - low < 0.15
    assert curves.hinge_interval(LEVELS, outcomes, resamples=200) == (low, high)


@given(qualities, st.floats(0, 1))
def test_the_tolerance_knee_never_passes_a_failure(values: list[float], tolerance: float) -> None:
    s = np.arange(len(values)) / len(values)
    knee = curves.tolerance_knee(s, values, tolerance)
    at = int(np.flatnonzero(s == knee)[0])
    assert all(value >= values[0] - tolerance - 1e-9 for value in values[: at + 1])
    assert at == len(values) - 1 or values[at + 1] < values[0] - tolerance


@settings(max_examples=30)
@given(qualities, st.floats(-5, 5), st.floats(-5, 5))
def test_a_tilt_moves_no_hinge(values: list[float], shift: float, tilt: float) -> None:
    s = np.arange(len(values)) / len(values)
    first, tilted = (curves.hinge_knee(s, y) for y in (values, np.array(values) + shift + tilt * s))
    assert tilted.sse == pytest.approx(first.sse, abs=1e-9 * (1 + sum(v * v for v in values)))


@pytest.mark.parametrize(
    ("sparsity", "quality"),
    [([], []), ([0, 0.5], [1]), ([0, 0.5, 0.5, 0.6], [1, 1, 1, 1]), ([0, 0.1, 0.2, 0.3], [1, math.nan, 1, 1])],
)
def test_knees_refuse_what_is_no_curve(sparsity: list[float], quality: list[float]) -> None:
    for knee in (curves.tolerance_knee, curves.breakpoint_knee, curves.hinge_knee, curves.chord_knee):
        with pytest.raises(ValueError, match=r"knee needs|must increase"):
            knee(sparsity, quality)


def record(method: str, sparsity: float | None, achieved: float, score: float, **more: object) -> dict[str, object]:
    return {"method": method, "model": "tiny_1m", "task": "perplexity", "sparsity": sparsity, "pattern": None,
            "achieved": achieved, "perplexity": score, "perplexity_n": 64, "status": "ok", "flagged": False,
            "flops_prefill": 1e6 * (1 - achieved), **more}  # fmt: skip


def test_curves_average_seeds_in_logs_and_leave_flagged_runs_out() -> None:
    rows = [
        record("dense", None, 0.0, 4.0), record("wanda", 0.5, 0.5, 4.0, seed=0), record("wanda", 0.5, 0.5, 9.0, seed=1),
        record("wanda", 0.3, 0.31, 99.0, seed=0, flagged=True), record("wanda", 0.3, 0.3, 4.1, seed=1),
        record("wanda", 0.7, 0.6, 50.0, flagged=True), record("wanda", 0.8, 0.8, math.nan, status="failed"),
    ]  # fmt: skip
    (curve,) = curves.curves(DataFrame(rows), "perplexity", "lower", log=True)
    assert [point.achieved for point in curve.points] == pytest.approx([0.0, 0.3, 0.5, 0.6])
    assert curve.points[2].score == pytest.approx(6.0) and curve.points[2].seeds == 2
    assert [point.hollow for point in curve.points] == [False, False, False, True]
    s, quality = curve.usable()
    assert s.tolist() == [0.0, 0.3, 0.5] and quality[0] == pytest.approx(-math.log(4))
    assert curve.points[2].costs == {"flops_prefill": pytest.approx(5e5)}


def test_bonett_price_is_the_formula() -> None:
    dense, sparse = np.array([1] * 80 + [0] * 20), np.array([1] * 74 + [0] * 6 + [1] * 2 + [0] * 18)
    p1, p2 = 7 / 102, 3 / 102
    expected = p1 - p2 + 1.645 * math.sqrt((p1 + p2 - (p1 - p2) ** 2) / 102)
    assert curves.bonett_price_upper(dense, sparse) == pytest.approx(expected, rel=1e-12)


def test_required_samples_and_too_few_of_them() -> None:
    assert curves.required_samples(0.02, 0.10) == 1544
    dense = np.array([1] * 80 + [0] * 20)
    sparse = dense.copy()
    sparse[[0, 85]] = 1 - sparse[[0, 85]]  # one lost, one won
    found = curves.non_inferior(dense, [(0.3, sparse)])
    assert found.level is None and found.says.startswith("n too small: about")


def test_non_inferior_stops_at_the_first_failure() -> None:
    dense = np.array([1] * 1600 + [0] * 400)
    worse = dense.copy()
    worse[:200] = 0
    found = curves.non_inferior(dense, [(0.9, dense), (0.3, dense), (0.5, worse)])
    assert (found.level, found.largest_passing) == (0.3, 0.9) and [step.passes for step in found.steps] == [
        True,
        False,
        True,
    ]
    assert curves.non_inferior(dense, [(0.5, worse)]).says == "no level (n = 2000)"


def test_non_inferior_of_real_outcomes_is_the_paired_test() -> None:
    random = np.random.default_rng(0)
    dense = random.normal(-2.3, 0.5, 200)
    near, far = dense - 0.005 + random.normal(0, 0.02, 200), dense - 0.1 + random.normal(0, 0.02, 200)
    found = curves.non_inferior(dense, [(0.3, near), (0.6, far)])
    assert found.level == 0.3 and found.steps[1].p is not None and found.steps[1].p > 0.99
    seeds = curves.non_inferior(np.stack([dense] * 3), [(0.3, np.stack([near, near + 0.001, near - 0.001]))])
    assert seeds.level == 0.3


def test_equal_shares_of_few_samples_rule_out_no_loss() -> None:
    """As for right and wrong: 32 answers that did not change say little of those that were not asked."""
    for dense in (np.ones(32), np.full(32, 0.75)):
        assert curves.non_inferior(dense, [(0.5, dense)]).level is None
    dense = np.full(1000, 0.75)
    assert curves.non_inferior(dense, [(0.5, dense)]).level == 0.5


def test_the_size_of_the_non_inferiority_test() -> None:
    """True loss equal to the margin .05, n = 100: about 5% pass."""
    random, passed = np.random.default_rng(0), 0
    for _ in range(1000):
        u = random.random(100)
        passed += curves.bonett_price_upper(u < 0.80, (u < 0.72) | (u > 0.97)) < 0.05
    assert 0.03 < passed / 1000 < 0.075


def test_not_worse_overlooks_losses_and_mcnemar_does_not() -> None:
    """Dense .80, a loss of 8 points, n = 100: Welch passes most, exact McNemar few."""
    random, passes = np.random.default_rng(0), {"welch": 0, "mcnemar": 0}
    for _ in range(200):
        u = random.random(100)
        dense, sparse = (u < 0.80).astype(float), (u < 0.72).astype(float)
        for test in passes:
            passes[test] += curves.not_worse(dense, [(0.5, sparse)], test=test).level == 0.5
    assert passes["welch"] > 130 and passes["mcnemar"] < 40
    constant = curves.not_worse(np.ones(50), [(0.3, np.ones(50)), (0.5, np.zeros(50))])
    assert constant.level == 0.3 and constant.says == "no loss detected up to 0.3 (n = 50)"


def test_over_tasks_names_the_worst() -> None:
    found = curves.over_tasks({"copy": 0.5, "count": 0.1, "recall": 0.6})
    assert found["minimum"] == 0.1 and found["task"] == "count" and found["mean"] == pytest.approx(0.4)


def test_the_front_of_the_example() -> None:
    cost, quality = [1.0, 1.0, 2.0, 2.0], [0.60, 0.66, 0.70, 0.55]
    assert frontiers.front(cost, quality).tolist() == [False, True, True, False]
    shares = frontiers.front_shares(cost, frontiers.normal_draws(quality, 0.02))
    assert shares == pytest.approx([0.019, 0.981, 0.92, 0.0], abs=0.01)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_what_is_not_on_the_front_is_dominated_by_it(points: list[tuple[int, int]]) -> None:
    cost, quality = np.array(points, dtype=float).T
    on = frontiers.front(cost, quality)
    assert on.any()
    for at in np.flatnonzero(~on):
        assert any(cost[i] <= cost[at] and quality[i] >= quality[at] for i in np.flatnonzero(on))


@given(
    st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=3, max_size=3)), min_size=1, max_size=9)
)
def test_shares_are_those_of_each_resample_alone(points: list[tuple[int, list[int]]]) -> None:
    cost = np.array([one for one, _ in points], dtype=float)
    draws = np.array([values for _, values in points], dtype=float).T
    alone = [frontiers.front(cost, draw) for draw in draws]
    assert frontiers.front_shares(cost, draws).tolist() == np.mean(alone, axis=0).tolist()
    for draw, found in zip(draws, alone, strict=True):
        for at, own in enumerate(zip(cost, draw, strict=True)):
            others = [(c, q) for c, q in zip(cost, draw, strict=True) if c <= own[0] and q >= own[1] and (c, q) != own]
            assert found[at] == (not others), "on the front is what nothing dominates"


def test_shared_samples_keep_their_pairing() -> None:
    """A point that is better by one sample in ten is better in almost every resample."""
    outcomes = np.zeros((2, 100))
    outcomes[0, :50], outcomes[1, :60] = 1, 1
    assert frontiers.front_shares([1, 1], frontiers.resampled(outcomes))[1] == 1.0


def test_sizes_change_places_where_their_lines_cross() -> None:
    small, large = ([1, 10, 100], [0.2, 0.5, 0.6]), ([5, 50, 500], [0.1, 0.5, 0.9])
    ((at, larger),) = frontiers.crossovers([small], [large])
    gap = frontiers.best_at([large], [at]) - frontiers.best_at([small], [at])
    assert gap == pytest.approx(0, abs=1e-9) and 50 < at < 100 and larger
    assert np.isnan(frontiers.best_at([small], 0.5)) and frontiers.best_at([small], 200) == 0.6
    assert frontiers.crossovers([([1, 2], [0, 1])], [([3, 4], [0, 1])]) == []
    noise = np.random.default_rng(0).normal(0, 0.01, (100, 3))
    draws = [([(small[0], small[1] + one)], [(large[0], large[1] - one)]) for one in noise]
    low, high, share = frontiers.crossover_interval(draws)
    assert low < at < high and share >= 0.9
    assert frontiers.crossover_interval(draws, larger=False)[2] == 0, "nowhere the smaller one takes over"


def test_sizes_do_not_change_places_where_a_curve_ends() -> None:
    """The large size's cheap method stops at a cost of 6, where its other one is still worse than the small size: it is
    still to be had for more."""
    small = [([1, 20], [0.5, 0.55])]
    cheap, dear = ([2, 6], [0.60, 0.70]), ([5, 30], [0.40, 0.90])
    assert [one.larger for one in frontiers.crossovers(small, [cheap])] == []
    assert frontiers.crossovers(small, [cheap, dear]) == []
    assert frontiers.best_at([cheap, dear], [1, 6, 8, 30]) == pytest.approx([np.nan, 0.70, 0.70, 0.90], nan_ok=True)
    falls = ([1, 3, 10], [0.6, 0.8, 0.7])  # a dense model that is worse than its sparse one
    assert frontiers.best_at([falls], [2, 3, 5, 10, 20]) == pytest.approx([0.7262, 0.8, 0.8, 0.8, 0.8], abs=1e-4)


def test_the_smaller_size_is_still_to_be_had_beyond_its_dense_cost() -> None:
    """The large size passes what the small one reaches densely, at a cost of 100, between its points at 90 and 120."""
    small, large = ([60, 80, 100], [0.2, 0.4, 0.5]), ([90, 120, 200], [0.3, 0.7, 0.9])
    ((at, larger),) = frontiers.crossovers([small], [large])
    assert at == pytest.approx((90 * 120) ** 0.5) and larger
    ((at, larger),) = frontiers.crossovers([large], [small])
    assert at == pytest.approx((90 * 120) ** 0.5) and not larger, "whichever of the two ends first"
    ((at, _),) = frontiers.crossovers([([1, 2], [0.2, 0.5])], [([3, 12], [0.3, 0.7])])
    assert at == pytest.approx(6), "apart from one another"
    assert frontiers.crossovers([small], [([90, 200], [0.1, 0.4])]) == []
    low, high, share = frontiers.crossover_interval([([small], [large])] * 3)
    assert (low, high, share) == pytest.approx((10800**0.5, 10800**0.5, 1))


@given(costs=st.lists(st.floats(1, 1e6), min_size=1, max_size=6, unique=True), data=st.data())
def test_the_best_for_no_more_never_falls(costs: list[float], data: st.DataObject) -> None:
    qualities = data.draw(st.lists(st.floats(0, 1), min_size=len(costs), max_size=len(costs)))
    found = frontiers.best_at([(costs, qualities)], np.geomspace(1, 1e6, 50))
    known = found[np.isfinite(found)]
    assert (np.diff(known) >= 0).all() and (known <= max(qualities)).all()
    assert frontiers.best_at([(costs, qualities)], max(costs)) == max(qualities)


def test_retention_area_of_the_example() -> None:
    whole = frontiers.common_interval([LEVELS, LEVELS])
    assert frontiers.retention_area(LEVELS, ACCURACY, 0.8, whole) == pytest.approx(0.8556, abs=5e-5)
    corrected = frontiers.retention_area(LEVELS, ACCURACY, 0.8, whole, chance=0.25)
    assert corrected == pytest.approx(0.7899, abs=5e-5)
    part = frontiers.common_interval([LEVELS, [0.05, 0.35]])
    assert part == (0.05, 0.35) and frontiers.retention_area(LEVELS, ACCURACY, 0.8, part) > 0.99
    with pytest.raises(ValueError, match="not covered"):
        frontiers.retention_area([0.2, 0.4], [1, 1], 1.0, whole)


def test_speed_up_of_the_example() -> None:
    found = frontiers.speed_up(DENSE, SPARSE, theoretical=2.0)
    assert (found.ratio, found.low, found.high) == pytest.approx((1.497, 1.483, 1.512), abs=5e-4)
    assert frontiers.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    for dense, sparse in ((DENSE[:9], SPARSE[:9]), (DENSE, [0.0, *SPARSE[1:]]), (DENSE, SPARSE[:9])):
        with pytest.raises(ValueError, match=r"blocks|positive"):
            frontiers.speed_up(dense, sparse)


def test_ranks_share_ties() -> None:
    found = frontiers.mean_ranks({"a": [3, 3, 1], "b": [2, 3, 2], "c": [1, 1, 3]})
    assert found["a"][0] == pytest.approx((1 + 1.5 + 3) / 3) and found["b"][0] == pytest.approx((2 + 1.5 + 2) / 3)
    assert found["c"][1] <= found["c"][0] <= found["c"][2]


def test_collapse() -> None:
    levels = [0, 0.25, 0.5, 0.75]
    assert curves.collapse(levels, [0.8, 0.7, 0.4, 0.1]) == 0.75, "half is not below half"
    assert curves.collapse(levels, [0.8, 0.3, 0.5, 0.1]) == 0.25
    assert curves.collapse(levels, [0.8, 0.7, 0.6, 0.5]) is None
    with pytest.raises(ValueError, match="increasing"):
        curves.collapse([0.5, 0], [1, 1])
