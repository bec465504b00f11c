"""Scaling laws against data whose laws are known: recovery, robustness, intervals, flags, comparison."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from analysis.law_data import TRUTH, accuracies, decreasing, decreasing_truth, grid, increasing, loss, pruned, ray
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas import DataFrame
from scipy.optimize import least_squares

from sparsebench.analysis.laws import checks
from sparsebench.analysis.laws.base import Law, Parameter
from sparsebench.analysis.laws.base import grid as start_grid
from sparsebench.analysis.laws.bootstrap import predict, resample
from sparsebench.analysis.laws.chinchilla import CHINCHILLA, CHINCHILLA_AVG, allocation
from sparsebench.analysis.laws.compare import aicc
from sparsebench.analysis.laws.estimate import fit
from sparsebench.analysis.laws.frontier import FRONTIER
from sparsebench.analysis.laws.power import POWER
from sparsebench.analysis.laws.registry import BUILT_IN
from sparsebench.analysis.laws.result import Settings, analyse, compared
from sparsebench.analysis.laws.sparsing import DECREASING, INCREASING
from sparsebench.errors import UserError

QUICK = Settings(bootstrap=0, keep=2)


def test_noise_free_losses_give_the_law_back() -> None:
    found = fit(grid(0), CHINCHILLA, keep=4)
    assert found.params == pytest.approx(TRUTH, rel=1e-6)
    assert found.at_best == len(found.starts) == 4


@pytest.mark.parametrize(("sigma", "e", "alpha", "beta"), [(0.001, 0.03, 0.02, 0.005), (0.003, 0.12, 0.07, 0.02)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noisy_losses_give_the_law_back(sigma: float, e: float, alpha: float, beta: float, seed: int) -> None:
    found = fit(grid(sigma, seed), CHINCHILLA, keep=2).params
    assert abs(found["E"] - 1.2) < e and abs(found["alpha"] - 0.30) < alpha and abs(found["beta"] - 0.35) < beta


def test_the_printed_fit() -> None:
    found = fit(grid(0.003), CHINCHILLA)
    printed = {"A": 20.477, "B": 155.63, "E": 1.20507, "alpha": 0.302142, "beta": 0.352907}
    assert found.params == pytest.approx(printed, rel=1e-3)
    assert found.objective == pytest.approx(4.35091e-5, rel=1e-5)


def test_one_per_cent_noise_leaves_the_floor_open() -> None:
    points = grid(0.01)
    found = fit(points, CHINCHILLA, keep=2)
    draws = resample(found, 20)
    low, high = draws.interval("E")
    assert abs(found.params["beta"] - 0.35) < 0.05 and high - low > 0.1


def test_huber_is_robust_and_least_squares_is_not() -> None:
    points = grid(0.003)
    points.loc[[24, 20], "value"] *= 1.15
    huber, ols = (fit(points, CHINCHILLA, loss=one, keep=3).params for one in ("huber", "ols"))
    assert huber == pytest.approx({**huber, "E": 1.2040, "alpha": 0.29999, "beta": 0.35407}, rel=1e-4)
    assert ols == pytest.approx({**ols, "E": 1.359, "beta": 0.445, "B": 537}, rel=1e-3)
    assert abs(huber["beta"] - 0.35) < 0.01 < abs(ols["beta"] - 0.35)


def test_least_absolute_deviations_are_another_fit() -> None:
    points = grid(0.003)
    lad = fit(points, CHINCHILLA, loss="lad", keep=1)
    huber = fit(points, CHINCHILLA, keep=1)
    assert lad.objective == pytest.approx(np.abs(lad.residuals).sum(), rel=1e-6)
    assert lad.objective < np.abs(huber.residuals).sum()


def test_the_objective_is_the_sum_of_huber_losses() -> None:
    """scipy's cost with residuals r/delta and a scale of 1 is that sum over delta^2."""
    found = fit(grid(0.003), CHINCHILLA, keep=1)
    problem, r = found.problem, np.abs(found.residuals)
    huber = np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 1e-3 / 2)).sum()
    scipy = least_squares(problem.residuals, found.theta, loss="huber", f_scale=1.0, max_nfev=1)
    assert found.objective == pytest.approx(huber, rel=1e-12)
    assert scipy.cost * 1e-6 == pytest.approx(huber, rel=1e-12)


