"""The parametric loss law L(N, D) = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, third approach), the same with
the parameter count averaged over training (Jin et al. 2025, "The Journey Matters"), and what follows from it for a
compute budget.

The grid of starts is free of scale, unlike the classical one (alpha, beta in 0-2, log E in -1..1, log A and log B
in 0-25): E is a share of the lowest loss, the two other terms share what is left of the median one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from sparsebench.analysis.laws.base import Array, Columns, Law, Parameter, Values, centre

EXPONENT = Parameter(low=0.01, high=3.0, exponent=True)
FLOORS = (0.3, 0.6, 0.85, 0.97)  # shares of the lowest loss
EXPONENTS = (0.1, 0.2, 0.35, 0.5, 0.8, 1.2)


def _terms(p: Values, log_n: Array, log_d: Array) -> Array:
    """log of the three terms: (3, rows). E = 0 is a term of weight exp(-inf) = 0."""
    log_e = math.log(p["E"]) if p["E"] > 0 else -math.inf
    first = math.log(p["A"]) - p["alpha"] * log_n
    return np.stack([first, math.log(p["B"]) - p["beta"] * log_d, np.full_like(first, log_e)])


def _law(size: str) -> Law:
    """The law whose first variable is called ``size``."""

    def curve(p: Values, x: Columns) -> Array:
        return np.asarray(np.logaddexp.reduce(_terms(p, np.log(x[size]), np.log(x["D"])), axis=0))

    def slopes(p: Values, x: Columns) -> dict[str, Array]:
        log_n, log_d = np.log(x[size]), np.log(x["D"])
        terms = _terms(p, log_n, log_d)
        a, b, e = np.exp(terms - np.logaddexp.reduce(terms, axis=0))  # each term's share of the loss
        return {"E": e, "A": a, "B": b, "alpha": -p["alpha"] * a * log_n, "beta": -p["beta"] * b * log_d}

    def starts(x: Columns, y: Array) -> Iterator[dict[str, float]]:
        logs = centre(x, (size, "D"))
        for share, split, alpha, beta in itertools.product(FLOORS, (0.2, 0.5, 0.8), EXPONENTS, EXPONENTS):
            floor = share * float(y.min())
            rest = max(float(np.median(y)) - floor, 1e-3 * float(y.min()))
            p = {"E": floor, "A": split * rest, "B": (1 - split) * rest, "alpha": alpha, "beta": beta}
            yield rescale(p, logs)

    def rescale(p: Values, c: Values) -> dict[str, float]:
        return {**p, "A": p["A"] * math.exp(p["alpha"] * c[size]), "B": p["B"] * math.exp(p["beta"] * c["D"])}

    return Law(
        name="chinchilla",
        formula=f"L = E + A/{size}^alpha + B/D^beta",
        variables={size: "parameters (say which: linear only, or with embeddings)", "D": "training tokens"},
        parameters={
            "E": Parameter(), "A": Parameter(), "B": Parameter(), "alpha": EXPONENT, "beta": EXPONENT,
        },
        link="log",
        curve=curve,
        starts=starts,
        slopes=slopes,
        rescale=rescale,
        floor="E",
    )  # fmt: skip


CHINCHILLA = _law("N")
CHINCHILLA_AVG = replace(
    _law("N_avg"),
    name="chinchilla_avg",
    variables={"N_avg": "non-zero linear parameters, averaged over the tokens of training", "D": "training tokens"},
    aliases={"N": "N_avg"},
)


def allocation(p: Values, compute: Array) -> tuple[float, Array, Array]:
    """The best split of ``compute`` C = 6 N D (FLOPs): (a, N*, D*) with N* = G (C/6)^a, D* = (C/6)^(1-a) / G,
    a = beta/(alpha + beta) and G = (alpha A / (beta B))^(1/(alpha + beta)) (Hoffmann et al. 2022, eq. 4)."""
    total = p["alpha"] + p["beta"]
    a = p["beta"] / total
    log_g = math.log(p["alpha"] * p["A"] / (p["beta"] * p["B"])) / total
    log_c = np.log(np.asarray(compute, dtype=np.float64) / 6)
    return a, np.exp(log_g + a * log_c), np.exp((1 - a) * log_c - log_g)
