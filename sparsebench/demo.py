"""``make demo`` and ``make table``: the trade-off of the first methods on the embedded model, plain and
with outlier features, as a table and a plot. Everything goes through the store, so a second call is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsebench.config import Workspace, runs
from sparsebench.experiment import Experiment
from sparsebench.results.store import Store
from sparsebench.run import store_folder
from sparsebench.terminal import Reporter

Record = dict[str, Any]

MODEL = "tiny_1m"
DEMO = (("magnitude", "wanda"), ("0.3", "0.5", "0.6", "0.7"))
TABLE = (("random", "magnitude", "wanda"), ("0.3", "0.4", "0.5", "0.6", "0.7", "0.8"))
COLOURS = {"dense": "#000000", "random": "#999999", "magnitude": "#0072B2", "wanda": "#D55E00"}
MARKERS = {"random": "v", "magnitude": "s", "wanda": "o"}


def trade_off(methods: Sequence[str], levels: Sequence[str], store: Store) -> list[Record]:
    """The records of dense and of every method x level, on the plain and the outlier model."""
    workspace = Workspace()
    outliers = "model.outliers=false,true"
    todo = runs(workspace, [f"model={MODEL}", "method=dense", outliers], sweep=True)
    grid = [f"model={MODEL}", outliers, f"method={','.join(methods)}", f"sparsity={','.join(levels)}"]
    todo += runs(workspace, grid, sweep=True)
    with Reporter(len(todo)) as reporter:
        experiment = Experiment(workspace, store, reporter.progress)
        records = []
        for run in todo:
            reporter.start(f"{run.label} {run.sparsity if run.sparsity is not None else ''}")
            records.append(experiment.run(run))
    failed = [record for record in records if record["status"] != "ok"]
    if failed:
        raise SystemExit(f"demo: {len(failed)} runs failed, the first with: {failed[0]['error']}")
    return records


def panels(records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """Panel (plain, with outliers) -> method -> its records by achieved sparsity."""
    found: dict[str, dict[str, list[Record]]] = {"plain": {}, "with outlier features": {}}
    for record in records:
        panel = "with outlier features" if record.get("model.outliers") else "plain"
        found[panel].setdefault(record["method"], []).append(record)
    for methods in found.values():
        for group in methods.values():
            group.sort(key=lambda record: record["achieved"])
    return found


def markdown(records: Sequence[Record]) -> str:
    """Perplexity +- standard error, one table per panel, a column per asked sparsity."""
    lines = []
    for panel, methods in panels(records).items():
        levels = sorted({record["sparsity"] for record in records if record["sparsity"] is not None})
        dense = methods["dense"][0]
        lines += [f"{MODEL} {panel}: dense {_value(dense)}", ""]
        lines += ["| method | " + " | ".join(f"{level:g}" for level in levels) + " |"]
        lines += ["|---|" + "---|" * len(levels)]
        for method, group in methods.items():
            if method != "dense":
                cells = {record["sparsity"]: _value(record) for record in group}
                lines.append(f"| {method} | " + " | ".join(cells.get(level, "") for level in levels) + " |")
        lines.append("")
    return "\n".join(lines)


def _value(record: Record) -> str:
    value, error = record["perplexity"], record["perplexity_stderr"]
    return f"{value:.2f} ± {error:.2f}" if value < 100 else f"{value:.0f} ± {error:.0f}"


def plot(records: Sequence[Record], file: Path) -> None:
    """Perplexity against achieved sparsity, one panel plain and one with outlier features."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(1, 2, figsize=(8.2, 3.6), sharey=True, layout="constrained")
    for axis, (panel, methods) in zip(axes, panels(records).items(), strict=True):
        dense = methods["dense"][0]["perplexity"]
        axis.axhline(dense, color=COLOURS["dense"], linestyle="--", linewidth=1)
        axis.annotate(f"dense {dense:.3g}", (0.01, dense), xycoords=("axes fraction", "data"), va="top", fontsize=8)
        for method, group in methods.items():
            if method == "dense":
                continue
            x = [record["achieved"] for record in group]
            y = [record["perplexity"] for record in group]
            error = [1.96 * record["perplexity_stderr"] for record in group]
            style = {"color": COLOURS[method], "marker": MARKERS[method], "markersize": 4, "linewidth": 1.4}
            axis.errorbar(x, y, yerr=error, label=method, capsize=2, **style)
        axis.set(title=f"{MODEL} {panel}", xlabel="achieved sparsity of the linear layers", yscale="log")
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes[0].set_ylabel("perplexity on held-out kjv (lower is better)")
    axes[0].legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=160)
    pyplot.close(figure)


def main(arguments: Sequence[str]) -> int:
    """``demo`` (default) or ``table``; the plot and the CSV go to the folder ``demo/``."""
    from sparsebench.results.view import table

    store = Store(store_folder())
    store.check_writable()
    methods, levels = TABLE if "table" in arguments else DEMO
    records = trade_off(methods, levels, store)
    folder = Path("demo")
    plot(records, folder / "tradeoff.png")
    (folder / "tradeoff.csv").write_text(str(table(records, format="csv")), encoding="utf-8")
    print(markdown(records))
    print(f"plot   {folder / 'tradeoff.png'}\ntable  {folder / 'tradeoff.csv'}\nstore  {store.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
