"""The plain power law y = E + A/x^alpha, the baseline for every other law."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from sparsebench.analysis.laws.base import Array, Columns, Law, Parameter, Values, centre
from sparsebench.analysis.laws.chinchilla import EXPONENT, EXPONENTS, FLOORS


def _terms(p: Values, log_x: Array) -> Array:
    log_e = math.log(p["E"]) if p["E"] > 0 else -math.inf
    first = math.log(p["A"]) - p["alpha"] * log_x
    return np.stack([first, np.full_like(first, log_e)])


def _curve(p: Values, x: Columns) -> Array:
    return np.asarray(np.logaddexp.reduce(_terms(p, np.log(x["x"])), axis=0))


def _slopes(p: Values, x: Columns) -> dict[str, Array]:
    log_x = np.log(x["x"])
    terms = _terms(p, log_x)
    a, e = np.exp(terms - np.logaddexp.reduce(terms, axis=0))
    return {"E": e, "A": a, "alpha": -p["alpha"] * a * log_x}


def _starts(x: Columns, y: Array) -> Iterator[dict[str, float]]:
    logs = centre(x, ("x",))
    for share, alpha in itertools.product(FLOORS, EXPONENTS):
        floor = share * float(y.min())
        rest = max(float(np.median(y)) - floor, 1e-3 * float(y.min()))
        yield _rescale({"E": floor, "A": rest, "alpha": alpha}, logs)


def _rescale(p: Values, c: Values) -> dict[str, float]:
    return {**p, "A": p["A"] * math.exp(p["alpha"] * c["x"])}


POWER = Law(
    name="power",
    formula="y = E + A/x^alpha",
    variables={"x": "what is scaled: parameters, tokens, FLOPs"},
    parameters={"E": Parameter(), "A": Parameter(), "alpha": EXPONENT},
    link="log",
    curve=_curve,
    starts=_starts,
    slopes=_slopes,
    rescale=_rescale,
    floor="E",
)
