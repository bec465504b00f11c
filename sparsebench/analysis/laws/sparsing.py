"""How the activation ratio (1 - activation sparsity) changes over training (Luo et al. 2024, "Sparsing Law", sec. 4).

SiLU models: A(D) = A0 - c/D^alpha, increasing. ReLU models: A(D) = exp(b - c D^alpha) + A0, decreasing; its b, c and
alpha are sloppy (published rows trade c over three decades against alpha): compare A0 and predictions, not them.

The paper counts D in 1e9 tokens, and c depends on that unit; the starts are tried in D as it is given and in D over
its geometric mean, so that another unit is found as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from sparsebench.analysis.laws.base import Array, Columns, Law, Parameter, Starts, Values, centre, grid

EXPONENT = Parameter(low=0.01, high=3.0, exponent=True)


def _increasing(p: Values, x: Columns) -> Array:
    return np.asarray(p["A0"] - p["c"] * x["D"] ** -p["alpha"])


def _increasing_slopes(p: Values, x: Columns) -> dict[str, Array]:
    term = p["c"] * x["D"] ** -p["alpha"]
    return {"A0": np.full_like(term, p["A0"]), "c": -term, "alpha": p["alpha"] * term * np.log(x["D"])}


def _increasing_rescale(p: Values, c: Values) -> dict[str, float]:
    return {**p, "c": p["c"] * math.exp(p["alpha"] * c["D"])}


def _decreasing(p: Values, x: Columns) -> Array:
    return np.asarray(np.exp(p["b"] - p["c"] * x["D"] ** p["alpha"]) + p["A0"])


def _decreasing_slopes(p: Values, x: Columns) -> dict[str, Array]:
    power = p["c"] * x["D"] ** p["alpha"]
    excess = np.exp(p["b"] - power)
    return {
        "A0": np.ones_like(excess),
        "b": excess,
        "c": -excess * power,
        "alpha": -excess * power * p["alpha"] * np.log(x["D"]),
    }


def _decreasing_rescale(p: Values, c: Values) -> dict[str, float]:
    return {**p, "c": p["c"] * math.exp(-p["alpha"] * c["D"])}


def _in_both_units(points: Starts, rescale: Callable[[Values, Values], dict[str, float]]) -> Starts:
    def starts(x: Columns, y: Array) -> Iterator[dict[str, float]]:
        logs = centre(x, ("D",))
        for p in points(x, y):
            yield p
            yield rescale(p, logs)

    return starts


INCREASING = Law(
    name="increasing_convergent",
    formula="ratio = A0 - c/D^alpha",
    variables={"D": "training tokens / 1e9"},
    parameters={"A0": Parameter(high=1.0), "c": Parameter(), "alpha": EXPONENT},
    link="identity",
    curve=_increasing,
    starts=_in_both_units(
        grid(A0=(0.1, 0.3, 0.5), c=[math.exp(one) for one in (-4, -2, 0)], alpha=(0.1, 0.3, 1.0)), _increasing_rescale
    ),
    slopes=_increasing_slopes,
    rescale=_increasing_rescale,
    values=(0.0, 1.0),
)

DECREASING = Law(
    name="decreasing_logspace",
    formula="ratio = exp(b - c D^alpha) + A0",
    variables={"D": "training tokens / 1e9"},
    parameters={
        "A0": Parameter(low=0.0, high=1.0, positive=False),
        "b": Parameter(low=-math.inf, positive=False),
        "c": Parameter(),
        "alpha": EXPONENT,
    },
    link="identity",
    curve=_decreasing,
    starts=_in_both_units(
        grid(A0=(0.01, 0.05, 0.1), b=(-2.0, 0.0), c=[math.exp(one) for one in (-6, -3, 0)], alpha=(0.2, 0.5, 1.0)),
        _decreasing_rescale,
    ),
    slopes=_decreasing_slopes,
    rescale=_decreasing_rescale,
    floor="A0",
    values=(0.0, 1.0),
)
