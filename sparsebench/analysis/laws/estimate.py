"""The one estimator of all laws: a sum of Huber losses in link space, minimised from many starts.

Objective: SUM (never the mean) over rows of weight * Huber_delta(r), r = predicted - observed in link space, Huber =
r^2/2 for |r| <= delta, else delta (|r| - delta/2). ``scipy.optimize.least_squares`` on r/delta minimises exactly this
over delta^2, so its tolerances see residuals of order one. The averaged, unscaled objective with default tolerances
is what went wrong in the original fit of the loss law (Besiroglu et al. 2024, "Chinchilla Scaling: A replication
attempt"). There is no free residual scale: it would turn the Huber fit into least absolute deviations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import least_squares

from sparsebench.analysis.laws.base import LINKS, LOSSES, Array, Columns, Law, Values, centre
from sparsebench.errors import UserError, closest

if TYPE_CHECKING:
    from pandas import DataFrame

DELTA, KEEP, CLIP = 1e-3, 12, 1e-6
_TIGHT = {"ftol": 1e-14, "xtol": 1e-14, "gtol": 1e-14}
_SEARCH, _POLISH = 300, 2000  # evaluations of each start, then of the best; a healthy fit needs about 60
_SAME, _SAME_PER_POINT = 1e-4, 1e-12  # ends this near the best are the best: relative, absolute per row


@dataclass(frozen=True)
class Problem:
    """A law bound to rows. ``x``: variables over their geometric means (``logs``: the logarithms of these);
    ``y``: (rows,) observed; ``z``: the same in link space, clipped where that is infinite; ``weights``: (rows,)."""

    law: Law
    x: Columns
    logs: dict[str, float]
    y: Array
    z: Array
    weights: Array
    loss: str
    delta: float
    fixed: dict[str, float]

    @property
    def free(self) -> list[str]:
        return [name for name in self.law.parameters if name not in self.fixed]

    def constants(self, theta: Array) -> dict[str, float]:
        """Search space -> the centred constants by name."""
        found = {
            name: self.law.parameters[name].from_search(float(v)) for name, v in zip(self.free, theta, strict=True)
        }
        return {name: found.get(name, self.fixed.get(name, 0.0)) for name in self.law.parameters}

    def reported(self, theta: Array) -> dict[str, float]:
        """Search space -> the constants for the variables as they were given."""
        return self.law.moved(self.constants(theta), self.logs)

    def theta(self, reported: Values) -> Array:
        """The reverse of ``reported``, moved inside the bounds."""
        centred = self.law.moved(reported, {name: -log for name, log in self.logs.items()})
        low, high = self.bounds()
        inside = np.array([self.law.parameters[name].to_search(centred[name]) for name in self.free])
        margin = np.where(np.isfinite(high - low), 1e-6 * (high - low), 1e-9)
        return np.asarray(np.clip(inside, np.maximum(low + margin, -1e3), np.minimum(high - margin, 1e3)))

    def observing(self, y: Array, clip: float = CLIP) -> Problem:
        """The same rows with other values, (rows,)."""
        return replace(self, y=y, z=_linked(self.law, y, clip))

    def bounds(self) -> tuple[Array, Array]:
        ranges = [self.law.parameters[name] for name in self.free]
        return np.array([r.to_search(r.low) for r in ranges]), np.array([r.to_search(r.high) for r in ranges])

    def residuals(self, theta: Array) -> Array:
        """What is squared: r/delta, or signed deviance residuals for the binomial loss."""
        predicted = self.law.curve(self.constants(theta), self.x)
        if self.loss != "binomial":
            return np.asarray((predicted - self.z) / self.delta)
        return _deviance(predicted, self.y)

    def jacobian(self, theta: Array) -> Array:
        """The derivative of ``residuals``: (rows, free parameters)."""
        slopes = self.slopes(theta)
        if self.loss != "binomial":
            return slopes / self.delta
        eta = self.law.curve(self.constants(theta), self.x)
        r, p = _deviance(eta, self.y), LINKS["logit"].back(eta)
        # d(r^2/2)/d(eta) = p - y; at r = 0 the derivative of r tends to sqrt(p (1 - p)).
        small = np.abs(r) < 1e-7
        by_eta = np.where(small, np.sqrt(p * (1 - p)), (p - self.y) / np.where(small, 1.0, r))
        return slopes * by_eta[:, None]

    def slopes(self, theta: Array) -> Array:
        """The derivative of the curve in link space by the search space: (rows, free parameters)."""
        if self.law.slopes is not None:
            found = self.law.slopes(self.constants(theta), self.x)
            return np.stack([np.broadcast_to(found[name], self.y.shape) for name in self.free], axis=1)
        columns = []
        for at in range(len(theta)):
            step = np.zeros_like(theta)
            step[at] = 6e-6 * max(1.0, abs(theta[at]))  # cube root of the float64 epsilon
            ends = [self.law.curve(self.constants(theta + sign * step), self.x) for sign in (1, -1)]
            columns.append((ends[0] - ends[1]) / (2 * step[at]))
        return np.stack(columns, axis=1)

    def objective(self, theta: Array) -> float:
        """The sum of the weighted losses; infinity where the curve is not finite."""
        with np.errstate(all="ignore"):
            r = self.residuals(theta)
            if not np.all(np.isfinite(r)):
                return math.inf
            if self.loss == "lad":
                return float(np.sum(self.weights * np.abs(r)) * self.delta)
            return float(0.5 * np.sum(self._loss(r * r)[0]) * self._scale**2)

    @property
    def _scale(self) -> float:
        return 1.0 if self.loss == "binomial" else self.delta

    def _loss(self, squares: Array) -> Array:
        """Weighted Huber (or square) with its two derivatives, as least_squares wants it: (3, rows)."""
        if self.loss in ("ols", "binomial"):
            rows = [squares, np.ones_like(squares), np.zeros_like(squares)]
        else:
            root = np.sqrt(np.maximum(squares, 1.0))
            outside = squares > 1
            rows = [np.where(outside, 2 * root - 1, squares), 1 / root, np.where(outside, -0.5 / root**3, 0.0)]
        return np.stack(rows) * self.weights

    def minimise(self, theta: Array, evaluations: int = _SEARCH) -> Solution | None:
        """The local minimum reached from ``theta``; None when the optimiser failed there."""
        deltas = [self.delta]
        if self.loss == "lad":  # anneals to least absolute deviations, each time from the answer before
            deltas = [10.0**power for power in range(-3, -9, -1)]
        stage, result = self, None
        with np.errstate(all="ignore"):
            for delta in deltas:
                stage = replace(self, delta=delta)
                try:
                    result = least_squares(
                        stage.residuals, theta, jac=stage.jacobian, bounds=self.bounds(), x_scale="jac",
                        loss=stage._loss, max_nfev=evaluations, **_TIGHT,
                    )  # fmt: skip
                except (ValueError, np.linalg.LinAlgError):  # the curve overflows at the start, or no SVD
                    return None
                theta = result.x
        if result is None:
            return None
        return Solution(theta, stage.objective(theta), float(result.optimality), int(result.nfev))


@dataclass(frozen=True)
class Solution:
    """Where one start ended. ``gradient``: the largest entry of the gradient of the scaled objective."""

    theta: Array
    objective: float
    gradient: float
    evaluations: int


@dataclass(frozen=True)
class Fit:
    """One fitted law. ``params``: reported constants; ``residuals``: (rows,) predicted - observed in link space, for
    the binomial loss in accuracies; ``starts``: one row per optimised start, its objective before and after;
    ``gradient``: of the scaled objective, zero at a minimum; ``groups``: (rows,) of what is resampled together."""

    law: Law
    problem: Problem
    theta: Array
    params: dict[str, float]
    objective: float
    gradient: float
    residuals: Array
    starts: list[dict[str, Any]]
    groups: Array | None

    @property
    def n(self) -> int:
        return len(self.problem.y)

    @property
    def k(self) -> int:
        """How many parameters were fitted."""
        return len(self.theta)

    @property
    def at_best(self) -> int:
        """How many of the optimised starts ended in the best minimum; a healthy fit has all of them there."""
        return sum(1 for start in self.starts if near(start["objective"], self.objective, self.n))

    def linked(self, x: Columns, params: Values | None = None) -> Array:
        """The prediction in link space at variables as they were given: (rows,)."""
        return self.law.curve(self.params if params is None else params, x)

    def fitted(self) -> Array:
        """The predictions of the fitted rows, in the value's own space: (rows,)."""
        return LINKS[self.law.link].back(self.law.curve(self.problem.constants(self.theta), self.problem.x))


