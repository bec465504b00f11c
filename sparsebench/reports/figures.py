"""The figures of a report. Each function takes tables that a notebook cell made and returns a ``Drawn``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsebench.reports.data import DENSE
from sparsebench.reports.style import BLACK, COLOURS, COLUMN, DIVERGING, FULL, GREY, MARKERS, RATIO, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

CAP = 50.0  # how many times the lowest perplexity an axis shows
_WIDE = 3.0  # a perplexity range beyond which its axis is logarithmic
_NOT_SQUARE = "oD^vPX*"  # squares are dense models
_TOP = (0.0, 0.5, 0.75, 0.9)  # sparsities that the upper axis names as compression
_LEAST_SPAN = 0.2  # of achieved sparsity, that an axis shows
_MODULES = (*COLOURS, "#444444", "#999933")
VERDICT_COLOURS = {"reproduced": "#009E73", "not reproduced": "#D55E00", "inconclusive": "#E69F00", "untested": GREY}


@dataclass(frozen=True)
class Mark:
    """What hovering over one point says, and the run that it leads to."""

    tip: str
    run_id: str | None = None


@dataclass
class Drawn:
    """A figure with what its points say: ``marks``: id of an artist -> (series, a mark a point)."""

    figure: Figure
    marks: dict[str, tuple[str, list[Mark]]] = field(default_factory=dict)

    def add(self, series: str, marks: Sequence[Mark]) -> str:
        """The id to give to the artist that draws these points."""
        gid = f"points-{len(self.marks)}"
        self.marks[gid] = (series, list(marks))
        return gid


def blank(width: float, height: float) -> tuple[Drawn, Axes]:
    """A figure with one pair of axes that belongs to no window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return Drawn(figure), figure.subplots()