@pytest.mark.parametrize("law", BUILT_IN.values(), ids=lambda law: law.name)
def test_slopes_are_the_derivatives_of_the_curve(law: Law) -> None:
    points = {
        "frontier": accuracies(), "power": grid(0).rename(columns={"N": "x"}),
        "chinchilla_avg": grid(0).rename(columns={"N": "N_avg"}),
        "increasing_convergent": increasing(0), "decreasing_logspace": decreasing(2.0 ** np.arange(10), 0),
    }.get(law.name, grid(0))  # fmt: skip
    problem = fit(points, law, keep=1).problem
    middle = np.array([0.3 if parameter.positive else 0.2 for parameter in problem.law.parameters.values()])
    by_hand = replace(problem, law=replace(problem.law, slopes=None)).slopes(middle)
    assert problem.slopes(middle) == pytest.approx(by_hand, rel=1e-6, abs=1e-8)


@given(st.floats(-30, 30), st.floats(-30, 30))
def test_rescaled_constants_draw_the_same_curve(shift_n: float, shift_d: float) -> None:
    p = TRUTH
    moved = CHINCHILLA.moved(p, {"N": shift_n, "D": shift_d})
    x = {"N": np.array([1e5, 3e6]), "D": np.array([1e6, 1e9])}
    scaled = {"N": x["N"] * math.exp(shift_n), "D": x["D"] * math.exp(shift_d)}
    assert CHINCHILLA.curve(moved, scaled) == pytest.approx(CHINCHILLA.curve(p, x), rel=1e-9)


@settings(max_examples=6, deadline=None)
@given(st.sampled_from([1e-6, 1e-3, 1.0, 1e6, 1e9]), st.sampled_from([1e-9, 1.0, 1e6]))
def test_units_do_not_matter(unit_n: float, unit_d: float) -> None:
    points = grid(0.003).assign(N=lambda t: t["N"] * unit_n, D=lambda t: t["D"] * unit_d)
    found = fit(points, CHINCHILLA, keep=1)
    assert found.objective == pytest.approx(4.35091e-5, rel=1e-4)
    assert found.params["alpha"] == pytest.approx(0.302142, rel=1e-3)


def test_a_ray_and_two_sizes_are_not_identifiable() -> None:
    on_ray = analyse(ray(), CHINCHILLA, Settings(bootstrap=0, keep=1, drop_highest=0))
    assert not on_ray.identifiable
    assert any("one line" in doubt for doubt in on_ray.doubts) and any("collinear" in doubt for doubt in on_ray.doubts)
    two = analyse(grid(0.003)[lambda t: t["N"] <= 2e5], CHINCHILLA, QUICK)
    assert not two.identifiable and any("N: 2 distinct values" in doubt for doubt in two.doubts)


def test_the_full_grid_is_identifiable() -> None:
    result = analyse(grid(0.003), CHINCHILLA, Settings(bootstrap=30, keep=3, drop_highest=0))
    assert result.identifiable and not result.warnings
    assert result.condition == pytest.approx(52, rel=0.02)
    low, high = result.bootstrap.interval("alpha")
    assert low < 0.30 < high and high - low == pytest.approx(0.06, abs=0.035)


def test_a_wrong_law_is_called_misspecified() -> None:
    x = np.geomspace(1, 1e4, 30)
    points = DataFrame({"x": x, "value": 1 + np.log(x) ** 2})  # rises: no E + A/x^alpha does
    result = analyse(points, POWER, QUICK)
    assert any(warning.startswith("misspecified: the residuals trend with x") for warning in result.warnings)


def test_a_floor_of_zero_is_seen_and_fitted_beside() -> None:
    x = np.geomspace(1, 1e4, 15)
    noisy = 3 * x**-0.5 * np.exp(0.01 * np.random.default_rng(0).standard_normal(15))
    result = analyse(DataFrame({"x": x, "value": noisy}), POWER, Settings(bootstrap=20, keep=1, drop_highest=0))
    assert not result.identifiable and any("contains 0" in doubt for doubt in result.doubts)
    assert result.extra["with_E_0"]["parameters"]["alpha"] == pytest.approx(0.5, abs=0.01)
    json.dumps(result.to_json(), allow_nan=False)


