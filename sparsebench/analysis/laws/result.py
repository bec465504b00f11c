"""One law fitted, judged and described: what the verb ``fit`` and the reports show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsebench.analysis.laws import checks, compare
from sparsebench.analysis.laws.base import Array, Law
from sparsebench.analysis.laws.bootstrap import LEVEL, RESAMPLES, Bootstrap, Progress, resample
from sparsebench.analysis.laws.chinchilla import allocation
from sparsebench.analysis.laws.estimate import CLIP, DELTA, KEEP, Fit, fit

if TYPE_CHECKING:
    from pandas import DataFrame

_BUDGETS = 5  # how many compute budgets an allocation is shown for
_ALLOCATION_LEVEL = 0.8


@dataclass(frozen=True)
class Settings:
    """How laws are fitted. ``loss``: None for the law's own; ``drop_highest``: how many of a column's highest
    values are left out to test the extrapolation, 0 for none."""

    loss: str | None = None
    delta: float = DELTA
    keep: int = KEEP
    clip: float = CLIP
    bootstrap: int = RESAMPLES
    seed: int = 0
    drop_highest: int = 1


@dataclass(frozen=True)
class Result:
    """A fit with its intervals, tests and errors. ``name``: what tells it from others in one table; ``points``: the
    fitted rows; ``excluded``: rows that a filter took out; ``extra``: what only some laws have, plain values."""

    name: str
    fit: Fit
    points: DataFrame
    bootstrap: Bootstrap
    residuals: checks.Residuals
    condition: float
    doubts: list[str]
    warnings: list[str]
    quality: dict[str, float | None]
    left_out: list[compare.LeftOut]
    extra: dict[str, Any] = field(default_factory=dict)
    excluded: DataFrame | None = None

    @property
    def identifiable(self) -> bool:
        return not self.doubts

    @property
    def measure(self) -> str:
        """What its errors are (``compare.error``)."""
        return "mean absolute error" if self.fit.law.link == "logit" else "mean relative error"

    def to_json(self) -> dict[str, Any]:
        """Plain values in full precision: law, n, parameters, ci, objective, identifiable, warnings, then more."""
        fit, problem = self.fit, self.fit.problem
        none = (None, None)
        left_out = {one.column: _but(asdict(one), "column", "observed", "predicted") for one in self.left_out}
        return {
            "law": fit.law.name,
            "n": fit.n,
            "parameters": dict(fit.params),
            "ci": {name: list(self.bootstrap.interval(name) or none) for name in fit.params},
            "objective": fit.objective,
            "identifiable": self.identifiable,
            "warnings": [*(f"not identifiable: {doubt}" for doubt in self.doubts), *self.warnings],
            "name": self.name,
            "formula": fit.law.formula,
            "link": fit.law.link,
            "loss": problem.loss,
            "delta": problem.delta if problem.loss == "huber" else None,
            "se": {name: self.bootstrap.se(name) for name in fit.params},
            "bootstrap": {
                "resamples": len(self.bootstrap.matrix), "level": LEVEL, "seed": self.bootstrap.seed,
                "failed": self.bootstrap.failed, "on_bound": self.bootstrap.on_bound,
            },
            "starts": {"kept": len(fit.starts), "at_best": fit.at_best, "gradient": fit.gradient},
            "condition": self.condition if np.isfinite(self.condition) else None,
            "residuals": {**checks.described(self.residuals), "values": fit.residuals.tolist()},
            "quality": self.quality,
            "extrapolation": left_out,
            **self.extra,
        }  # fmt: skip

    def row(self) -> dict[str, Any]:
        """What ``compare`` ranks."""
        errors = {one.column: one.error for one in self.left_out}
        space = "accuracy" if self.fit.problem.loss == "binomial" else self.fit.law.link
        own = {"name": self.name, "space": space, "n": self.fit.n, "k": self.fit.k, "objective": self.fit.objective}
        return {**own, "left_out": errors, **self.quality, "identifiable": self.identifiable}


def analyse(
    points: DataFrame,
    law: Law,
    settings: Settings | None = None,
    *,
    name: str = "",
    weights: Array | None = None,
    drop_by: Mapping[str, Array] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Fits ``law`` to ``points`` (as ``fit`` takes them) and judges it.

    ``drop_by``: name -> (rows,) whose highest values are left out to test the extrapolation; None: the law's
    variables. UserError as for ``fit``.
    """
    settings = settings or Settings()
    options: dict[str, Any] = {
        "delta": settings.delta, "loss": settings.loss, "keep": settings.keep, "clip": settings.clip,
    }  # fmt: skip

    def refit(rows: Array) -> Fit:
        chosen = None if weights is None else weights[rows]
        return fit(points[rows], law, weights=chosen, **options)

    fitted = fit(points, law, weights=weights, **options)
    bootstrap = resample(fitted, settings.bootstrap, settings.seed, progress)
    tests = checks.residual_tests(fitted)
    left_out = []
    if settings.drop_highest:
        columns = drop_by or {one: points[one].to_numpy(dtype=np.float64) for one in law.numeric}
        left_out = [
            compare.leave_out(points, law, refit, one, values, settings.drop_highest) for one, values in columns.items()
        ]
    warnings = checks.warnings(fitted, bootstrap, tests)
    warnings += [f"no extrapolation error for {one.column}: {one.reason}" for one in left_out if one.reason]
    extra: dict[str, Any] = {}
    if fitted.problem.law.link == "logit":
        extra["clip"] = settings.clip
    if checks.contains_zero(fitted, bootstrap) and law.floor:
        extra |= _without_floor(points, law, {**options, "weights": weights})
    if {"alpha", "beta", "A", "B"} <= set(fitted.params):
        extra["allocation"] = _allocation(fitted, bootstrap)
    doubts = checks.doubts(fitted, bootstrap)
    return Result(
        name or law.name, fitted, points, bootstrap, tests, checks.condition(fitted), doubts, warnings,
        compare.quality(fitted), left_out, extra,
    )  # fmt: skip


