"""Small multiples: one task over sizes and lengths, safe sparsities as a map, held-out slices of a law."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsebench.reports.data import DENSE
from sparsebench.reports.figures import Drawn, Mark
from sparsebench.reports.style import BLACK, COLOURS, FULL, GREY, MARKERS, SEQUENTIAL, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


def _grid(down: int, across: int, height: float, extra: float) -> tuple[Drawn, Any]:
    """A figure of ``down`` x ``across`` panels, each ``height`` inches high, with ``extra`` inches for the rest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Drawn(Figure(figsize=(FULL, extra + height * down)))
    FigureCanvasAgg(drawn.figure)
    return drawn, drawn.figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)


def tradeoffs(points: DataFrame, looks: Mapping[str, Look]) -> Drawn:
    """Score over achieved sparsity of one task: a row a model, a column a setting, one line a method from the dense
    model on, each with the band of its standard error. Dashed: dense, with its band. Only points that count.

    ``points``: levels of the task (model, setting, method, achieved, score, se, run_ids, metric, better).
    """
    models, settings = list(dict.fromkeys(points["model"])), list(dict.fromkeys(points["setting"]))
    methods = [name for name in looks if name != DENSE and (points["method"] == name).any()]
    legend = -(-(len(methods) + 1) // 5)
    drawn, grid = _grid(len(models), len(settings), 1.3, 0.6 + 0.16 * legend)
    handles: dict[str, Any] = {}
    for row, model in enumerate(models):
        for column, setting in enumerate(settings):
            axes: Axes = grid[row, column]
            here = points[(points["model"] == model) & (points["setting"] == setting) & ~points["hollow"]]
            _panel(drawn, axes, here, {name: looks[name] for name in [DENSE, *methods]}, handles)
            if row == 0:
                axes.set_title(setting, fontsize=7)
            if column == 0:
                axes.set_ylabel(model, fontsize=7)
            if row == len(models) - 1:
                axes.set_xlabel("achieved sparsity")
    grid[0, 0].set_xlim(-0.02, 1.0)
    metric, better = points["metric"].iloc[0], points["better"].iloc[0]
    drawn.figure.supylabel(f"{metric} ({better} is better)", fontsize=8)
    drawn.figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=5, handlelength=2.4)
    return drawn


def _panel(drawn: Drawn, axes: Axes, here: DataFrame, looks: Mapping[str, Look], handles: dict[str, Any]) -> None:
    dense = here[here["method"] == DENSE].head(1)
    for name, look in looks.items():
        own = here[here["method"] == name].sort_values("achieved")
        if own.empty:
            continue
        if name == DENSE:
            score, se = float(own["score"].iloc[0]), float(np.nan_to_num(own["se"].iloc[0]))
            axes.axhspan(score - se, score + se, color=BLACK, alpha=0.08, linewidth=0)
            handles[name] = axes.axhline(score, color=BLACK, linewidth=0.8, dashes=(3, 2))
            continue
        marks = [
            Mark(f"{name} at {row['achieved']:.3f}: {row['score']:.4g} ± {row['se']:.2g}", row["run_ids"][0])
            for row in own.to_dict("records")
        ]
        x = np.concatenate([np.zeros(len(dense)), own["achieved"].to_numpy(float)])
        y = np.concatenate([dense["score"].to_numpy(float), own["score"].to_numpy(float)])
        se = np.nan_to_num(np.concatenate([dense["se"].to_numpy(float), own["se"].to_numpy(float)]))
        axes.fill_between(x, y - se, y + se, color=look.colour, alpha=0.15, linewidth=0)
        (line,) = axes.plot(x, y, color=look.colour, linestyle=look.dash, linewidth=0.9)
        axes.plot(
            own["achieved"], own["score"], linestyle="none", marker=look.marker, markersize=2.8, color=look.colour,
            gid=drawn.add(name, marks),
        )  # fmt: skip
        handles.setdefault(name, line)