def test_few_rows_or_groups_give_no_interval() -> None:
    eleven = fit(grid(0.003).iloc[:11], CHINCHILLA, keep=1)
    assert resample(eleven, 10).reason == "11 rows, fewer than 12"
    grouped = fit(grid(0.003).assign(group=lambda t: (t["N"] > 4e5).astype(str)), CHINCHILLA, keep=1)
    draws = resample(grouped, 10)
    assert draws.reason == "2 groups of rows, fewer than 4" and draws.interval("E") is None


def test_resampling_is_seeded_and_keeps_groups_together() -> None:
    points = grid(0.003).assign(group=lambda t: t["N"])
    found = fit(points, CHINCHILLA, keep=1)
    first, again, other = resample(found, 5, seed=3), resample(found, 5, seed=3), resample(found, 5, seed=4)
    assert np.array_equal(first.matrix, again.matrix) and not np.array_equal(first.matrix, other.matrix)
    assert len(np.unique(found.groups)) == 6


def test_the_average_parameter_count_explains_pruned_runs() -> None:
    points, results = pruned(), {}
    for column in ("N_avg", "geometric", "N_final", "N_initial"):
        own = DataFrame({"N_avg": points[column], "D": points["D"], "value": points["value"]})
        first = {"N_initial": points["N_initial"].to_numpy()}
        quick = Settings(bootstrap=0, drop_highest=2, keep=2)
        results[column] = analyse(own, CHINCHILLA_AVG, quick, name=column, drop_by=first)
    printed = {"N_avg": (0.0022, 0.0026), "geometric": (0.0030, 0.0050), "N_final": (0.0116, 0.0129),
               "N_initial": (0.0167, 0.0139)}  # fmt: skip
    for column, (within, beyond) in printed.items():
        left = results[column].left_out[0]
        assert (left.lowest, left.n) == (1.6e6, 30)
        assert results[column].quality["error"] == pytest.approx(within, rel=0.1)
        assert left.error == pytest.approx(beyond, rel=0.1)
    found = results["N_avg"].fit.params
    assert (found["E"], found["alpha"], found["beta"]) == pytest.approx((1.19, 0.286, 0.354), abs=0.005)
    table = compared(list(results.values()))
    assert table["by_aicc"] == list(printed) and table["by_extrapolation"][0] == "N_avg"


@pytest.mark.parametrize("seed", range(3))
def test_the_sparsing_laws_come_back(seed: int) -> None:
    silu = fit(increasing(seed), INCREASING, keep=3).params
    assert abs(silu["A0"] - 0.40) < 0.006 and abs(silu["alpha"] - 0.35) < 0.035
    few = fit(decreasing(2.0 ** np.arange(10), seed), DECREASING, keep=3).params
    assert abs(few["A0"] - 0.065) < 0.012 and abs(few["alpha"] - 0.30) < 0.05
    many = fit(decreasing(2.0 ** np.arange(0, 9.76, 0.25), seed), DECREASING, keep=3)
    assert abs(many.params["A0"] - 0.065) < 0.004 and abs(many.params["alpha"] - 0.30) < 0.02
    at = np.array([4096.0])
    assert abs(many.linked({"D": at})[0] - decreasing_truth(at)[0]) < 0.003


def test_the_sparsing_law_is_found_in_tokens_too() -> None:
    d = 2.0 ** np.arange(10)
    found = fit(DataFrame({"D": d * 1e9, "value": decreasing_truth(d)}), DECREASING)
    assert found.params["A0"] == pytest.approx(0.065, abs=1e-6) and found.params["alpha"] == pytest.approx(
        0.3, abs=1e-5
    )


def test_the_frontier_law_comes_back_from_exact_accuracies() -> None:
    for lossname in ("ols", "binomial"):
        found = fit(accuracies(), FRONTIER, loss=lossname).params
        expected = {"eps": -8, "alpha": 0.9, "beta": -0.5, "gamma": -0.8, "delta_squad": 0.5, "delta_cwe": -0.4,
                    "delta_tracking": -1.5, "delta_toefl": 1.0}  # fmt: skip
        assert found == pytest.approx(expected, abs=2e-9)


