"""How good a law is, and which of several is better: by extrapolation first, then by AICc, in-sample R2 last."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsebench.analysis.laws.base import LINKS, Array, Columns, Law
from sparsebench.analysis.laws.estimate import Fit
from sparsebench.errors import UserError

if TYPE_CHECKING:
    from pandas import DataFrame

_EXACT = 1e-15  # residuals are never taken to be smaller: their logarithm is in AICc


@dataclass(frozen=True)
class LeftOut:
    """A refit without the highest values of one column. ``lowest``: the lowest value left out; ``n``: how many rows
    were; ``error``: mean relative error on them (mean absolute for accuracies), None with the ``reason`` why there
    is none; ``observed``, ``predicted``: (n,)."""

    column: str
    lowest: float | None
    n: int
    error: float | None
    reason: str = ""
    observed: tuple[float, ...] = ()
    predicted: tuple[float, ...] = ()


def error(law: Law, observed: Array, predicted: Array) -> float:
    """Mean relative error; mean absolute error for accuracies, whose relative error has no bound near 0."""
    distance = np.abs(predicted - observed)
    return float(np.mean(distance if law.link == "logit" else distance / np.maximum(np.abs(observed), 1e-12)))


def leave_out(
    points: DataFrame, law: Law, refit: Callable[[Array], Fit], column: str, values: Array, k: int
) -> LeftOut:
    """Refits without the rows of the ``k`` highest distinct ``values`` (rows,) and predicts them.

    ``column``: what the values are called; ``refit``: fits the rows of a mask, (rows,) bool, with the options of the
    fit that is judged. What one remaining value of a variable says of it is nothing, however well the rest fits: then
    there is a reason in place of an error.
    """
    levels = np.unique(values)
    if len(levels) <= k:
        return LeftOut(column, None, 0, None, f"{len(levels)} distinct values, {k} cannot be left out")
    held = values >= levels[-k]
    lowest, count = float(levels[-k]), int(held.sum())
    for name in law.numeric:
        own = values if name == column else points[name].to_numpy(dtype=np.float64)
        if len(np.unique(own)) > 1 and len(left := np.unique(own[~held])) == 1:
            why = f"only {name} = {left[0]:.6g} is left, which does not determine what {name} does"
            return LeftOut(column, lowest, count, None, why)
    try:
        fit = refit(~held)
    except UserError as problem:
        return LeftOut(column, lowest, count, None, str(problem))
    x: Columns = {
        name: points[name].to_numpy(dtype=str if name in law.categories else np.float64)[held] for name in law.variables
    }
    unseen = [one for name in law.categories for one in sorted({*x[name]} - {*fit.problem.x[name]})]
    if unseen:
        return LeftOut(column, lowest, count, None, f"{unseen[0]} is only among the rows left out")
    observed = points["value"].to_numpy(dtype=np.float64)[held]
    predicted = LINKS[law.link].back(fit.linked(x))
    return LeftOut(
        column, lowest, count, error(law, observed, predicted), "", tuple(observed.tolist()), tuple(predicted.tolist())
    )


def aicc(residuals: Array, parameters: int) -> tuple[float | None, float | None]:
    """AICc under a Laplace and under a Gaussian likelihood of the residuals, the scale counted as a parameter:
    2k + 2n ln(2b) + 2n + 2k(k+1)/(n-k-1) with b = mean |r|. None when n <= k + 1."""
    n, k = len(residuals), parameters + 1
    if n <= k + 1:
        return None, None
    penalty = 2 * k + 2 * k * (k + 1) / (n - k - 1)
    b = max(float(np.mean(np.abs(residuals))), _EXACT)
    variance = max(float(np.mean(residuals**2)), _EXACT**2)
    return penalty + 2 * n * math.log(2 * b) + 2 * n, penalty + n * math.log(2 * math.pi * variance) + n


def quality(fit: Fit) -> dict[str, float | None]:
    """error (mean relative, or absolute for accuracies), aicc_laplace, aicc_gaussian, r2 in the value's space."""
    laplace, gaussian = aicc(fit.residuals, fit.k)
    observed, fitted = fit.problem.y, fit.fitted()
    total = float(np.sum((observed - observed.mean()) ** 2))
    return {
        "error": error(fit.law, observed, fitted),
        "aicc_laplace": laplace,
        "aicc_gaussian": gaussian,
        "r2": 1 - float(np.sum((observed - fitted) ** 2)) / total if total > 0 else None,
    }


def compare(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ranks fits. Each row: name, space (of its residuals), n, k, error, aicc_laplace, aicc_gaussian, left_out
    ({column: error}), r2.

    Returns ``rows``, best extrapolation first where all have one, ``by_extrapolation`` and ``by_aicc`` (names in
    order; the latter ``inconclusive`` when the two forms of AICc rank differently or the residuals are not of one
    space and the same rows), and ``note``, why.
    """
    extrapolated = {str(row["name"]): _mean(row["left_out"]) for row in rows}
    complete = all(value is not None for value in extrapolated.values())
    by_extrapolation = sorted(extrapolated, key=lambda name: extrapolated[name] or 0.0) if complete else []
    order: list[str] | str = "inconclusive"
    note = ""
    if len({(row["space"], row["n"]) for row in rows}) > 1:
        note = "AICc compares residuals of one space and the same rows only"
    elif any(row["aicc_laplace"] is None for row in rows):
        note = "too few rows for AICc"
    else:
        orders = [
            [str(row["name"]) for row in sorted(rows, key=lambda row: row[form])]
            for form in ("aicc_laplace", "aicc_gaussian")
        ]
        if orders[0] == orders[1]:
            order = orders[0]
        else:
            note = "the Laplace and the Gaussian AICc rank differently"
    ranked = sorted(rows, key=lambda row: by_extrapolation.index(str(row["name"]))) if complete else list(rows)
    return {"rows": ranked, "by_extrapolation": by_extrapolation, "by_aicc": order, "note": note}


def _mean(errors: Mapping[str, float | None]) -> float | None:
    known = [value for value in errors.values() if value is not None]
    return sum(known) / len(known) if known and len(known) == len(errors) else None
