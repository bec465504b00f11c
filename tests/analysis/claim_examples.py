"""The worked examples of the claim test: outcomes made by formula, (seeds, samples)."""

from __future__ import annotations

import numpy

from sparsebench.analysis.statistics import Array


def nll_of_magnitude() -> Array:
    k = numpy.arange(40)
    return 2.30 + 0.02 * (k % 5)


def nll_of_wanda() -> Array:
    k = numpy.arange(40)
    return 2.05 + 0.02 * (k % 5) + 0.04 * ((7 * k) % 10) / 9


def correct_a() -> Array:
    s, k = numpy.arange(3)[:, None], numpy.arange(60)
    return ((7 * k + 3 * s) % 10 < 7).astype(float)


def correct_b() -> Array:
    s, k = numpy.arange(3)[:, None], numpy.arange(60)
    bound = 7 - (k % 20 == 0).astype(int) - ((s == 1) & (k % 15 == 0)).astype(int)
    return ((7 * k + 3 * s + 2 * (k % 3 == 0)) % 10 < bound).astype(float)


def correct_sparse() -> Array:
    return correct_a() * (numpy.arange(60) % 4 != 0)


def equivalent() -> tuple[Array, Array]:
    k = numpy.arange(50)
    a = 2.30 + 0.01 * (k % 7)
    return a, a + 0.004 * ((3 * k) % 5 - 2) + 0.002
