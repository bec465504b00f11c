"""Claims about the constants of a law that is fitted to the runs of a sweep."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from test_verdicts import Lab, claim

from sparsebench.analysis.verdicts import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, UNTESTED
from sparsebench.errors import UserError

SIZES = (1e5, 2e5, 4e5, 8e5, 1.6e6, 3.2e6)
FIT = {"x": "parameters", "value": "nll"}


def ladder(noise: float, seeds: int = 1) -> Lab:
    """Dense models whose loss is 1.2 + 40 / N^.4, with samples that scatter by ``noise``."""
    lab, draw = Lab(), numpy.random.default_rng(0)
    for size in SIZES:
        scatter = noise * draw.standard_normal((seeds, 60))
        values = 1.2 + 40 / size**0.4 + scatter - scatter.mean(axis=1, keepdims=True)
        lab.add("dense", values if seeds > 1 else values[0], model=f"m{size:g}")
    for record in lab.records.values():
        record |= {"dtype": "float32", "bytes_weights_dense": 4 * float(record["model"][1:])}
    return lab


def about(relation: str, right: float, **changes: Any) -> Any:
    return claim("fit.power.alpha", relation, right, **{"select": {"method": "dense"}, "fit": FIT, **changes})


def test_the_constant_and_its_error_come_from_the_samples() -> None:
    found = ladder(0.02).verdict(about(">", 0.3))
    assert found.verdict == REPRODUCED, found.why
    assert found.estimate == pytest.approx(0.1, abs=1e-4)
    assert found.low is not None and 0.05 < found.low < 0.1 < (found.high or 0) < 0.15


def test_the_opposite_and_too_much_noise() -> None:
    assert ladder(0.02).verdict(about("<", 0.3)).verdict == NOT_REPRODUCED
    assert ladder(1.0).verdict(about(">", 0.38)).verdict == INCONCLUSIVE


def test_seeds_of_one_model_are_one_row() -> None:
    found = ladder(0.02, seeds=3).verdict(about(">", 0.3))
    assert (found.verdict, found.seeds) == (REPRODUCED, 3)


def test_two_constants_in_one_expression_and_a_decision_without_noise() -> None:
    lab = ladder(0.0)
    both = claim(
        "fit.power.A * fit.power.alpha", "~", 16.0, margin=0.1, select={"method": "dense"}, fit=FIT, unit="none"
    )
    assert lab.verdict(both).verdict == REPRODUCED


def test_too_few_runs_and_runs_without_the_column() -> None:
    lab = ladder(0.02)
    few = lab.verdict(about(">", 0.3, select={"method": "dense", "model": "m100000"}))
    assert few.verdict == UNTESTED and "1 runs for a law of 3 parameters" in few.why
    for record in lab.records.values():
        record["bytes_weights_dense"] = 4e6
    same = lab.verdict(about(">", 0.3))
    assert same.verdict == UNTESTED and "have one x only (1e+06), which determines no constant" in same.why
    missing = lab.verdict(about(">", 0.3, fit={"x": "train_tokens", "value": "nll"}))
    assert missing.verdict == UNTESTED and "has no train_tokens" in missing.why


@pytest.mark.parametrize(
    ("left", "fit", "problem"),
    [
        ("fit.power.gamma", FIT, "the law's parameters are E, A, alpha"),
        ("fit.nosuch.alpha", FIT, "unknown law"),
        ("fit.power.alpha", {"x": "parameters"}, "value=None: must be one of nll, acc, score, achieved"),
        ("fit.power.alpha", {"value": "nll"}, "names a column for each of x, and value"),
        ("fit.power.alpha", None, "value=None"),
        ("nll(method=dense)", FIT, "neither side names fit.<law>.<parameter>"),
    ],
)
def test_a_fit_that_does_not_say_what_is_fitted(left: str, fit: Any, problem: str) -> None:
    with pytest.raises(UserError, match="fit") as error:
        claim(left, ">", 0.1, fit=fit)
    assert problem in str(error.value)
