"""The picture of fits: the curve with its band above, the residuals below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsebench.analysis.laws.bootstrap import predict
from sparsebench.analysis.laws.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

SUFFIXES = (".png", ".pdf", ".svg")
# Okabe-Ito, readable in every kind of colour vision; black for the data, grey for what is not singled out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73")
_GREY, _BEYOND, _STEPS = "#999999", 2.0, 60  # a curve goes on by a factor of 2, in 60 steps


def draw(results: Sequence[Result], *files: Path) -> None:
    """One pair of rows a result: value against each variable and predicted against observed; below, residual against
    each variable and their normal quantiles. Excluded rows are hollow, left-out ones crosses, extrapolation hatched.

    Each file's format is that of its suffix, one of SUFFIXES.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = max(len(result.fit.law.numeric) for result in results) + 1
    figure = Figure(figsize=(3.4 * across, 4.6 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 * len(results), across, squeeze=False)
    for at, result in enumerate(results):
        _draw_one(result, axes[2 * at], axes[2 * at + 1])
    for file in files:
        figure.savefig(file, dpi=200)


def _draw_one(result: Result, above: Sequence[Axes], below: Sequence[Axes]) -> None:
    names = result.fit.law.numeric
    for name, upper, lower in zip(names, above, below, strict=False):
        _curves(result, name, upper)
        _residuals(result, name, lower)
    _identity(result, above[len(names)])
    _quantiles(result, below[len(names)])
    for spare in (*above[len(names) + 1 :], *below[len(names) + 1 :]):
        spare.axis("off")
    above[0].set_title(f"{result.name}: {result.fit.law.formula}", fontsize=8, loc="left")


def _curves(result: Result, name: str, axes: Axes) -> None:
    """All points in grey; up to three settings of the other variables in colour, with their curve and band."""
    points, law = result.points, result.fit.law
    axes.scatter(points[name], points["value"], s=10, color=_GREY)
    if result.excluded is not None:
        axes.scatter(result.excluded[name], result.excluded["value"], s=14, facecolors="none", edgecolors="black")
    others = [one for one in law.variables if one != name]
    settings = points[others].drop_duplicates().sort_values(others) if others else points.head(1)[[]]
    chosen = sorted({0, len(settings) // 2, len(settings) - 1})
    x = np.geomspace(points[name].min(), points[name].max() * _BEYOND, _STEPS)
    for colour, at in zip(_COLOURS, chosen, strict=False):
        setting = settings.iloc[at]
        _curve(result, name, axes, colour, setting, x)
        own = np.logical_and.reduce([points[one] == setting[one] for one in others]) if others else np.array(True)
        rows = points[np.broadcast_to(own, len(points))]
        axes.scatter(rows[name], rows["value"], s=14, color=colour, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale({"log": "log"}.get(law.link, "linear"))
    axes.set_xlabel(f"{name} ({law.variables[name]})", fontsize=7)
    axes.set_ylabel("value", fontsize=7)
    if others:
        axes.legend(fontsize=6)
    axes.tick_params(labelsize=6, which="both")


def _curve(result: Result, name: str, axes: Axes, colour: str, setting: Any, x: Any) -> None:
    from pandas import DataFrame

    grid = DataFrame({name: x, **{one: [setting[one]] * len(x) for one in setting.index}})
    band = "mean" if result.bootstrap.usable else None
    found: DataFrame = predict(result.fit, grid, result.bootstrap, band)
    label = ", ".join(f"{one} = {_short(setting[one])}" for one in setting.index)
    axes.plot(x, found["value"], color=colour, linewidth=1, label=label)
    if band:
        beyond = found["outside"].to_numpy()
        low, high = found["low"], found["high"]
        axes.fill_between(x, low, high, where=~beyond, color=colour, alpha=0.2, linewidth=0)
        axes.fill_between(x, low, high, where=beyond, facecolor="none", edgecolor=colour, alpha=0.5, hatch="////")


def _residuals(result: Result, name: str, axes: Axes) -> None:
    rho, p = result.residuals.trends[name]
    axes.axhline(0, color="black", linewidth=0.8)
    axes.scatter(result.points[name], result.fit.residuals, s=10, color=_COLOURS[0])
    axes.set_xscale("log")
    axes.set_xlabel(f"{name}   Spearman {rho:.2f}, p {p:.2g}", fontsize=7)
    space = "accuracy" if result.fit.problem.loss == "binomial" else result.fit.law.link
    axes.set_ylabel(f"residual ({space}), predicted - observed", fontsize=7)
    axes.tick_params(labelsize=6, which="both")


def _identity(result: Result, axes: Axes) -> None:
    """Predicted against observed; crosses where the row was left out of the fit that predicts it."""
    observed, fitted = result.fit.problem.y, result.fit.fitted()
    axes.scatter(observed, fitted, s=10, color=_COLOURS[0], label="fitted")
    for colour, one in zip(_COLOURS[1:], [one for one in result.left_out if one.observed], strict=False):
        axes.scatter(one.observed, one.predicted, s=22, marker="x", color=colour, label=f"without highest {one.column}")
    ends = [min(observed.min(), fitted.min()), max(observed.max(), fitted.max())]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    if result.fit.law.link == "log":
        axes.set(xscale="log", yscale="log")
    axes.set_xlabel("observed", fontsize=7)
    axes.set_ylabel("predicted", fontsize=7)
    axes.legend(fontsize=6)
    axes.tick_params(labelsize=6, which="both")


def _quantiles(result: Result, axes: Axes) -> None:
    from scipy.stats import norm

    r = np.sort(result.fit.residuals)
    normal = norm.ppf((np.arange(len(r)) + 0.5) / len(r))
    axes.scatter(normal, r, s=10, color=_COLOURS[0])
    axes.plot(normal, r.mean() + r.std() * normal, color="black", linewidth=0.8)
    tests = result.residuals
    axes.set_xlabel(
        f"normal quantile   mean {tests.mean:.2g}, {tests.positive}/{tests.n} positive, p {tests.sign_p:.2g}",
        fontsize=7,
    )
    axes.set_ylabel("residual", fontsize=7)
    axes.tick_params(labelsize=6)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
