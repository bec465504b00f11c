"""Figures about costs: sizes at one cost, milliseconds with their speed-up, and laws side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsebench.reports.crossings import best, break_even, sizes
from sparsebench.reports.data import DENSE
from sparsebench.reports.figures import Drawn, Mark, blank, cost_axis
from sparsebench.reports.style import BLACK, COLOURS, COLUMN, GREY, MARKERS, RATIO, Look

if TYPE_CHECKING:
    from pandas import DataFrame


def iso_cost(points: DataFrame, crossed: DataFrame, cost: str, label: str) -> Drawn:
    """The best quality of each size at every cost it reaches, one line a size; squares: dense. A vertical line with
    a band: where two neighbouring sizes change places, with its 95% interval."""
    names = sizes(points, cost)
    drawn, axes = blank(COLUMN, COLUMN * RATIO + 0.55)
    low, high = _limits(points)
    for at, name in enumerate(names):
        colour = COLOURS[at % len(COLOURS)]
        costs, quality = best(points, name, cost)
        axes.plot(costs, quality, color=colour, label=name)
        own = points[(points["model"] == name) & points["quality"].between(low, high)]  # others would not be drawn
        for marker, rows in (("s", own[own["method"] == DENSE]), ("o", own[own["method"] != DENSE])):
            marks = [
                Mark(
                    f"{row['method']} at {row['achieved']:.3f} of {name}: {row['score']:.4g} at {row[cost]:,.6g}",
                    row["run_ids"][0],
                )
                for row in rows.to_dict("records")
            ]
            axes.plot(
                rows[cost], rows["quality"], linestyle="none", marker=marker, color=colour,
                alpha=0.6, gid=drawn.add(name, marks),
            )  # fmt: skip
    for row in crossed[crossed["cost"].notna()].to_dict("records"):
        axes.axvline(row["cost"], color=GREY, linewidth=0.7, dashes=(3, 2))
        if row["low"] < row["high"]:
            axes.axvspan(row["low"], row["high"], color=GREY, alpha=0.12, linewidth=0)
    cost_axis(axes, points[cost])
    logged = (points["metric"] == "perplexity").all()
    axes.set_xlabel(f"{label} (lower is better)")
    axes.set_ylabel("-log perplexity (higher is better)" if logged else f"{points['metric'].iloc[0]} (quality)")
    axes.set_ylim(low, high)
    drawn.figure.legend(loc="outside lower center", ncols=min(3, len(names)))
    return drawn


def _limits(points: DataFrame) -> tuple[float, float]:
    """Of the axis of quality: all points of shares; else three times what lies between the dense models, as sparse
    ones may be broken by any amount."""
    if points["quality"].between(0, 1).all():
        room = 0.05 * float(np.ptp(points["quality"])) or 0.05
        return float(points["quality"].min()) - room, float(points["quality"].max()) + room
    dense, best_one = points.loc[points["method"] == DENSE, "quality"], float(points["quality"].max())
    span = float(dense.max() - dense.min()) or abs(float(dense.max())) or 1.0
    return max(best_one - 3 * span, float(points["quality"].min()) - 0.05 * span), best_one + 0.1 * span


def latency(timed: DataFrame, looks: Mapping[str, Look]) -> Drawn:
    """Of one model and phase: milliseconds over achieved sparsity, on the right axis the speed-up over dense (a
    dashed line: what the bound on its cost allows). A vertical tick: the sparsity from which it pays."""
    names = [name for name in looks if (timed["method"] == name).any()]
    drawn, axes = blank(COLUMN, COLUMN * RATIO + 0.45 + 0.15 * -(-len(names) // 3))
    right = axes.twinx()
    right.grid(visible=False)
    right.spines["right"].set_visible(True)
    for name in names:
        own = timed[timed["method"] == name].sort_values("achieved")
        look = looks[name]
        style: dict[str, Any] = {"color": look.colour, "marker": look.marker}
        tips = [
            Mark(
                f"{name} at {row['achieved']:.3f}: {row['ms']:.3g} ms, dense {row['dense_ms']:.3g} ms, "
                f"{row['speedup']:.2f}x (bound {row['theoretical']:.2f}x)"
            )
            for row in own.to_dict("records")
        ]
        axes.plot(own["achieved"], own["ms"], linestyle=look.dash, label=name, gid=drawn.add(name, tips), **style)
        right.plot(own["achieved"], own["theoretical"], color=look.colour, linewidth=0.8, dashes=(2, 2))
        right.plot(own["achieved"], own["speedup"], color=look.colour, linewidth=0.6, alpha=0.6)
        at = break_even(own)
        if np.isfinite(at) and at > 0:
            axes.plot([at], [np.interp(at, own["achieved"], own["ms"])], marker="|", markersize=11, color=look.colour)
    axes.axhline(float(timed["dense_ms"].mean()), color=BLACK, linewidth=0.8, dashes=(3, 2))
    axes.set_xlim(-0.02, 1.0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("achieved sparsity")
    axes.set_ylabel("milliseconds (lower is better)")
    right.set_ylabel("speed-up; dashed: its bound")
    drawn.figure.legend(loc="outside lower center", ncols=min(3, len(names)))
    return drawn


def law_comparison(errors: Sequence[Mapping[str, Any]], measure: str) -> Drawn:
    """The error of each law on what was left out, by what was left out. ``errors``: rows of law, left_out, error, all
    of one ``measure``, which the axis names."""
    laws = list(dict.fromkeys(str(one["law"]) for one in errors))
    kinds = list(dict.fromkeys(str(one["left_out"]) for one in errors))
    drawn, axes = blank(COLUMN, 0.9 + 0.3 * len(laws))
    for at, kind in enumerate(kinds):
        own = [one for one in errors if one["left_out"] == kind]
        tips = [Mark(f"{one['law']} without the highest {kind}: {measure} {one['error']:.3g}") for one in own]
        axes.plot(
            [one["error"] for one in own], [laws.index(str(one["law"])) for one in own], linestyle="none",
            marker=MARKERS[at % len(MARKERS)], color=COLOURS[at % len(COLOURS)], label=kind, gid=drawn.add(kind, tips),
        )  # fmt: skip
    cost_axis(axes, np.array([one["error"] for one in errors]))
    axes.set_yticks(range(len(laws)), laws)
    axes.set_ylim(-0.6, len(laws) - 0.4)
    drawn.figure.supxlabel(f"{measure} (lower is better)", fontsize=8)  # the names of laws leave the axis little room
    drawn.figure.legend(loc="outside upper center", ncols=min(3, len(kinds)), title="left out: the highest")
    return drawn