def near(objective: float, best: float, n: int, relative: float = _SAME) -> bool:
    return objective <= best + max(relative * abs(best), _SAME_PER_POINT * n)


def fit(
    points: DataFrame,
    law: Law,
    *,
    delta: float = DELTA,
    loss: str | None = None,
    starts: Sequence[Mapping[str, float]] | None = None,
    keep: int = KEEP,
    weights: Array | None = None,
    clip: float = CLIP,
    fixed: Mapping[str, float] | None = None,
) -> Fit:
    """Fits ``law`` to ``points``: a column per variable, ``value``, optionally ``group`` (rows resampled together).

    ``loss``: huber, ols, lad or binomial (None: the law's own); ``delta``: the knee of huber, link space;
    ``starts``: instead of the law's grid; the best ``keep`` are optimised; ``weights``: (rows,) of each loss, for
    the binomial the number of samples; ``clip``: how near to 0 and 1 a logit is taken; ``fixed``: parameters that
    are not fitted. UserError when rows, values or options do not fit the law, or no start leads anywhere.
    """
    problem = problem_of(points, law, delta=delta, loss=loss, weights=weights, clip=clip, fixed=fixed or {})
    given = starts if starts is not None else problem.law.starts(_raw(problem), problem.y)
    thetas = [problem.theta({**start, **problem.fixed}) for start in given]
    begun = sorted(((problem.objective(theta), at) for at, theta in enumerate(thetas)), key=lambda one: one[0])
    ends: list[tuple[float, Solution]] = []
    for before, at in begun[:keep]:
        end = problem.minimise(thetas[at]) if math.isfinite(before) else None
        if end is not None and math.isfinite(end.objective):
            ends.append((before, end))
    if not ends:
        raise UserError(f"law={law.name}: no start gives a finite curve on these {len(problem.y)} rows")
    best = min((end for _, end in ends), key=lambda end: end.objective)
    if best.evaluations >= _SEARCH:  # a flat valley: the parameters are hardly determined, but the minimum is
        polished = problem.minimise(best.theta, _POLISH)
        best = min((end for end in (best, polished) if end is not None), key=lambda end: end.objective)
    table = [
        {"before": before, "objective": end.objective, "parameters": problem.reported(end.theta)}
        for before, end in ends
    ]
    groups = points["group"].to_numpy() if "group" in points else _clusters(points, problem.law)
    return Fit(
        problem.law, problem, best.theta, problem.reported(best.theta), best.objective, best.gradient,
        residuals_of(problem, best.theta), table, groups,
    )  # fmt: skip


