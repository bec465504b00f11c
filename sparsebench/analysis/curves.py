"""Trade-off curves: quality over achieved sparsity, where they bend, and the largest sparsity that is safe.

Quality is always direction-normalised: higher is better. For a perplexity it is minus its logarithm, so that a
tolerance or margin of .05 means log ppl. Sparsities are achieved ones, increasing, the dense model first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsebench.analysis.statistics import difference, is_binary

if TYPE_CHECKING:
    from pandas import DataFrame

Array = NDArray[np.float64]

TOLERANCE, LOG_TOLERANCE = 0.01, 0.05  # accuracy; log perplexity (the latter is our choice)
MARGIN = 0.02
ALPHA = 0.05  # one-sided, of both rules for safe sparsity
SHARE = 0.5  # of the dense score, below which a task has collapsed (ours; papers read thresholds off their tables)
TOO_FEW = "n too small"  # how ``Safe.says`` begins where the samples cannot tell
_SLACK = 1e-9  # what rounding may take from a score
_GRID = 0.001  # of the hinge's knee
_FLAT = 1e-9  # a loss from no to full sparsity that is only rounding
_Z, _POWER = 1.645, 0.84  # normal quantiles of ALPHA and of 80% power
_COSTS = ("flops_prefill", "flops_decode", "bytes_weights", "kv_bytes_per_token")


@dataclass(frozen=True)
class Point:
    """One requested level. ``quality``: normalised, the mean over ``seeds`` runs; ``score``: the same in the metric's
    own units (a perplexity is averaged as its logarithm); ``n``: samples a run; ``hollow``: no run of it counts."""

    requested: float | None
    achieved: float
    quality: float
    score: float
    seeds: int
    n: int
    hollow: bool = False
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """One method on one model and task; ``points`` by achieved sparsity, the dense one first where there is one."""

    method: str
    model: str
    task: str
    points: tuple[Point, ...]

    def usable(self) -> tuple[Array, Array]:
        """(achieved, quality) of the points that count."""
        kept = [point for point in self.points if not point.hollow]
        return np.array([point.achieved for point in kept]), np.array([point.quality for point in kept])


def curves(records: DataFrame, score: str, better: str, *, log: bool = False) -> list[Curve]:
    """A curve per method, model and task from flat records (columns of the store). Dense runs begin every curve.

    ``better``: higher or lower; ``log``: quality is the logarithm of the score, as for perplexity. Flagged runs are
    never averaged with others: a level with no other run is a hollow point. Runs without a score are left out.
    """
    if better not in ("higher", "lower"):
        raise ValueError(f"better={better}: valid: higher, lower")
    rows = records[records[score].notna() & records["achieved"].notna()]
    found = []
    for (model, task), group in rows.groupby(["model", "task"], sort=False):
        dense = _levels(group[group["method"] == "dense"], score, better, log)
        for method, own in group[group["method"] != "dense"].groupby("method", sort=False):
            points = sorted(_levels(own, score, better, log), key=lambda point: point.achieved)
            found.append(Curve(str(method), str(model), str(task), (*dense, *points)))
    return found


def _levels(rows: DataFrame, score: str, better: str, log: bool) -> list[Point]:
    """A point per requested sparsity and pattern."""
    keys = [key for key in ("sparsity", "pattern") if key in rows]
    points = []
    for _, level in rows.groupby(keys, dropna=False, sort=False) if keys else [(None, rows)]:
        good = (level["status"] == "ok") & (level["flagged"].map(bool) == False)  # noqa: E712 (a pandas mask)
        counted = level[good] if good.any() else level
        values = counted[score].to_numpy(dtype=float)
        mean = float(np.mean(np.log(values) if log else values))
        requested = counted["sparsity"].iloc[0] if "sparsity" in counted else None
        samples = counted[f"{score}_n"].iloc[0] if f"{score}_n" in counted else 0
        points.append(
            Point(
                requested if isinstance(requested, float) and math.isfinite(requested) else None,
                float(counted["achieved"].mean()),
                mean if better == "higher" else -mean,
                math.exp(mean) if log else mean,
                len(counted),
                int(samples),
                not good.any(),
                {
                    cost: float(counted[cost].mean())
                    for cost in _COSTS
                    if cost in counted and counted[cost].notna().any()
                },
            )
        )
    return points


# Where a curve bends.


@dataclass(frozen=True)
class Broken:
    """Two lines meeting at ``at``. ``sse``: their squared error; ``slopes``: left and right; ``accepted``: falls
    more steeply on the right and is better than one straight line by AICc (5 parameters against 3; on a straight line
    of 10 points with noise that happens in about 1% of cases); not asked of a ``breakpoint``."""

    at: float
    sse: float
    slopes: tuple[float, float]
    accepted: bool = True

    @property
    def sharpness(self) -> float:
        """How many times steeper the right line falls; infinite where the left one does not fall, not a number where
        the right one does not. A slope of rounding noise is none."""
        left, right = (slope if abs(slope) > _FLAT else 0.0 for slope in self.slopes)
        if right >= 0:
            return math.nan
        return right / left if left < 0 else math.inf


def tolerance_knee(sparsity: ArrayLike, quality: ArrayLike, tolerance: float = TOLERANCE) -> float:
    """The largest sparsity up to which every quality is at least the dense (first) one minus ``tolerance``."""
    s, q = _checked(sparsity, quality, 1)
    fails = np.flatnonzero(q < q[0] - tolerance - _SLACK)
    return float(s[fails[0] - 1] if len(fails) else s[-1])


def breakpoint_knee(sparsity: ArrayLike, quality: ArrayLike) -> Broken:
    """Least-squares lines through the points up to and from an interior grid point, which both share; the point with
    the smallest total squared error."""
    s, q = _checked(sparsity, quality, 3)
    found = []
    for at in range(1, len(s) - 1):
        left, right = np.polyfit(s[: at + 1], q[: at + 1], 1), np.polyfit(s[at:], q[at:], 1)
        sse = np.sum((np.polyval(left, s[: at + 1]) - q[: at + 1]) ** 2) + np.sum(
            (np.polyval(right, s[at:]) - q[at:]) ** 2
        )
        found.append(Broken(float(s[at]), float(sse), (float(left[0]), float(right[0]))))
    return min(found, key=lambda one: one.sse)


def hinge_knee(sparsity: ArrayLike, quality: ArrayLike) -> Broken:
    """Least squares of a + b s + c max(s - k, 0), the knee k on a grid of .001."""
    s, q = _checked(sparsity, quality, 4)
    knees = hinge_grid(s)
    k = float(knees[np.argmin(hinge_errors(s, q[None], knees)[0])])
    design = _hinge_design(s, k)
    a = np.linalg.lstsq(design, q, rcond=None)[0]
    sse = float(np.sum((design @ a - q) ** 2))
    line = float(np.sum((np.polyval(np.polyfit(s, q, 1), s) - q) ** 2))
    accepted = bool(a[2] < 0) and _aicc(sse, len(s), 5) < _aicc(line, len(s), 3)
    return Broken(k, sse, (float(a[1]), float(a[1] + a[2])), accepted)


def hinge_interval(
    sparsity: ArrayLike, outcomes: ArrayLike, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of the hinge's knee. ``outcomes``: (levels, seeds, samples) or (levels, samples) of
    quality, the same seeds and samples at every level; both are resampled, independently of each other."""
    values = np.asarray(outcomes, dtype=np.float64)
    values = values[:, None, :] if values.ndim == 2 else values
    s, _ = _checked(sparsity, values.mean(axis=(1, 2)), 4)
    _, seeds, samples = values.shape
    random = np.random.default_rng(seed)
    by_seed = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    by_sample = random.multinomial(samples, np.full(samples, 1 / samples), size=resamples) / samples
    means = np.einsum("bs,lsn,bn->bl", by_seed, values, by_sample, optimize=True)
    knees = hinge_grid(s)
    found = knees[np.argmin(hinge_errors(s, means, knees), axis=1)]
    low, high = np.percentile(found, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def chord_knee(sparsity: ArrayLike, quality: ArrayLike) -> float:
    """The point farthest from the line between the ends. It depends on where the sweep ends: never a headline."""
    s, q = _checked(sparsity, quality, 3)
    chord = q[0] + (q[-1] - q[0]) * (s - s[0]) / (s[-1] - s[0])
    return float(s[np.argmax(np.abs(q - chord))])


def _checked(sparsity: ArrayLike, quality: ArrayLike, least: int) -> tuple[Array, Array]:
    s, q = np.asarray(sparsity, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    if s.ndim != 1 or s.shape != q.shape or len(s) < least:
        raise ValueError(f"a knee needs {least} or more sparsities with a quality each, not {s.shape} and {q.shape}")
    if not (np.all(np.isfinite(s)) and np.all(np.isfinite(q)) and np.all(np.diff(s) > 0)):
        raise ValueError("sparsities must increase, and everything must be finite")
    return s, q


def hinge_grid(s: Array) -> Array:
    """The knees that leave both lines determined: between the second and the last but one point."""
    steps = np.arange(math.ceil(s[1] / _GRID - _SLACK), math.floor(s[-2] / _GRID + _SLACK) + 1)
    return np.asarray(steps * _GRID) if len(steps) else s[1:2]


def _hinge_design(s: Array, k: float) -> Array:
    return np.stack([np.ones_like(s), s, np.maximum(s - k, 0)], axis=1)


def hinge_errors(s: Array, rows: Array, knees: Array) -> Array:
    """The squared error of every row of qualities (B, levels) at every knee: (B, knees)."""
    bases = np.linalg.qr(np.stack([_hinge_design(s, float(k)) for k in knees]))[0]
    explained = np.tensordot(rows, bases, axes=(1, 1))  # (B, knees, 3)
    return np.asarray(np.sum(rows**2, axis=1)[:, None] - np.sum(explained**2, axis=2))


def _aicc(sse: float, n: int, k: int) -> float:
    """AICc under a Gaussian; infinite where there are too few points for k parameters."""
    if n <= k + 1:
        return math.inf
    return n * math.log(max(sse, 1e-300) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


# The largest sparsity that keeps the quality.


@dataclass(frozen=True)
class Step:
    """One level's test: mean loss (dense minus sparse), the bound or p value that decides, whether it passes."""

    level: float
    loss: float
    p: float | None
    upper: float | None
    passes: bool


@dataclass(frozen=True)
class Safe:
    """``level``: the largest level before the first failure, None when the first one fails; ``largest_passing``: the
    largest that passes at all; ``n``: samples; ``says``: the finding in words."""

    rule: str
    level: float | None
    largest_passing: float | None
    n: int
    steps: tuple[Step, ...]
    says: str


Levels = Iterable[tuple[float, ArrayLike]]
"""(achieved sparsity, outcomes of quality), outcomes (samples,) or (seeds, samples), paired with the dense ones."""


def not_worse(dense: ArrayLike, levels: Levels, *, test: str = "welch", alpha: float = ALPHA) -> Safe:
    """The protocol of The Sparse Frontier: levels pass until a one-sided test finds the dense mean larger, p < alpha.

    ``test``: ``welch``, unpaired (the paper's exact test is not known to us; its stored statistics fit this one);
    ``mcnemar``, exact and paired, for outcomes of 0 and 1. A pass says only that no loss was seen: with 100 samples
    Welch's test overlooks a loss of 5 points 97% of the time.
    """
    if test not in ("welch", "mcnemar"):
        raise ValueError(f"test={test}: valid: welch, mcnemar")
    reference = np.asarray(dense, dtype=np.float64).ravel()
    steps = []
    for level, outcomes in _ordered(levels):
        own = np.asarray(outcomes, dtype=np.float64).ravel()
        p = _welch(reference, own) if test == "welch" else _mcnemar(reference, own)
        steps.append(Step(level, float(reference.mean() - own.mean()), p, None, p >= alpha))
    return _safe("not_worse", steps, len(reference), "no loss detected up to")


def non_inferior(dense: ArrayLike, levels: Levels, *, margin: float = MARGIN, alpha: float = ALPHA) -> Safe:
    """Levels that are safe: the loss is below ``margin`` with confidence 1 - alpha, on paired outcomes.

    Outcomes of 0 and 1 of one seed: the upper end of the Bonett-Price interval (alpha is .05 there); else the two-way
    jackknife test. Levels are tested upward to the first failure, so that nothing needs a correction.
    """
    reference = np.atleast_2d(np.asarray(dense, dtype=np.float64))
    steps: list[Step] = []
    discordant: list[float] = []
    for level, outcomes in _ordered(levels):
        own = np.atleast_2d(np.asarray(outcomes, dtype=np.float64))
        loss = float(reference.mean() - own.mean())
        if len(reference) == len(own) == 1 and is_binary(reference) and is_binary(own):
            upper = bonett_price_upper(reference[0], own[0])
            steps.append(Step(level, loss, None, upper, upper < margin))
        else:
            p = difference(reference, own).p_at_least(margin)
            steps.append(Step(level, loss, p, None, p < alpha))
        discordant.append(float(np.mean(reference != own)))
    n = reference.shape[1]
    if steps and not steps[0].passes and steps[0].loss < margin and n < required_samples(margin, discordant[0]):
        found = _safe("non_inferior", steps, n, "")
        needed = required_samples(margin, discordant[0])
        return Safe(found.rule, None, found.largest_passing, n, found.steps, f"{TOO_FEW}: about {needed} are needed")
    return _safe("non_inferior", steps, n, f"a loss of {margin:g} or more is ruled out up to")


def bonett_price_upper(dense: ArrayLike, sparse: ArrayLike) -> float:
    """The upper end of the one-sided 95% interval of the loss of paired outcomes of 0 and 1, (samples,) each
    (Bonett and Price 2012): p1 - p2 + 1.645 sqrt((p1 + p2 - (p1 - p2)^2) / (n + 2)), p = (count + 1) / (n + 2)."""
    a, b = np.asarray(dense, dtype=np.float64), np.asarray(sparse, dtype=np.float64)
    total = len(a) + 2
    p1, p2 = (np.sum((a == 1) & (b == 0)) + 1) / total, (np.sum((a == 0) & (b == 1)) + 1) / total
    return float(p1 - p2 + _Z * math.sqrt((p1 + p2 - (p1 - p2) ** 2) / total))


def required_samples(margin: float = MARGIN, discordant: float = 0.1) -> int:
    """About how many samples rule out a loss of ``margin`` with 80% power, when dense and sparse disagree on a share
    ``discordant`` of them; at least what Bonett-Price needs when they never do."""
    fewest = _Z * math.sqrt(2) / margin - 2
    return math.ceil(max(((_Z + _POWER) / margin) ** 2 * discordant, fewest) - _SLACK)


def over_tasks(levels: Mapping[str, float]) -> dict[str, Any]:
    """mean and std over tasks, and the minimum with the ``task`` it is of: what a user can rely on."""
    worst = min(levels, key=lambda task: levels[task])
    values = np.array(list(levels.values()), dtype=np.float64)
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "std": spread, "minimum": levels[worst], "task": worst}


def _ordered(levels: Levels) -> list[tuple[float, ArrayLike]]:
    return sorted(levels, key=lambda one: one[0])


def _safe(rule: str, steps: Sequence[Step], n: int, words: str) -> Safe:
    passed: list[float] = []
    for step in steps:
        if not step.passes:
            break
        passed.append(step.level)
    level = passed[-1] if passed else None
    largest = max((step.level for step in steps if step.passes), default=None)
    return Safe(
        rule, level, largest, n, tuple(steps), f"{words} {level:g} (n = {n})" if passed else f"no level (n = {n})"
    )


def _welch(dense: Array, sparse: Array) -> float:
    """p of "the dense mean is larger"; without any spread the means are compared."""
    from scipy.stats import ttest_ind_from_stats

    if np.ptp(dense) == 0 and np.ptp(sparse) == 0:
        return 0.0 if dense.mean() > sparse.mean() else 1.0
    known = [fact for one in (dense, sparse) for fact in (one.mean(), one.std(ddof=1), len(one))]
    return float(ttest_ind_from_stats(*known, equal_var=False, alternative="greater").pvalue)


def _mcnemar(dense: Array, sparse: Array) -> float:
    from scipy.stats import binomtest

    only_dense, only_sparse = int(np.sum((dense == 1) & (sparse == 0))), int(np.sum((dense == 0) & (sparse == 1)))
    both = only_dense + only_sparse
    return float(binomtest(only_dense, both, alternative="greater").pvalue) if both else 1.0


def collapse(sparsity: ArrayLike, score: ArrayLike, share: float = SHARE) -> float | None:
    """The smallest sparsity at which the score is below ``share`` of the dense (first) one; None where none is.

    sparsity, score: (levels,), sparsities increasing, higher scores better."""
    s, q = np.asarray(sparsity, np.float64), np.asarray(score, np.float64)
    if s.ndim != 1 or s.shape != q.shape or not len(s) or not (np.diff(s) > 0).all() or not np.isfinite(q).all():
        raise ValueError(f"increasing sparsities with a finite score each are needed, not {s} and {q}")
    below = np.flatnonzero(q < share * q[0])
    return float(s[below[0]]) if len(below) else None
