"""The two-way jackknife, the bootstrap and Holm: the worked examples, and that they say no when nothing is there."""

from __future__ import annotations

from math import exp, inf, isnan

import numpy
import pytest
from claim_examples import correct_a, correct_b, correct_sparse, equivalent, nll_of_magnitude, nll_of_wanda
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebench.analysis.statistics import (
    ALPHA,
    Array,
    Estimate,
    Population,
    Weights,
    bootstrap,
    difference,
    holm,
    jackknife,
    mean,
    swap_rate,
)

EXACT = pytest.approx
PRECISION = 1e-6  # relative, of the worked examples


def test_example_one_seed() -> None:
    found = difference(nll_of_magnitude(), nll_of_wanda())
    assert found.theta == EXACT(0.23, rel=PRECISION)
    assert found.se == EXACT(0.00204415, rel=3e-6)  # printed with six digits
    assert (found.df, found.seeds, found.samples, found.v_seed) == (39, 1, 40, 0)
    assert found.interval() == EXACT((0.2258653, 0.2341347), rel=PRECISION)
    assert found.p_at_most() == EXACT(6.4e-51, rel=0.01)
    assert exp(nll_of_magnitude().mean()) == EXACT(10.381, abs=5e-4)
    assert exp(nll_of_wanda().mean()) == EXACT(8.248, abs=5e-4)


def test_example_three_seeds() -> None:
    assert correct_a().mean(axis=1) == EXACT([0.7, 0.7, 0.7])
    assert correct_b().mean(axis=1) == EXACT([0.7, 0.68333333, 0.66666667])
    found = difference(correct_a(), correct_b())
    assert found.theta == EXACT(0.0166667, rel=3e-6)
    assert (found.v_seed, found.v_item) == EXACT((9.259259e-5, 2.777778e-4), rel=PRECISION)
    assert found.se == EXACT(0.01924501, rel=PRECISION)
    assert found.df == EXACT(24.519, abs=5e-4)
    assert found.interval() == EXACT((-0.0230086, 0.0563419), rel=3e-6)
    assert found.p_at_most() == EXACT(0.197436, rel=3e-6)


def test_example_of_a_loss() -> None:
    assert correct_sparse().mean(axis=1) == EXACT([0.5, 0.55, 0.5])
    found = difference(correct_sparse() + 0.01, correct_a())
    assert found.theta == EXACT(-0.1733333, rel=PRECISION)
    assert found.se == EXACT(0.04541087, rel=PRECISION)
    assert found.df == EXACT(45.950, abs=5e-4)
    assert found.interval() == EXACT((-0.2647434, -0.0819233), rel=PRECISION)
    assert found.p_at_least() == EXACT(2.0116e-4, rel=3e-5)


def test_example_holm() -> None:
    three = [
        difference(nll_of_magnitude(), nll_of_wanda()),
        difference(correct_a(), correct_b()),
        difference(correct_sparse() + 0.01, correct_a()),
    ]
    assert holm([one.p_at_most() for one in three]) == [
        EXACT(1.9e-50, rel=0.02), EXACT(0.39487, rel=1e-5), EXACT(0.99980, rel=1e-5),
    ]  # fmt: skip
    assert holm([one.p_at_least() for one in three]) == [1, 1, EXACT(6.03e-4, rel=1e-3)]


def test_example_equivalence() -> None:
    a, b = equivalent()
    found = difference(b, a)
    assert found.theta == EXACT(0.002)
    assert found.se == EXACT(8.08122e-4, rel=PRECISION)
    assert found.interval() == EXACT((0.000376, 0.003624), abs=5e-7)