def problem_of(
    points: DataFrame,
    law: Law,
    *,
    delta: float,
    loss: str | None,
    weights: Array | None,
    clip: float,
    fixed: Mapping[str, float],
) -> Problem:
    """``points`` checked and bound to the law. UserError as for ``fit``."""
    loss = law.loss if loss is None else loss
    valid = [one for one in LOSSES if one != "binomial" or law.link == "logit"]
    if loss not in valid:
        raise UserError(f"loss={loss}: law={law.name}{closest(loss, valid)}")
    if not 0 < delta < math.inf:
        raise UserError(f"delta={delta}: must be > 0")
    if not 0 < clip < 0.5:
        raise UserError(f"clip={clip}: must be > 0 and < 0.5")
    check_points(points, law)
    raw: Columns = {
        name: points[name].to_numpy(dtype=str if name in law.categories else np.float64) for name in law.variables
    }
    bound = law.bind(law, raw) if law.bind else law
    if len(points) <= len(bound.parameters) - len(fixed):
        raise UserError(
            f"law={law.name}: {len(points)} rows are too few for its {len(bound.parameters) - len(fixed)} parameters"
        )
    logs = centre(raw, law.numeric) if law.rescale else dict.fromkeys(law.numeric, 0.0)
    x = {name: raw[name] / math.exp(logs[name]) if name in logs else raw[name] for name in raw}
    y = points["value"].to_numpy(dtype=np.float64)
    weighed = np.ones_like(y) if weights is None else np.asarray(weights, dtype=np.float64)
    if weighed.shape != y.shape or not np.all(np.isfinite(weighed) & (weighed > 0)):
        raise UserError("weights: one number > 0 a row")
    return Problem(bound, x, logs, y, _linked(law, y, clip), weighed, loss, delta, dict(fixed))