def test_the_binomial_likelihood_is_unbiased_and_the_clipped_recipe_is_not() -> None:
    slopes, truth = ("alpha", "beta", "gamma"), np.array([0.9, -0.5, -0.8])
    errors: dict[str, list[np.ndarray]] = {"binomial": [], "tiny clip": [], "clip .5/n": []}
    for seed in range(12):
        points = accuracies(seed)
        ways = {"binomial": {}, "tiny clip": {"loss": "ols"}, "clip .5/n": {"loss": "ols", "clip": 0.005}}
        for name, how in ways.items():
            found = fit(points, FRONTIER, **how).params
            errors[name].append(np.array([found[slope] for slope in slopes]) - truth)
    assert np.all(np.abs(errors["binomial"]).max(axis=0) < [0.032, 0.041, 0.027])
    bias = {name: np.mean(rows, axis=0) for name, rows in errors.items()}
    assert np.all(np.abs(bias["binomial"]) < 0.01)
    assert bias["tiny clip"] == pytest.approx([0.06, -0.04, -0.05], abs=0.02)
    assert np.all(np.abs(bias["clip .5/n"]) < 0.6 * np.abs(bias["tiny clip"]))


def test_saturated_tasks_do_not_break_the_frontier_law() -> None:
    points = accuracies(0)
    points.loc[points["task"] == "toefl", "value"] = 1.0
    result = analyse(points, FRONTIER, QUICK)
    assert result.fit.params["delta_toefl"] > 10 and result.fit.params["alpha"] == pytest.approx(0.9, abs=0.1)
    json.dumps(result.to_json(), allow_nan=False)


def test_cells_of_the_frontier_law_are_resampled_whole() -> None:
    found = fit(accuracies(0), FRONTIER)
    assert len(np.unique(found.groups)) == 5 * 4 * 4


def test_the_hull_is_a_hull_and_not_a_box_and_holds_its_corners() -> None:
    points = grid(0.003)
    triangle = np.log2(points["N"] / points["N"].min()) / 5 + np.log2(points["D"] / points["D"].min()) / 8 <= 1.001
    found = fit(points[triangle], CHINCHILLA, keep=1)
    (small, *_, large), (few, *_, many) = (np.sort(points[name].unique()) for name in ("N", "D"))
    where = DataFrame({"N": [small, small, large, large, large * 1.01], "D": [few, many, few, many, few]})
    assert predict(found, where)["outside"].tolist() == [False, False, False, True, True]


def test_predictions_have_bands_and_know_the_hull() -> None:
    found = fit(grid(0.003), CHINCHILLA, keep=1)
    draws = resample(found, 20)
    where = DataFrame({"N": [4e5, 1.28e7], "D": [1.6e7, 1.6e7]})
    mean, new = predict(found, where, draws, "mean"), predict(found, where, draws, "new")
    assert mean["outside"].tolist() == [False, True]
    assert np.all(new["high"] - new["low"] > mean["high"] - mean["low"])
    assert np.all((mean["low"] < mean["value"]) & (mean["value"] < mean["high"]))
    with pytest.raises(ValueError, match="needs a bootstrap"):
        predict(found, where, None, "mean")


def test_exported_constants_predict_what_the_fit_does() -> None:
    result = analyse(grid(0.003), CHINCHILLA, QUICK)
    stored = json.loads(json.dumps(result.to_json()))["parameters"]
    points = grid(0)
    x = {"N": points["N"].to_numpy(), "D": points["D"].to_numpy()}
    assert np.exp(CHINCHILLA.curve(stored, x)) == pytest.approx(result.fit.fitted(), rel=1e-12)


def test_json_begins_with_the_promised_keys() -> None:
    found = analyse(grid(0.003), CHINCHILLA, QUICK).to_json()
    promised = ["law", "n", "parameters", "ci", "objective", "identifiable", "warnings"]
    assert list(found)[:7] == promised and found["ci"]["alpha"] == [None, None]
    assert found["extrapolation"]["N"]["lowest"] == 3.2e6 and found["extrapolation"]["D"]["n"] == 6