def test_holm() -> None:
    assert holm([]) == []
    assert holm([0.03]) == [0.03]
    assert holm([0.04, 0.01, 0.03]) == EXACT([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(ps: list[float]) -> None:
    adjusted = holm(ps)
    assert all(p <= q <= 1 for p, q in zip(ps, adjusted, strict=True))
    assert all(adjusted[i] <= adjusted[j] for i, p in enumerate(ps) for j, q in enumerate(ps) if p < q)


def test_the_jackknife_of_a_mean_is_the_usual_standard_error() -> None:
    values = numpy.random.default_rng(0).normal(size=(1, 57))
    found = difference(values, numpy.zeros_like(values))
    assert found.se == EXACT(values.std(ddof=1) / 57**0.5)


def test_clusters_and_groups() -> None:
    repeated = numpy.repeat(numpy.random.default_rng(1).normal(size=20), 5)
    zero = numpy.zeros_like(repeated)
    single = difference(repeated, zero)
    clustered = difference(repeated, zero, clusters=list(numpy.repeat(numpy.arange(20), 5)))
    assert clustered.df == EXACT(19) and clustered.se == EXACT(repeated[::5].std(ddof=1) / 20**0.5)
    assert clustered.se > 2 * single.se  # five copies of a sample are one sample
    many = numpy.random.default_rng(2).normal(size=450)
    grouped = difference(many, numpy.zeros_like(many))
    assert grouped.df == 99 and grouped.se == EXACT(many.std(ddof=1) / 450**0.5, rel=0.3)


def test_units() -> None:
    left, right = correct_a(), correct_b()
    both, items, seeds = (difference(left, right, unit=unit) for unit in ("samples+seeds", "samples", "seeds"))
    assert items.v_seed == 0 and items.v_item == both.v_item and items.df == EXACT(59)
    assert seeds.v_item == 0 and seeds.v_seed == both.v_seed and seeds.df == EXACT(2)


def test_one_row_serves_every_seed() -> None:
    found = difference(correct_a(), correct_a()[:1])
    assert found.seeds == 3 and found.theta == EXACT(0.0)


@pytest.mark.parametrize(("gap", "strict", "p_for", "p_against"), [
    (0.23, True, 0.0, 1.0), (-0.23, True, 1.0, 0.0), (0.0, True, 1.0, 1.0), (0.0, False, 0.0, 1.0),
])  # fmt: skip
def test_no_spread_is_decided_by_its_sign(gap: float, strict: bool, p_for: float, p_against: float) -> None:
    found = difference(2.0 + gap + numpy.arange(40) % 3, 2.0 + numpy.arange(40) % 3)
    assert found.se == 0 and found.interval() == (found.theta, found.theta)
    assert (found.p_at_most(strict=strict), found.p_at_least()) == (p_for, p_against)


def test_no_spread_in_few_samples_says_nothing() -> None:
    found = difference(numpy.full(20, 3.0), numpy.full(20, 2.0))
    assert found.interval() == (-inf, inf) and found.p_at_most() == found.p_at_least() == 1.0


def test_the_rule_of_three() -> None:
    right = numpy.ones((1, 100))
    found = difference(right, right)
    assert found.bounded and found.interval() == EXACT((-0.03, 0.03))
    assert found.p_at_most() == EXACT(0.5, abs=0.01) and found.p_at_most(-0.05) < ALPHA < found.p_at_most(-0.02)
    assert found.p_at_most(-0.03) == EXACT(ALPHA)
    assert found.mde == EXACT(0.03)


def test_shares_without_a_spread_are_as_little_sure_as_right_and_wrong() -> None:
    """Every answer was three quarters right; one more might be wrong."""
    shares = numpy.full((1, 100), 0.75)
    found = difference(shares, shares)
    assert found.bounded and found.interval() == EXACT((-0.03, 0.03))
    assert not difference(shares + 1, shares + 1).bounded


def test_the_minimum_detectable_effect() -> None:
    found = difference(correct_a(), correct_b())
    assert found.mde == EXACT((2.0615932 + 0.84) * found.se, rel=1e-5)  # t of 24.519 degrees of freedom
    spread = numpy.random.default_rng(4).normal(0.1, 1, size=100)
    one = difference(spread, numpy.zeros(100))
    needed = one.samples_needed(one.mde / 2)
    assert needed == EXACT(400, abs=1) and one.samples_needed(one.mde) == EXACT(100, abs=1)


def test_no_number_of_samples_decides_against_the_spread_of_seeds() -> None:
    assert Estimate(0.1, v_seed=0.04, v_item=0.0001, df=2, samples=100, seeds=3).samples_needed() is None
    assert difference(correct_a(), correct_a()).samples_needed() is None


def test_strata_are_a_macro_average() -> None:
    population = Population(numpy.array([0, 0, 0, 1]), numpy.arange(4))
    values = numpy.array([[1.0, 2.0, 3.0, 10.0]])
    assert mean(values, population, numpy.ones((1, 1)), numpy.ones((1, 4))) == EXACT([6.0])
    weights = numpy.array([[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    found = mean(values, population, numpy.ones((1, 1)), weights)
    assert found[0] == EXACT(6.25) and isnan(found[1])


def ratio(left: Array, right: Array, population: Population):  # type: ignore[no-untyped-def]
    def effect(weights: Weights) -> Array:
        top, bottom = (mean(side, population, weights.seeds, weights.items[0]) for side in (left, right))
        return numpy.asarray(top / bottom)

    return effect


def test_the_bootstrap_agrees_with_the_jackknife_on_what_is_smooth() -> None:
    generator = numpy.random.default_rng(5)
    base = generator.normal(3, 0.5, size=(1, 80))
    left, right = base + generator.normal(0.1, 0.2, size=(1, 80)), base
    population = Population.plain(80)
    effect = ratio(left, right, population)
    exact, drawn = jackknife(effect, 1, [population]), bootstrap(effect, 1, [population], resamples=4000)
    assert drawn.failed == 0 and drawn.interval() == EXACT(exact.interval(), abs=0.15 * exact.se)
    again = bootstrap(effect, 1, [population], resamples=4000)
    assert (again.thetas == drawn.thetas).all()
    other = bootstrap(effect, 1, [population], resamples=400, seed=1)
    assert len(other.thetas) == 400 and not (other.thetas == drawn.thetas[:400]).all()


def test_the_bootstrap_draws_clusters_and_seeds() -> None:
    values = numpy.repeat([[0.0, 1.0]], 10, axis=1)  # two clusters of ten
    population = Population.plain(20, [0] * 10 + [1] * 10)
    effect = ratio(values, numpy.ones_like(values), population)
    assert set(bootstrap(effect, 1, [population], resamples=200).thetas) <= {0.0, 0.5, 1.0}
    seeds = numpy.array([[0.0] * 5, [1.0] * 5])
    effect = ratio(seeds, numpy.ones_like(seeds), Population.plain(5))
    assert set(bootstrap(effect, 2, [Population.plain(5)], resamples=100).thetas) == {0.0, 0.5, 1.0}
    assert set(bootstrap(effect, 2, [Population.plain(5)], unit="samples", resamples=100).thetas) == {0.5}


def test_failed_resamples_are_counted() -> None:
    values = numpy.array([[0.0, 0.0, 1.0]])
    population = Population.plain(3)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        drawn = bootstrap(ratio(numpy.ones_like(values), values, population), 1, [population], resamples=900)
    assert len(drawn.thetas) + drawn.failed == 900
    assert drawn.failed / 900 == EXACT((2 / 3) ** 3, abs=0.05)  # the only sample that is not 0 was not drawn


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(-3, 3), st.floats(0.5, 4))
def test_shift_and_scale(seed: int, seeds: int, shift: float, scale: float) -> None:
    left, right = numpy.random.default_rng(seed).normal(size=(2, seeds, 33))
    plain, moved = difference(left, right), difference(scale * left + shift, scale * right)
    assert moved.theta == EXACT(scale * plain.theta + shift, abs=1e-9)
    assert moved.se == EXACT(scale * plain.se, rel=1e-6) and moved.df == EXACT(plain.df, rel=1e-6)
    assert difference(right, left).p_at_most() == EXACT(plain.p_at_least(), abs=1e-12)


@pytest.mark.parametrize("seeds", [1, 3])
def test_swapped_labels_are_seldom_found_different(seeds: int) -> None:
    """The A/A guard: nothing is there to find, and at most 5% of 200 permutations find it."""
    generator = numpy.random.default_rng(seeds)
    base = generator.normal(2.5, 1, size=(1, 100))
    left = base + generator.normal(0, 0.5, size=(seeds, 100))
    right = base + generator.normal(0, 0.5, size=(seeds, 100)) + 0.4
    assert difference(right, left).p_at_most() < ALPHA  # what the labels would say
    assert swap_rate(left, right) <= 0.05


def test_one_method_under_two_sets_of_seeds_is_seldom_found_different() -> None:
    """No effect, and a spread between seeds that a test over samples alone takes for one."""
    generator = numpy.random.default_rng(7)
    both = alone = 0
    for _ in range(200):
        side = [generator.normal(0, 0.3, (3, 1)) + generator.normal(0, 0.5, (3, 100)) for _ in range(2)]
        both += difference(*side).p_at_most() < ALPHA
        alone += difference(*side, unit="samples").p_at_most() < ALPHA
    assert both <= 10  # 5% of 200
    assert alone > 20
