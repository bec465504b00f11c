"""Whether the data determine the law: identifiability, and what the residuals say of its form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsebench.analysis.laws.base import Array
from sparsebench.analysis.laws.bootstrap import Bootstrap, on_bound
from sparsebench.analysis.laws.estimate import Fit, near

# The thresholds, chosen on synthetic data (full grid: condition 52; tokens = 20 * parameters: 330 to 2e5).
DISTINCT, CORRELATION, CONDITION = 3, 0.98, 200.0
TREND = 0.01  # p value of a residual trend
_VANISHED = 1e-3  # of a floor's own value: an interval that begins below it contains 0


@dataclass(frozen=True)
class Residuals:
    """``mean``: in link space; ``positive``: how many of ``n``; ``sign_p``: of that by chance; ``trends``: variable ->
    (Spearman correlation, p value)."""

    n: int
    mean: float
    positive: int
    sign_p: float
    trends: dict[str, tuple[float, float]]


def residual_tests(fit: Fit) -> Residuals:
    """Mean, sign test and monotone trends of the residuals. Residuals that are all rounding have no trend."""
    from scipy.stats import binomtest, spearmanr

    r = fit.residuals
    positive, signed = int(np.sum(r > 0)), int(np.sum(r != 0))
    trends = {}
    exact = float(np.max(np.abs(r))) < 1e-9
    for name in fit.law.numeric:
        x = fit.problem.x[name]
        if exact or np.ptp(x) == 0 or np.ptp(r) == 0:
            trends[name] = (0.0, 1.0)
        else:
            found = spearmanr(x, r)
            trends[name] = (float(found.statistic), float(found.pvalue))
    sign = float(binomtest(positive, signed).pvalue) if signed else 1.0
    return Residuals(fit.n, float(np.mean(r)), positive, sign, trends)


def condition(fit: Fit) -> float:
    """The condition number of the curve's Jacobian, its columns of unit length, the variables centred; infinite
    when a parameter has no effect."""
    slopes = fit.problem.slopes(fit.theta)
    lengths = np.linalg.norm(slopes, axis=0)
    if not np.all(np.isfinite(slopes)) or not np.all(lengths > 0):
        return float("inf")
    return float(np.linalg.cond(slopes / lengths))


def doubts(fit: Fit, bootstrap: Bootstrap) -> list[str]:
    """Why the data do not determine the parameters, one sentence each; empty when they do."""
    found = [*_of_design(fit)]
    number = condition(fit)
    if number > CONDITION:
        found.append(f"the parameters are almost collinear: condition number {number:.3g} > {CONDITION:g}")
    for name, parameter in fit.law.parameters.items():
        span = bootstrap.interval(name)
        if parameter.exponent and span and span[1] - span[0] > abs(fit.params[name]):
            found.append(f"{name}: the 95% interval [{span[0]:.4g}, {span[1]:.4g}] is wider than its value")
    found += [f"{name}={fit.params[name]:.6g} lies on its bound" for name in on_bound(fit.problem, fit.theta)]
    found += [*_of_starts(fit, bootstrap)]
    if contains_zero(fit, bootstrap):
        found.append(f"{fit.law.floor}: its interval contains 0; see the fit with {fit.law.floor}=0")
    return found


def contains_zero(fit: Fit, bootstrap: Bootstrap) -> bool:
    """Whether the floor's interval reaches 0 (below a thousandth of its own value)."""
    if fit.law.floor is None or fit.law.floor in fit.problem.fixed:
        return False
    span = bootstrap.interval(fit.law.floor)
    smallest = float(np.min(fit.problem.y))
    value = fit.params[fit.law.floor]
    return value < _VANISHED * smallest or (span is not None and span[0] < _VANISHED * max(value, smallest))


def _of_design(fit: Fit) -> list[str]:
    """What is wrong with where the points lie."""
    x = {name: fit.problem.x[name] for name in fit.law.numeric}
    found = [
        f"{name}: {count} distinct values, fewer than {DISTINCT}"
        for name, column in x.items()
        if (count := distinct(column)) < DISTINCT
    ]
    if fit.n < fit.k + 2:
        found.append(f"{fit.n} rows for {fit.k} parameters, fewer than {fit.k + 2}")
    names = [name for name in x if np.ptp(np.log(x[name])) > 0]
    for at, a in enumerate(names):
        for b in names[at + 1 :]:
            r = float(np.corrcoef(np.log(x[a]), np.log(x[b]))[0, 1])
            if abs(r) > CORRELATION:
                found.append(f"{a} and {b} lie on one line: correlation of their logarithms {r:.4f}")
    return found


def _of_starts(fit: Fit, bootstrap: Bootstrap) -> list[str]:
    """Several minima: most starts end elsewhere, with other parameters."""
    reached = sum(1 for start in fit.starts if near(start["objective"], fit.objective, fit.n, 1e-3))
    if 2 * reached >= len(fit.starts):
        return []
    errors = _errors(fit, bootstrap)
    for name, se in errors.items():
        if any(abs(start["parameters"][name] - fit.params[name]) > se for start in fit.starts):
            return [
                f"only {reached} of {len(fit.starts)} starts reached the best objective, the others differ in {name}"
            ]
    return []


def _errors(fit: Fit, bootstrap: Bootstrap) -> dict[str, float]:
    return {name: se for name in fit.params if (se := bootstrap.se(name)) is not None}


def distinct(column: Array) -> int:
    """How many values differ by more than rounding (a relative 1e-9)."""
    ordered = np.sort(np.log(column))
    return 1 + int(np.sum(np.diff(ordered) > 1e-9))


def warnings(fit: Fit, bootstrap: Bootstrap, tests: Residuals) -> list[str]:
    """What the user should know about the fit beside ``doubts``."""
    found = []
    for name, (rho, p) in tests.trends.items():
        if p < TREND:
            found.append(f"misspecified: the residuals trend with {name} (Spearman {rho:.2f}, p {p:.2g})")
    if tests.sign_p < TREND:
        found.append(f"{tests.positive} of {tests.n} residuals are positive (sign test p {tests.sign_p:.2g})")
    if fit.at_best < len(fit.starts):
        found.append(f"{fit.at_best} of {len(fit.starts)} starts ended in the best minimum")
    if bootstrap.reason and bootstrap.reason != "none was asked for":
        found.append(f"no intervals: {bootstrap.reason}")
    total = len(bootstrap.matrix)
    if bootstrap.failed:
        found.append(f"{bootstrap.failed} of {total} bootstrap refits failed")
    if bootstrap.on_bound:
        found.append(f"{bootstrap.on_bound} of {total} bootstrap refits ended on a bound")
    return found


def described(tests: Residuals) -> dict[str, Any]:
    """The residual tests as plain values."""
    trends = {name: {"spearman": rho, "p": p} for name, (rho, p) in tests.trends.items()}
    return {"mean": tests.mean, "positive": tests.positive, "sign_test_p": tests.sign_p, "trends": trends}
