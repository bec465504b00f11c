"""Cost against quality: who is on the front, at which cost model sizes change places, and single-number summaries.

Costs are positive, lower is better; qualities higher is better. Nothing is interpolated between methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

RESAMPLES = 10_000
FEWEST_BLOCKS = 10  # interleaved timings, after warm-up
_STEPS = 400  # of the cost axis on which crossings are looked for


def front(cost: ArrayLike, quality: ArrayLike) -> NDArray[np.bool_]:
    """(points,) which are not dominated: no other costs no more and is no worse, one of the two strictly."""
    found = _fronts(np.asarray(cost, dtype=np.float64), np.atleast_2d(np.asarray(quality, dtype=np.float64)))
    return np.asarray(found[0])


def front_shares(cost: ArrayLike, qualities: ArrayLike) -> Array:
    """(points,) the share of resamples in which each point is on the front. ``qualities``: (resamples, points), from
    ``resampled`` or ``normal_draws``. Drawn filled from .5, hollow from .05."""
    return np.asarray(_fronts(np.asarray(cost, dtype=np.float64), np.asarray(qualities, dtype=np.float64)).mean(axis=0))


def resampled(outcomes: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """(resamples, points) mean qualities. ``outcomes``: (points, samples), the same samples for every point, so that
    differences keep their pairing."""
    values = np.asarray(outcomes, dtype=np.float64)
    samples = values.shape[1]
    counts = np.random.default_rng(seed).multinomial(samples, np.full(samples, 1 / samples), size=resamples)
    return np.asarray(counts @ values.T / samples)


def normal_draws(quality: ArrayLike, se: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """(resamples, points) for points whose errors are independent and only known by their standard errors."""
    q = np.asarray(quality, dtype=np.float64)
    return np.asarray(q + np.random.default_rng(seed).standard_normal((resamples, len(q))) * np.asarray(se))


def _fronts(cost: Array, qualities: Array) -> NDArray[np.bool_]:
    """(resamples, points)."""
    if cost.ndim != 1 or qualities.shape[1:] != cost.shape or not np.all(np.isfinite(cost)):
        raise ValueError(f"one finite cost a point is needed, not {cost.shape} for qualities {qualities.shape}")
    order = np.argsort(cost, kind="stable")
    _, starts, group = np.unique(cost[order], return_index=True, return_inverse=True)
    own = qualities[:, order]
    best = np.fmax.reduceat(own, starts, axis=1)  # at each cost
    cheaper = np.full_like(best, np.nan)  # nothing is cheaper than the cheapest
    cheaper[:, 1:] = np.fmax.accumulate(best, axis=1)[:, :-1]
    kept = np.empty(qualities.shape, dtype=bool)
    kept[:, order] = ((own == best[:, group]) & ~(own <= cheaper[:, group])) | np.isnan(own)
    return kept


Line = tuple[ArrayLike, ArrayLike]
"""One method's own curve: (points,) costs and (points,) qualities."""


def best_at(lines: Sequence[Line], cost: ArrayLike) -> Array:
    """The best quality that one model size reaches for no more than each cost, over its methods' own curves, each
    interpolated on the logarithm of cost. It never falls: who may spend more can spend less, and where a curve ends its
    best stays. Not a number below the cheapest point."""
    wanted = np.log(np.asarray(cost, dtype=np.float64))
    found = np.full(wanted.shape, -math.inf)
    for costs, qualities in lines:
        x, y = np.log(np.asarray(costs, dtype=np.float64)), np.asarray(qualities, dtype=np.float64)
        order = np.argsort(x)
        x, y = x[order], y[order]
        passed = np.concatenate([[-math.inf], np.fmax.accumulate(y)])[np.searchsorted(x, wanted, side="right")]
        found = np.fmax.reduce([found, passed, np.interp(wanted, x, y, left=-math.inf, right=-math.inf)])
    return np.where(np.isfinite(found), found, np.nan)


class Crossover(NamedTuple):
    """``cost``: where two sizes change places; ``larger``: whether the larger one is the better above it."""

    cost: float
    larger: bool


def crossovers(small: Sequence[Line], large: Sequence[Line]) -> list[Crossover]:
    """Where the better of two model sizes changes, at costs that afford both: from the dearer of their cheapest points
    to the last point of either. Where one size's curves end before, its best stays, as in ``best_at``."""
    ends = [np.log([np.min(np.concatenate(c)), np.max(np.concatenate(c))]) for c in map(_costs, (small, large))]
    low, high = max(ends[0][0], ends[1][0]), max(ends[0][1], ends[1][1])
    if not low < high:
        return []
    knots = np.concatenate([np.linspace(low, high, _STEPS), np.log(np.concatenate([*_costs(small), *_costs(large)]))])
    x = np.unique(knots[(knots >= low) & (knots <= high)])
    gap = best_at(large, np.exp(x)) - best_at(small, np.exp(x))
    known = np.isfinite(gap) & (gap != 0)
    x, gap = x[known], gap[known]
    turns = np.flatnonzero(np.sign(gap[1:]) != np.sign(gap[:-1]))
    at = [float(np.exp(x[i] + (x[i + 1] - x[i]) * gap[i] / (gap[i] - gap[i + 1]))) for i in turns]
    return [Crossover(cost, bool(gap[i + 1] > 0)) for cost, i in zip(at, turns, strict=True)]


