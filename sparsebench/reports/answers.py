"""Test-time compute of a sweep: how long answers are at every level, right and wrong ones, and where tasks collapse.

For runs whose samples say what was truncated (``tasks/reasoning``); a task with several kinds of questions is shown
kind by kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsebench.analysis import curves
from sparsebench.reports.data import DENSE, LEVEL, SweepData
from sparsebench.tasks.reasoning import lengths

if TYPE_CHECKING:
    from pandas import DataFrame

_CURVE = ["model", "task", "kind", "method"]


def levels(sweep: SweepData, counted: DataFrame) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Every level and kind of question with the rows of its answers, over all seeds. ``counted``: runs that count."""
    written = {run_id for run_id in counted["run_id"] if "truncated" in next(iter(sweep.samples[run_id]), ())}
    counted = counted[counted["run_id"].isin(written)]
    # cutting a wide table into levels takes long
    counted = counted[[name for name in (*LEVEL, "run_id", "achieved", "task.len_bins") if name in counted]]
    found = []
    for key, level in counted.groupby(LEVEL, dropna=False, sort=False):
        rows = [row for run_id in level["run_id"] for row in sweep.samples[run_id]]
        named = dict(zip(("model", "task", "method", "requested"), key, strict=True))
        named["achieved"] = float(level["achieved"].mean())
        named["bins"] = int(level["task.len_bins"].iloc[0]) if "task.len_bins" in level else lengths.BINS
        for kind in dict.fromkeys(row["task"] for row in rows):
            found.append(({**named, "kind": kind}, [row for row in rows if row["task"] == kind]))
    return found


def spent(found: list[tuple[dict[str, Any], list[dict[str, Any]]]]) -> DataFrame:
    """A row a level and kind: accuracy, mean tokens of an answer, of right and of wrong ones, all over right answers,
    share of answers that were cut, Spearman's rho of length and correctness, n answers."""
    from pandas import DataFrame

    rows = []
    for named, answers in found:
        length, correct = _columns(answers)
        own = lengths.lengths(length, correct)
        rows.append(
            {
                **{name: named[name] for name in (*_CURVE, "requested", "achieved")},
                "accuracy": own.accuracy, "tokens": own.mean, "correct": own.correct, "wrong": own.wrong,
                "per_correct": own.per_correct, "cut": sum(row["truncated"] for row in answers) / own.n,
                "rho": lengths.length_correlation(length, correct), "n": own.n,
            }
        )  # fmt: skip
    return DataFrame(rows)


def by_length(found: list[tuple[dict[str, Any], list[dict[str, Any]]]]) -> DataFrame:
    """Accuracy in bins of equally many answers by length, as many as the task's ``len_bins``: a row a level, kind and
    bin."""
    from pandas import DataFrame

    rows = [
        {**{name: named[name] for name in (*_CURVE, "requested")}, "from": one.low, "to": one.high,
         "accuracy": one.accuracy, "n": one.n}
        for named, answers in found
        for one in lengths.accuracy_by_length(*_columns(answers), named["bins"])
    ]  # fmt: skip
    return DataFrame(rows)


def collapses(table: DataFrame) -> DataFrame:
    """The collapse point of every curve of ``spent``: model, task, kind, method, dense (its accuracy), collapse (empty:
    no level is below half of it) and the largest sparsity that was looked at. Curves without a dense level are none.
    Of each model and method what collapses first comes first."""
    from pandas import DataFrame

    rows = []
    for (model, task, kind), own in table.groupby(_CURVE[:3], sort=False):
        dense = own[own["method"] == DENSE]
        for method, curve in own[own["method"] != DENSE].groupby("method", sort=False) if len(dense) else ():
            sparse = curve[curve["achieved"] > 0]  # nothing is zero in what is only quantised
            if sparse.empty:
                continue
            ordered = sparse.groupby("achieved")["accuracy"].mean()  # by increasing sparsity; patterns may share one
            scores = [float(dense["accuracy"].iloc[0]), *ordered]
            point = curves.collapse([0.0, *ordered.index], scores)
            named = dict(zip(_CURVE, (model, task, kind, method), strict=True))
            rows.append({**named, "dense": scores[0], "collapse": point, "up_to": float(ordered.index[-1])})
    found = DataFrame(rows, columns=[*_CURVE, "dense", "collapse", "up_to"])
    return found.sort_values(["model", "method", "collapse"], kind="stable", ignore_index=True)


def _columns(answers: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [float(row["tokens"]) for row in answers], [float(row["correct"]) for row in answers]