def tradeoff(table: DataFrame, looks: Mapping[str, Look], knees: DataFrame, limits: tuple[float, float]) -> Drawn:
    """Score over achieved sparsity of one model and task, with 95% bars. Dense: dashed line with its band; naive
    baselines grey; hollow: only flagged runs; a ring: the curve's knee by tolerance.

    ``limits``: the y range, shared by the panels of one task.
    """
    sparse = [name for name in looks if name != DENSE and (table["method"] == name).any()]
    across = _legend_columns([DENSE, *sparse])
    drawn, axes = blank(COLUMN, COLUMN * RATIO + 0.5 + 0.15 * -(-(len(sparse) + 1) // across))
    metric, better = table["metric"].iloc[0], table["better"].iloc[0]
    _dense_line(drawn, axes, table[table["method"] == DENSE])
    for name in sparse:
        own = table[table["method"] == name].sort_values("achieved")
        _curve(drawn, axes, own, looks[name], limits)
        _knee_ring(axes, own, knees[knees["method"] == name], looks[name])
    if metric == "perplexity" and limits[1] / max(limits[0], 1e-12) > _WIDE:
        axes.set_yscale("log")
        _plain_ticks(axes, limits)
    axes.set_ylim(*limits)
    axes.set_xlim(-0.02, 1.0)
    axes.set_xlabel("achieved sparsity")
    axes.set_ylabel(f"{metric} ({'lower' if better == 'lower' else 'higher'} is better)")
    _compression(axes)
    drawn.figure.legend(loc="outside lower center", ncols=across, handlelength=2.6, columnspacing=1.2)
    return drawn


def _legend_columns(names: Sequence[str]) -> int:
    return 3 if max(map(len, names)) <= 15 else 2 if max(map(len, names)) <= 26 else 1


def limits(table: DataFrame, naive: Sequence[str] = ()) -> tuple[float, float]:
    """The y range of all points with their bars, with a little room. Perplexities end at CAP times the lowest, and
    naive baselines do not widen their range: beyond, a model is broken whatever the number."""
    unbounded = bool((table["metric"] == "perplexity").all())
    kept = table[~table["method"].isin(naive)] if unbounded else table
    table = kept if len(kept) else table
    ends = table[["ci_low", "score", "ci_high"]].to_numpy(float)
    ends = ends[np.isfinite(ends)]  # an interval may be unknown, or have no end
    low, high = float(ends.min()), float(ends.max())
    if unbounded and low > 0 and high / low > _WIDE:
        high = min(high, CAP * low)
        room = (high / low) ** 0.05
        return low / room, high * room
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _dense_line(drawn: Drawn, axes: Axes, dense: DataFrame) -> None:
    if dense.empty:
        return
    row = dense.iloc[0]
    if np.isfinite(row["ci_low"]):
        axes.axhspan(row["ci_low"], row["ci_high"], color=BLACK, alpha=0.08, linewidth=0)
    axes.axhline(row["score"], color=BLACK, linewidth=1, dashes=(3, 2), label=DENSE)
    gid = drawn.add(DENSE, _marks(dense))
    axes.plot(dense["achieved"], dense["score"], color=BLACK, marker="s", linestyle="none", gid=gid)


def _curve(drawn: Drawn, axes: Axes, own: DataFrame, look: Look, limits: tuple[float, float]) -> None:
    """Line, bars and markers, which answer only where they are inside the limits."""
    name = str(own["method"].iloc[0])
    counted, hollow = own[~own["hollow"]], own[own["hollow"]]
    style: dict[str, Any] = {"color": look.colour, "marker": look.marker}
    axes.plot(
        counted["achieved"], counted["score"], color=look.colour, linestyle=look.dash, gid=drawn.add(name, [])
    )  # fmt: skip
    bars = np.array([counted["score"] - counted["ci_low"], counted["ci_high"] - counted["score"]])
    if np.nan_to_num(bars).any():
        drawn_bars = axes.errorbar(
            counted["achieved"], counted["score"], np.nan_to_num(bars).clip(0),
            fmt="none", ecolor=look.colour, elinewidth=0.6,
        )  # fmt: skip
        drawn_bars.lines[2][0].set_gid(drawn.add(name, []))
    for rows, face in ((counted, look.colour), (hollow, "white")):
        inside = rows[rows["score"].between(*limits)]
        gid = drawn.add(name, _marks(inside))
        axes.plot(inside["achieved"], inside["score"], linestyle="none", markerfacecolor=face, gid=gid, **style)
    axes.plot([], [], linestyle=look.dash, label=name, **style)


def _marks(rows: DataFrame) -> list[Mark]:
    found = []
    for row in rows.to_dict("records"):
        requested = row["requested"]
        asked = f", {requested:g} asked" if np.isfinite(requested) and row["method"] != DENSE else ""
        spread = f" [{row['ci_low']:.4g}, {row['ci_high']:.4g}]" if np.isfinite(row["ci_low"]) else ""
        seeds = f", {row['seeds']} seeds" if row["seeds"] > 1 else ""
        flag = f"; {row['flags']}" if row["flags"] else ""
        said = f"{row['method']}: {row['metric']} {row['score']:.4g}{spread}, sparsity {row['achieved']:.4f}"
        tip = f"{said}{asked}{seeds}{flag}"
        found.append(Mark(tip, row["run_ids"][0]))
    return found


def _knee_ring(axes: Axes, own: DataFrame, knee: DataFrame, look: Look) -> None:
    at = knee["tolerance"].to_numpy(float)[:1]
    here = own[np.isclose(own["achieved"], at[0])] if len(at) and np.isfinite(at[0]) else own[:0]
    axes.plot(
        here["achieved"], here["score"], marker="o", markersize=9, markerfacecolor="none", markeredgewidth=0.7,
        color=look.colour,
    )  # fmt: skip


def _compression(axes: Axes) -> None:
    """The upper axis: how many times fewer values are left."""
    upper = axes.secondary_xaxis("top")
    upper.set_xticks(_TOP, [f"{1 / (1 - s):.3g}x" for s in _TOP])
    upper.tick_params(labelsize=6, length=2)
    upper.set_xlabel("compression", fontsize=6, labelpad=2)
    upper.spines["top"].set_visible(False)


def _plain_ticks(axes: Axes, bounds: tuple[float, float]) -> None:
    """10, 20, 50 ... instead of powers."""
    steps = [1, 2, 5] if bounds[1] / bounds[0] < 1000 else [1]
    ticks = [k * 10.0**e for e in range(-3, 9) for k in steps if bounds[0] <= k * 10.0**e <= bounds[1]]
    if len(ticks) > 1:
        axes.set_yticks(ticks, [f"{one:g}" for one in ticks])
        axes.minorticks_off()


def frontier(points: DataFrame, cost: str, label: str, looks: Mapping[str, Look], limits: tuple[float, float]) -> Drawn:
    """Quality against one cost. Filled: on the front in half of the resamples or more; hollow: in 5% or more; small
    and pale: in fewer. Squares: dense. The front of the means is stepped.

    One colour a model size where there are several, else one a method, as in the other figures.
    """
    models = list(dict.fromkeys(points["model"]))
    by = "model" if len(models) > 1 else "method"
    names = list(dict.fromkeys(points[by]))
    across = _legend_columns(names)
    drawn, axes = blank(COLUMN, COLUMN * RATIO + 0.35 + 0.15 * -(-len(names) // across))
    metric, better = points["metric"].iloc[0], points["better"].iloc[0]
    for at, name in enumerate(names):
        look = (
            looks[name] if by == "method" else Look(COLOURS[at % len(COLOURS)], _NOT_SQUARE[at % len(_NOT_SQUARE)], "-")
        )
        own = points[(points[by] == name) & points["score"].between(*limits)]
        _front_points(drawn, axes, own, cost, str(name), look)
    best = points[points["front"]].sort_values(cost)
    axes.step(best[cost], best["score"], where="post", color=BLACK, linewidth=0.7, zorder=1)
    cost_axis(axes, points[cost])
    if metric == "perplexity" and limits[1] / max(limits[0], 1e-12) > _WIDE:
        axes.set_yscale("log")
        _plain_ticks(axes, limits)
    axes.set_ylim(*limits)
    axes.set_xlabel(f"{label} (lower is better)")
    axes.set_ylabel(f"{metric} ({'lower' if better == 'lower' else 'higher'} is better)")
    drawn.figure.legend(loc="outside lower center", ncols=across, handlelength=1.2, columnspacing=1.2)
    return drawn


def _front_points(drawn: Drawn, axes: Axes, own: DataFrame, cost: str, name: str, look: Look) -> None:
    dense = own["method"] == DENSE
    kinds = [
        ("filled", own["share"] >= 0.5, look.colour, 1.0, 5.0),
        ("hollow", (own["share"] >= 0.05) & (own["share"] < 0.5), "white", 1.0, 5.0),
        ("pale", own["share"] < 0.05, look.colour, 0.35, 3.0),
    ]
    label: str | None = name
    for _, mask, face, alpha, size in kinds:
        for marker, chosen in (("s", own[mask & dense]), (look.marker, own[mask & ~dense])):
            if chosen.empty:
                continue
            marks = [
                Mark(
                    f"{row['method']} at {row['achieved']:.3f} of {row['model']}: {row['score']:.4g} "
                    f"at {row[cost]:,.6g}, "
                    f"on the front in {row['share']:.0%} of resamples",
                    row["run_ids"][0],
                )
                for row in chosen.to_dict("records")
            ]
            gid = drawn.add(name, marks)
            axes.plot(
                chosen[cost], chosen["score"], linestyle="none", marker=marker, color=look.colour,
                markerfacecolor=face, markersize=size, alpha=alpha, label=label, gid=gid,
            )  # fmt: skip
            label = None


def cost_axis(axes: Axes, values: Any) -> None:
    """Plain numbers along the axis, logarithmic where ``values``, all positive, differ enough to need it."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low > _WIDE:
        axes.set_xscale("log")
        steps = (1, 2, 5) if high / low < 300 else (1,)
        axes.set_xticks([k * 10.0**e for e in range(-6, 16) for k in steps if low * 0.9 <= k * 10.0**e <= high * 1.1])
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """``350k``, ``1.2M``: a count with a metric prefix."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g}"


def heat(shares: DataFrame, title: str) -> Drawn:
    """Rows by columns of retained quality, printed in the cells, colours diverging at 1; grey: untested."""
    import matplotlib

    width = FULL if len(shares.columns) > 5 else COLUMN
    labels = [str(name).replace(" ", "\n", 1) for name in shares.columns]  # the setting below the task
    longest = max(len(line) for label in labels for line in label.split("\n"))
    drawn, axes = blank(width, 0.45 + 0.24 * len(shares) + 0.065 * longest)
    values = shares.to_numpy(float)
    span = max(0.1, float(np.nanmax(np.abs(values - 1)))) if np.isfinite(values).any() else 1.0
    colours = matplotlib.colormaps[DIVERGING].with_extremes(bad="#bbbbbb")
    axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=1 - span, vmax=1 + span, aspect="auto")
    axes.set_xticks(range(len(shares.columns)), labels, rotation=90)
    axes.set_yticks(range(len(shares)), list(shares.index))
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = abs(value - 1) > 0.7 * span
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", color="white" if dark else BLACK, fontsize=7
            )
    drawn.figure.suptitle(title, fontsize=8)
    return drawn


def layer_profile(layers: DataFrame, looks: Mapping[str, Look], requested: float) -> Drawn:
    """Achieved sparsity over the block index, one panel a method, one line a module type, the request dashed.

    ``layers``: columns method, block, module, achieved.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = [name for name in looks if (layers["method"] == name).any()]
    across = min(3, len(methods))
    down = -(-len(methods) // across)
    modules = list(dict.fromkeys(layers["module"]))
    width = FULL if across > 1 else COLUMN
    drawn = Drawn(Figure(figsize=(width, 0.55 + 1.45 * down)))
    FigureCanvasAgg(drawn.figure)
    grid = drawn.figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for at, (axes, name) in enumerate(zip(grid.flat, methods, strict=False)):
        own = layers[layers["method"] == name]
        for index, module in enumerate(modules):
            line = own[own["module"] == module].sort_values("block")
            tips = [
                Mark(f"{name}, {module} of block {b}: {a:.3f}")
                for b, a in zip(line["block"], line["achieved"], strict=True)
            ]
            axes.plot(
                line["block"], line["achieved"],
                color=_MODULES[index % len(_MODULES)], marker=MARKERS[index % len(MARKERS)],
                linewidth=0.9, markersize=3, label=module if at == 0 else None, gid=drawn.add(module, tips),
            )  # fmt: skip
        axes.axhline(requested, color=BLACK, linewidth=0.7, dashes=(3, 2))
        axes.set_title(name, loc="left")
        axes.xaxis.get_major_locator().set_params(integer=True)
    middle, span = sum(grid[0, 0].get_ylim()) / 2, np.ptp(grid[0, 0].get_ylim())
    if span < _LEAST_SPAN:  # so that small differences look small
        grid[0, 0].set_ylim(middle - _LEAST_SPAN / 2, middle + _LEAST_SPAN / 2)
    for axes in grid.flat[len(methods) :]:
        axes.axis("off")
    for axes in (grid[-1, at] if at < len(methods) - across * (down - 1) else grid[-2, at] for at in range(across)):
        axes.set_xlabel("block")
        axes.tick_params(labelbottom=True)
    drawn.figure.supylabel("achieved sparsity", fontsize=8)
    drawn.figure.legend(loc="outside lower center", ncols=min(7, len(modules)) if across > 1 else 3)
    return drawn


def verdicts(table: DataFrame) -> Drawn:
    """Each tested claim's effect with its 95% interval, in standard errors of it, coloured by verdict. Right of zero:
    in the claimed direction. Far effects are drawn at the edge, their numbers stand beside."""
    known = np.isfinite(table[["estimate", "low", "high"]].to_numpy(float)).all(axis=1)
    shown = table[known].iloc[::-1].reset_index(drop=True)
    edge = 12.0
    drawn, axes = blank(FULL, 0.75 + 0.22 * len(shown))
    se = ((shown["high"] - shown["low"]) / (2 * 1.96)).replace(0, np.nan)
    for at, row in shown.iterrows():
        unit = se[at] if np.isfinite(se[at]) else 1e-300  # without a spread any effect is infinitely many of them
        low, middle, high = (
            float(np.clip(one / unit, -edge, edge)) for one in (row["low"], row["estimate"], row["high"])
        )
        colour = VERDICT_COLOURS[row["verdict"]]
        axes.plot([low, high], [at, at], color=colour, linewidth=1.2)
        gid = drawn.add(
            row["id"],
            [Mark(f"{row['id']}: {row['verdict']}, {row['estimate']:.4g} [{row['low']:.4g}, {row['high']:.4g}]")],
        )
        axes.plot([middle], [at], marker="o" if row["counts"] else "D", color=colour, gid=gid)
    axes.axvline(0, color=BLACK, linewidth=0.7)
    axes.set_yticks(range(len(shown)), list(shown["id"]))
    axes.set_xlim(-edge * 1.05, edge * 1.05)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.set_xlabel("effect in standard errors (right of 0: as claimed; ±12 is 12 or more)")
    for name, colour in VERDICT_COLOURS.items():
        if (shown["verdict"] == name).any():
            axes.plot([], [], color=colour, marker="o", label=name)
    drawn.figure.legend(loc="outside upper right", ncols=4)
    return drawn


def safe_levels(table: DataFrame, looks: Mapping[str, Look]) -> Drawn:
    """The largest safe sparsity of each method, by both rules: filled, a loss is ruled out; hollow, none was seen."""
    rows = list(table[["model", "task", "method"]].itertuples(index=False, name=None))[::-1]
    several = len({(model, task) for model, task, _ in rows}) > 1
    drawn, axes = blank(FULL if several else COLUMN, 0.8 + 0.2 * len(rows))
    by_row = dict(zip(rows[::-1], table.to_dict("records"), strict=True))
    for at, key in enumerate(rows):
        row, look = by_row[key], looks[key[2]]
        sure, seen = (row[name] if np.isfinite(row[name]) else 0.0 for name in ("non_inferior", "not_worse"))
        axes.plot([0, seen], [at, at], color=look.colour, linewidth=0.8, alpha=0.5)
        for value, face, rule in ((seen, "white", "no loss detected"), (sure, look.colour, "loss ruled out")):
            gid = drawn.add(
                key[2], [Mark(f"{key[2]}, {key[0]}, {key[1]}: {rule} up to {value:.3g} (n = {row['n']:.0f})")]
            )
            axes.plot([value], [at], marker="o", color=look.colour, markerfacecolor=face, gid=gid)
    axes.set_yticks(
        range(len(rows)), [f"{method}, {model}, {task}" if several else method for model, task, method in rows]
    )
    axes.set_xlim(-0.02, 1.0)
    axes.set_xlabel("achieved sparsity (hollow: no loss detected; filled: loss ruled out)")
    return drawn