def crossover_interval(
    draws: Sequence[tuple[Sequence[Line], Sequence[Line]]], larger: bool = True, *, level: float = 0.95
) -> tuple[float, float, float]:
    """(low, high, share): the percentile interval of the first cost above which the larger (else the smaller) size is
    the better one, and the share of resamples that have one.

    ``draws``: of every resample the curves of the small and of the large size, as ``crossovers`` takes them.
    """
    every = ([one.cost for one in crossovers(*draw) if one.larger == larger] for draw in draws)
    first = [costs[0] for costs in every if costs]
    if not first:
        return math.nan, math.nan, 0.0
    low, high = np.percentile(first, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high), len(first) / len(draws)


def _costs(lines: Sequence[Line]) -> list[Array]:
    return [np.asarray(costs, dtype=np.float64) for costs, _ in lines]


def common_interval(sparsities: Sequence[ArrayLike]) -> tuple[float, float]:
    """The sparsities that all curves reach. ValueError when there are none."""
    arrays = [np.asarray(one, dtype=np.float64) for one in sparsities]
    low, high = max(float(one.min()) for one in arrays), min(float(one.max()) for one in arrays)
    if not low < high:
        raise ValueError(f"the curves have no sparsities in common: {low:g} to {high:g}")
    return low, high


def retention_area(
    sparsity: ArrayLike, score: ArrayLike, dense: float, interval: tuple[float, float], *, chance: float | None = None
) -> float:
    """The mean of score / dense over ``interval`` (trapezoids), or of (score - chance) / (dense - chance), not below
    0. ``interval``: from ``common_interval``. For perplexity give 1 / log ppl as the score."""
    s, y = np.asarray(sparsity, dtype=np.float64), np.asarray(score, dtype=np.float64)
    kept = y / dense if chance is None else np.maximum((y - chance) / (dense - chance), 0.0)
    low, high = interval
    if not s.min() - 1e-9 <= low < high <= s.max() + 1e-9:
        raise ValueError(f"the interval {low:g} to {high:g} is not covered by sparsities {s.min():g} to {s.max():g}")
    x = np.unique([low, *s[(s > low) & (s < high)], high])
    return float(np.trapezoid(np.interp(x, s, kept), x) / (high - low))


@dataclass(frozen=True)
class SpeedUp:
    """``ratio``: how many times faster, the geometric mean over ``blocks``; ``low``, ``high``: its 95% interval;
    ``theoretical``: the ratio of operations or bytes, always shown beside it."""

    ratio: float
    low: float
    high: float
    blocks: int
    theoretical: float | None = None


def speed_up(dense: ArrayLike, sparse: ArrayLike, theoretical: float | None = None) -> SpeedUp:
    """From blocks of interleaved timings, (blocks,) each in the same unit: a t interval on the logarithms of the
    blocks' ratios. ValueError for fewer than 10 blocks or times that are not positive."""
    from scipy.stats import t

    a, b = np.asarray(dense, dtype=np.float64), np.asarray(sparse, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) < FEWEST_BLOCKS:
        raise ValueError(f"a speed-up needs {FEWEST_BLOCKS} or more blocks on both sides, not {a.shape} and {b.shape}")
    if not (np.all(a > 0) and np.all(b > 0) and np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
        raise ValueError("times must be positive")
    logs = np.log(a / b)
    half = float(t.ppf(0.975, len(a) - 1)) * float(logs.std(ddof=1)) / math.sqrt(len(a))
    middle = float(logs.mean())
    return SpeedUp(math.exp(middle), math.exp(middle - half), math.exp(middle + half), len(a), theoretical)


def geometric_mean(ratios: ArrayLike) -> float:
    """Of speed-ups over models or tasks."""
    return float(np.exp(np.mean(np.log(np.asarray(ratios, dtype=np.float64)))))


def mean_ranks(
    qualities: Mapping[str, ArrayLike], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """name -> (mean rank over tasks, low, high), 1 the best; ties share the mean of their ranks. ``qualities``: name
    -> (tasks,), the same tasks; the interval resamples tasks."""
    from scipy.stats import rankdata

    table = np.stack([np.asarray(one, dtype=np.float64) for one in qualities.values()])
    ranks = rankdata(-table, axis=0)
    tasks = table.shape[1]
    counts = np.random.default_rng(seed).multinomial(tasks, np.full(tasks, 1 / tasks), size=resamples)
    low, high = np.percentile(counts @ ranks.T / tasks, [50 * (1 - level), 50 * (1 + level)], axis=0)
    means = ranks.mean(axis=1)
    return {name: (float(means[at]), float(low[at]), float(high[at])) for at, name in enumerate(qualities)}