def _without_floor(points: DataFrame, law: Law, options: Mapping[str, Any]) -> dict[str, Any]:
    """The fit with the floor taken to be 0, beside the one that cannot tell it from 0."""
    without = fit(points, law, fixed={str(law.floor): 0.0}, **options)
    found = {"parameters": without.params, "objective": without.objective, **compare.quality(without)}
    return {f"with_{law.floor}_0": found}


def _allocation(fitted: Fit, bootstrap: Bootstrap) -> dict[str, Any]:
    """The share ``a`` of a compute budget's logarithm that goes to parameters, and the best tokens per parameter for
    budgets from the smallest fitted run to ten times the largest, with 80% bands."""
    size = fitted.law.numeric[0]
    problem = fitted.problem
    flops = 6 * problem.x[size] * problem.x["D"] * np.exp(problem.logs[size] + problem.logs["D"])
    budgets = np.geomspace(flops.min(), 10 * flops.max(), _BUDGETS)
    a, n, d = allocation(fitted.params, budgets)
    rows = bootstrap.matrix[np.isfinite(bootstrap.matrix).all(axis=1)].tolist()
    draws = [allocation(dict(zip(bootstrap.names, row, strict=True)), budgets) for row in rows]
    band: Sequence[Any] = (None, None)
    ratios: list[Sequence[Any]] = [(None, None)] * len(budgets)
    if draws:
        band = bootstrap.interval_of(np.array([one[0] for one in draws]), _ALLOCATION_LEVEL)
        of_budget = np.stack([one[2] / one[1] for one in draws]).T
        ratios = [bootstrap.interval_of(column, _ALLOCATION_LEVEL) for column in of_budget]
    tokens = [
        {"flops": float(c), "tokens_per_parameter": float(best), "low": low, "high": high}
        for c, best, (low, high) in zip(budgets, d / n, ratios, strict=True)
    ]
    return {"a": a, "low": band[0], "high": band[1], "level": _ALLOCATION_LEVEL, "budgets": tokens}


def compared(results: Sequence[Result]) -> dict[str, Any]:
    """The comparison of several results in one table: see ``compare.compare``."""
    return compare.compare([result.row() for result in results])


def _but(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in names}