def safe_map(safe: DataFrame, looks: Mapping[str, Look]) -> Drawn:
    """The largest safe sparsity of every method (rows, by model) on every task and setting (columns); each cell prints
    the level to rely on above the level up to which no loss was seen, a dash for none. Grey: untested.

    ``safe``: of ``levels.safe``, with columns setting and name (of the task).
    """
    import matplotlib

    tested = safe[safe["n"].notna()]
    methods = [name for name in looks if (tested["method"] == name).any()]
    rows = [(model, name) for model in dict.fromkeys(tested["model"]) for name in methods]
    columns = list(dict.fromkeys(zip(tested["name"], tested["setting"], strict=True)))
    cells = {
        (one["model"], one["method"], one["name"], one["setting"]): (one["non_inferior"], one["not_worse"])
        for one in tested.to_dict("records")
    }
    values = np.array([[cells.get((*row, *column), (np.nan, np.nan)) for column in columns] for row in rows])
    drawn, grid = _grid(1, 1, 0.24 * len(rows), 1.7)
    axes: Axes = grid[0, 0]
    there = np.array([[(*row, *column) in cells for column in columns] for row in rows])
    shown = np.ma.masked_where(~there, np.nan_to_num(values[..., 1]))
    colours = matplotlib.colormaps[SEQUENTIAL].with_extremes(bad="#bbbbbb")
    image = axes.imshow(shown, cmap=colours, vmin=0, vmax=1, aspect="auto")
    for (row, column), here in np.ndenumerate(there):
        if here:
            sure, seen = values[row, column]
            text = f"{_level(sure)} / {_level(seen)}"
            dark = np.nan_to_num(seen) < 0.55
            axes.text(column, row, text, ha="center", va="center", fontsize=5, color="white" if dark else BLACK)
    axes.set_xticks(range(len(columns)), [f"{name}\n{setting}" for name, setting in columns], rotation=90, fontsize=5.5)
    axes.set_yticks(range(len(rows)), [f"{method}, {model}" for model, method in rows], fontsize=6)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    drawn.figure.colorbar(image, ax=axes, label="no loss detected up to", shrink=0.6)
    return drawn


def _level(value: float) -> str:
    return f"{value:.2f}".lstrip("0") if np.isfinite(value) else "-"


def heldout(predicted: DataFrame, title: str) -> Drawn:
    """What a law says of the slices that it was not fitted to: predicted over observed, a panel an axis that was held
    out, one colour a task; on the diagonal the prediction is right. ``predicted``: left_out, task, observed, predicted.
    """
    kinds: Sequence[str] = list(dict.fromkeys(predicted["left_out"]))
    tasks = list(dict.fromkeys(predicted["task"]))
    drawn, grid = _grid(1, max(1, len(kinds)), 1.9, 0.75)
    for axes, kind in zip(grid[0], kinds, strict=False):
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.7, dashes=(3, 2))
        for at, task in enumerate(tasks):
            own = predicted[(predicted["left_out"] == kind) & (predicted["task"] == task)]
            tips = [
                Mark(f"{task}: observed {seen:.3f}, predicted {said:.3f}")
                for seen, said in zip(own["observed"], own["predicted"], strict=True)
            ]
            axes.plot(
                own["observed"], own["predicted"], linestyle="none", marker=MARKERS[at % len(MARKERS)], alpha=0.7,
                color=COLOURS[at % len(COLOURS)], label=task if kind == kinds[0] else None, gid=drawn.add(task, tips),
            )  # fmt: skip
        axes.set_title(f"held out: the highest {kind}", fontsize=7)
        axes.set_xlabel("observed")
    grid[0, 0].set_ylabel("predicted")
    drawn.figure.suptitle(title, fontsize=8)
    drawn.figure.legend(loc="outside lower center", ncols=min(5, len(tasks)))
    return drawn