def test_compute_optimal_allocation_minimises_the_loss() -> None:
    budget = np.array([1e15])
    a, n, d = allocation(TRUTH, budget)
    assert a == pytest.approx(0.35 / 0.65) and 6 * n * d == pytest.approx(budget)
    for factor in (0.9, 1.1):
        assert loss(n * factor, d / factor) > loss(n, d)


def test_aicc_is_the_formula() -> None:
    r, n, k = np.array([0.1, -0.2, 0.3, -0.1, 0.05, 0.2, -0.3, 0.1]), 8, 3
    b = np.abs(r).mean()
    expected = 2 * k + 2 * n * math.log(2 * b) + 2 * n + 2 * k * (k + 1) / (n - k - 1)
    assert aicc(r, 2)[0] == pytest.approx(expected)
    assert aicc(r[:4], 2) == (None, None)


def test_laws_with_other_residuals_are_not_ranked_by_aicc() -> None:
    points = increasing(0)
    power = analyse(points.rename(columns={"D": "x"}), POWER, QUICK, drop_by={"D": points["D"].to_numpy()})
    table = compared([analyse(points, INCREASING, QUICK), power])
    assert table["by_aicc"] == "inconclusive" and "one space" in table["note"]
    assert table["by_extrapolation"][0] == "increasing_convergent"


def test_a_law_without_slopes_or_rescaling_fits_too() -> None:
    own = Law(
        name="line", formula="y = E + c/x", variables={"x": "anything"},
        parameters={"E": Parameter(), "c": Parameter()}, link="log",
        curve=lambda p, x: np.log(p["E"] + p["c"] / x["x"]), starts=start_grid(E=(0.1, 1.0), c=(0.1, 1.0)),
    )  # fmt: skip
    x = np.arange(1.0, 9.0)
    assert fit(DataFrame({"x": x, "value": 2 + 3 / x}), own).params == pytest.approx({"E": 2, "c": 3}, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["N", "D", "value"]),
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.0]),
    st.integers(0, 29),
)
def test_bad_cells_are_named(column: str, bad: float, row: int) -> None:
    points = grid(0.003)
    points.loc[row, column] = bad
    with pytest.raises(UserError, match=f"^{column}: row {row + 1} is .*must be a number > 0"):
        fit(points, CHINCHILLA)


def test_other_mistakes_are_said_in_one_line() -> None:
    points = grid(0.003)
    for arguments, words in (
        ((points.iloc[:5], CHINCHILLA), "5 rows are too few for its 5 parameters"),
        ((points.drop(columns="D"), CHINCHILLA), "D: law=chinchilla needs this column"),
        ((points.assign(D=lambda t: t["D"], value=1.5), INCREASING), "must be a number >= 0 and <= 1"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            fit(*arguments)
        assert "\n" not in str(caught.value)
    for options in (
        {"loss": "binomial"},
        {"delta": 0.0},
        {"delta": math.nan},
        {"clip": 0.5},
        {"weights": np.zeros(30)},
    ):
        with pytest.raises(UserError):
            fit(points, CHINCHILLA, **options)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=8, max_size=12), st.integers(0, 99))
def test_any_positive_data_give_a_fit_or_a_clear_refusal(values: list[float], seed: int) -> None:
    random = np.random.default_rng(seed)
    points = DataFrame({"x": random.uniform(1, 100, len(values)), "value": values})
    result = analyse(points, POWER, Settings(bootstrap=0, keep=1, drop_highest=0))
    json.dumps(result.to_json(), allow_nan=False)
    assert checks.condition(result.fit) > 0


def test_one_value_that_is_left_determines_nothing() -> None:
    """Two sizes: without the larger one nothing is known of size, though the other variable would fit."""
    points = grid(0.003)
    two = points[points["N"].isin(sorted(points["N"].unique())[:2])].reset_index(drop=True)
    found = {one.column: one for one in analyse(two, CHINCHILLA, Settings(bootstrap=0, keep=1)).left_out}
    assert found["N"].error is None and not found["N"].observed
    smallest = points["N"].min()
    assert found["N"].reason == f"only N = {smallest:.6g} is left, which does not determine what N does"
    assert found["D"].error is not None and not found["D"].reason