def _linked(law: Law, y: Array, clip: float) -> Array:
    """``y`` in the law's link space; not finite where it has no place there."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(LINKS[law.link].to(np.clip(y, clip, 1 - clip) if law.link == "logit" else y))


def check_points(points: DataFrame, law: Law) -> None:
    """UserError when a column is missing or holds what the law cannot take, naming the first such row."""
    for name in [*law.variables, "value"]:
        if name not in points:
            raise UserError(f"{name}: law={law.name} needs this column; there are: {', '.join(map(str, points))}")
        found = None if name in law.categories else first_wrong(points[name].to_numpy(dtype=np.float64), name, law)
        if found is not None:
            raise UserError(f"{name}: row {found + 1} is {points[name].iloc[found]}; must be {needed(name, law)}")


def first_wrong(column: Array, name: str, law: Law) -> int | None:
    """The first row whose number the law cannot take as its variable ``name``, or as ``value``; None when all do."""
    low, high = law.values if name == "value" else (0.0, math.inf)
    wrong = ~np.isfinite(column) | (column > high) | ((column <= low) if _strict(name, law) else (column < low))
    return int(np.argmax(wrong)) if wrong.any() else None


def needed(name: str, law: Law) -> str:
    """The numbers that ``first_wrong`` lets pass, in words."""
    low, high = law.values if name == "value" else (0.0, math.inf)
    bounds = [f"{'>' if _strict(name, law) else '>='} {low:g}"] if math.isfinite(low) else []
    return "a number " + " and ".join([*bounds, *([f"<= {high:g}"] if math.isfinite(high) else [])])


def _strict(name: str, law: Law) -> bool:
    return name != "value" or law.link == "log"


def residuals_of(problem: Problem, theta: Array) -> Array:
    """predicted - observed in link space; for the binomial loss in accuracies, since a logit of 0 or 1 is infinite."""
    predicted = problem.law.curve(problem.constants(theta), problem.x)
    if problem.loss == "binomial":
        return LINKS["logit"].back(predicted) - problem.y
    return np.asarray(predicted - problem.z)


def _deviance(eta: Array, y: Array) -> Array:
    """Signed square roots of the deviance of one Bernoulli trial: r^2/2 = y ln(y/p) + (1-y) ln((1-y)/(1-p))."""
    # ln p = -ln(1 + e^-eta) and ln(1-p) = -ln(1 + e^eta), neither of which cancels near 0 or 1.
    entropy = np.where(y > 0, y * np.log(np.where(y > 0, y, 1.0)), 0.0)
    entropy += np.where(y < 1, (1 - y) * np.log(np.where(y < 1, 1 - y, 1.0)), 0.0)
    half = entropy + y * np.logaddexp(0.0, -eta) + (1 - y) * np.logaddexp(0.0, eta)
    return np.asarray(np.sign(LINKS["logit"].back(eta) - y) * np.sqrt(2 * np.maximum(half, 0.0)))


def _raw(problem: Problem) -> Columns:
    return {name: problem.x[name] * math.exp(problem.logs.get(name, 0.0)) for name in problem.law.numeric}


def _clusters(points: DataFrame, law: Law) -> Array | None:
    if not law.cluster:
        return None
    return np.asarray(points.groupby(list(law.cluster), sort=False).ngroup())
