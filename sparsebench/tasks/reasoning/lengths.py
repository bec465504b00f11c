"""Test-time compute: how long answers are, right and wrong ones.

Pure functions over one length and one outcome an answer. Lengths are tokens (or characters) behind the prompt; an
answer that was cut at the limit counts with its length and as wrong. Lengths compare within one tokenizer only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

BINS = 5


@dataclass(frozen=True)
class Lengths:
    """``correct``, ``wrong``: mean length of right and of wrong answers, ``per_correct``: all length over right
    answers; None where there are none. ``n``: answers."""

    accuracy: float
    mean: float
    correct: float | None
    wrong: float | None
    per_correct: float | None
    n: int


@dataclass(frozen=True)
class Bin:
    """Answers whose lengths are neighbours: from ``low`` to ``high``, ``n`` of them."""

    low: float
    high: float
    n: int
    accuracy: float


def lengths(length: ArrayLike, correct: ArrayLike) -> Lengths:
    """length, correct (0 or 1): (answers,). ValueError when there are none."""
    t, c = _checked(length, correct)
    right = c > 0
    return Lengths(
        float(c.mean()),
        float(t.mean()),
        float(t[right].mean()) if right.any() else None,
        float(t[~right].mean()) if not right.all() else None,
        float(t.sum() / c.sum()) if right.any() else None,
        len(t),
    )


def accuracy_by_length(length: ArrayLike, correct: ArrayLike, bins: int = BINS) -> list[Bin]:
    """Accuracy in ``bins`` bins of equally many answers (the first ones have one more where they do not divide), by
    increasing length. Equal lengths are never parted: what they cannot fill is left out, so there may be fewer bins."""
    if bins < 2:
        raise ValueError(f"bins={bins}: valid: 2 or more")
    t, c = _checked(length, correct)
    order = np.argsort(t, kind="stable")
    t, c = t[order], c[order]
    ends = [int(part[-1]) + 1 for part in np.array_split(np.arange(len(t)), bins) if len(part)]
    ends = sorted({int(np.searchsorted(t, t[end - 1], side="right")) for end in ends})
    starts = [0, *ends[:-1]]
    return [
        Bin(float(t[start]), float(t[end - 1]), end - start, float(c[start:end].mean()))
        for start, end in zip(starts, ends, strict=True)
    ]


def length_correlation(length: ArrayLike, correct: ArrayLike) -> float | None:
    """Spearman's rho between length and correctness; negative where longer answers are wrong ones. None where all
    lengths or all outcomes are the same."""
    from scipy.stats import spearmanr

    t, c = _checked(length, correct)
    if np.ptp(t) == 0 or np.ptp(c) == 0:
        return None
    return float(spearmanr(t, c).statistic)


def _checked(length: ArrayLike, correct: ArrayLike) -> tuple[Array, Array]:
    t, c = np.asarray(length, np.float64), np.asarray(correct, np.float64)
    if t.ndim != 1 or t.shape != c.shape or not len(t):
        raise ValueError(f"one length and one outcome an answer are needed, not {t.shape} and {c.shape}")
    return t, c
