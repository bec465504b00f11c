"""The log-linear law of The Sparse Frontier fitted to a sweep: accuracy over size, length and compression, one fit for
each phase, and what it predicts of a length, size or compression that it was not fitted to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsebench.analysis.laws import heldout, registry
from sparsebench.analysis.laws.compare import LeftOut
from sparsebench.analysis.laws.result import Result, Settings, analyse
from sparsebench.errors import UserError
from sparsebench.reports.data import DENSE, SweepData
from sparsebench.reports.facts import parameters

if TYPE_CHECKING:
    from pandas import DataFrame

AXES = {"L": "length", "N": "size", "compression": "compression"}
_LEAST = {"N": 2, "L": 2, "compression": 3}  # different values below which nothing is fitted
_RESAMPLES = 200
_SHARE = ("score", "acc", "accuracy")  # metrics between 0 and 1
LOSSES = {"binomial": "binomial", "ols": "the paper's recipe"}


def points(sweep: SweepData, counted: DataFrame) -> dict[str, DataFrame]:
    """Phase (``prefill``, ``decode``) -> its runs as the law's columns: N, L, compression, task, value, method.

    The phase is that of the methods; the dense runs of the same protocol are among them, the naive baselines are not.
    """
    rows = counted[counted["metric"].isin(_SHARE)]
    if rows.empty or "task.length" not in rows:
        return {}
    declared = sweep.workspace.catalogue.found["method"]
    phase = {name: "prefill" if declared[name].phase == "prefill" else "decode" for name in declared}
    protocol = rows["task.protocol"] if "task.protocol" in rows else rows["task"].map(lambda _: "")
    rows = rows.assign(
        N=parameters(rows), L=rows["task.length"], value=rows["score"], protocol=protocol,
        compression=1 / (1 - rows["achieved"].clip(0, 0.999)), phase=rows["method"].map(phase),
    )  # fmt: skip
    sparse = rows[(rows["method"] != DENSE) & ~rows["method_label"].isin(sweep.naive)]
    found = {}
    for name, own in sparse.groupby("phase", sort=False):
        dense = rows[(rows["method"] == DENSE) & rows["protocol"].isin(own["protocol"])]
        table = rows.loc[[*dense.index, *own.index], ["N", "L", "compression", "task", "value", "method"]]
        found[str(name)] = table.dropna().reset_index(drop=True)
    return found


def fits(sweep: SweepData, counted: DataFrame) -> tuple[list[Result], list[str]]:
    """The law for each phase by both estimators, and why there is none."""
    law = registry.get("frontier")
    found: list[Result] = []
    reasons: list[str] = []
    for phase, rows in points(sweep, counted).items():
        counts = {name: rows[name].round(1).nunique() for name in _LEAST}
        few = [f"{AXES[name]} {counts[name]} of {least}" for name, least in _LEAST.items() if counts[name] < least]
        if few:
            reasons.append(f"frontier {phase}: too few different values of {', '.join(few)}")
            continue
        for loss in LOSSES:
            settings = Settings(loss=loss, bootstrap=_RESAMPLES)
            try:
                result = analyse(rows, law, settings, name=f"frontier {phase} {loss}", drop_by=_axes(rows))
            except UserError as error:
                reasons.append(f"frontier {phase} {loss}: {error}")
                continue
            found.append(replace(result, extra={**result.extra, "heldout": _slices(result)}))
    return found, reasons


def _axes(rows: DataFrame) -> dict[str, Any]:
    """What the highest values are left out of. One requested level leads to slightly different compressions, which are
    left out together: they are taken to the nearest half power of two."""
    halves = np.round(2 * np.log2(rows["compression"].to_numpy(float))) / 2
    return {"L": rows["L"].to_numpy(float), "N": rows["N"].to_numpy(float), "compression": 2**halves}


def _held(result: Result) -> Iterator[tuple[LeftOut, list[str]]]:
    """Each axis that could be held out, under its name, with the task of every row that was."""
    axes, names = _axes(result.points), result.points["task"].to_numpy(str)
    for left in result.left_out:
        if left.lowest is not None and left.observed:
            tasks = names[axes[left.column] >= left.lowest]
            yield replace(left, column=AXES[left.column]), tasks.tolist()


def _slices(result: Result) -> list[dict[str, Any]]:
    return [row for left, tasks in _held(result) for row in heldout.by_category(left, tasks)]


def not_held(results: list[Result]) -> list[str]:
    """A sentence for every axis that could not be held out, and why; with the names of the fits where it is not so of
    all of them."""
    found: dict[str, list[str]] = {}
    for one in results:
        for left in one.left_out:
            if left.error is None:
                said = f"{AXES[left.column].capitalize()} is not held out, because {left.reason}"
                found.setdefault(said, []).append(one.name)
    return [
        f"{said}." if len(names) == len(results) else f"{said} ({', '.join(names)})." for said, names in found.items()
    ]


def table(results: list[Result]) -> DataFrame:
    """The held-out slices of all fits: fit, left_out, lowest, task, n, r2, spearman, mae."""
    from pandas import DataFrame

    rows = [{"fit": one.name, **row} for one in results for row in one.extra.get("heldout", ())]
    return DataFrame(rows, columns=["fit", "left_out", "lowest", "task", "n", "r2", "spearman", "mae"])


def predictions(result: Result) -> DataFrame:
    """Every row that was left out, observed and predicted: left_out, task, observed, predicted."""
    from pandas import DataFrame

    found = [
        {"left_out": left.column, "task": task, "observed": seen, "predicted": said}
        for left, tasks in _held(result)
        for task, seen, said in zip(tasks, left.observed, left.predicted, strict=True)
    ]
    return DataFrame(found, columns=["left_out", "task", "observed", "predicted"])
