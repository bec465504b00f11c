"""Per-sample outcomes of runs: read from the store in one pass, and laid out so that runs can be paired."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose, log
from typing import Any

import numpy

from sparsebench.analysis.statistics import Array, Indices, Population, is_bounded, mean
from sparsebench.results.record import decode, leading_run_id
from sparsebench.results.store import Store, no_garbage_collection

Row = Mapping[str, Any]

# The task's primary score -> the per-sample column it is made of; other scores have a column of their own name.
_COLUMNS = {"perplexity": "nll", "accuracy": "correct", "acc": "correct"}
_WINDOW = re.compile(r"window/(\d+)")
_PASSAGE = 10  # consecutive windows
_AGREEMENT = 1e-6  # relative: what rounding may do between a record's score and one recomputed from its samples


class Untested(Exception):
    """Why a claim cannot be tested on what is there, in one line."""


def read(store: Store, kind: str, attempts: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
    """The rows of ``store.details`` for many runs, by run id, in one pass over the shards. ``attempts``: run id
    -> attempt. Memory grows with what was asked for, not with the store."""
    found: dict[str, list[dict[str, Any]]] = {run_id: [] for run_id in attempts}
    writer: dict[str, str] = {}
    doubled: set[str] = set()
    with no_garbage_collection():
        for path in sorted((store.folder / kind).glob("*.jsonl")) if attempts else ():
            with open(path, "rb") as file:
                wanted = (line for line in file if leading_run_id(line) in found and line.endswith(b"\n"))
                for row in decode(wanted):
                    if row and attempts.get(row["run_id"]) == row.get("attempt"):
                        run_id = row["run_id"]
                        if writer.setdefault(run_id, path.name) != path.name:
                            doubled.add(run_id)
                        found[run_id].append(row)
    for run_id in doubled:  # two processes made the same attempt: the store knows whose counts
        found[run_id] = store.details(kind, run_id, attempts[run_id])
    return found


@dataclass(frozen=True)
class Outcomes:
    """One number for each sample of a run. ``ids``: what pairs it (a document; its answers are averaged);
    ``strata``: the tasks of a macro-average; ``clusters``: what samples that are alike
    share, such as the windows of one document."""

    ids: tuple[str, ...]
    strata: tuple[str, ...]
    clusters: tuple[str, ...]
    values: Array


def outcomes(rows: Sequence[Row], column: str) -> Outcomes:
    """The outcomes in ``column``. Untested when there are none or some are missing."""
    if not rows:
        raise Untested("its per-sample outcomes are missing")
    sums: dict[str, list[Any]] = {}
    missing = 0
    for row in rows:
        value = row.get(column)
        if value is None:
            missing += 1
            continue
        task = str(row.get("task") or "")
        name = _document(str(row["sample"]), task)
        cluster = str(row.get("document") or _passage(name))
        known = sums.setdefault(name, [0.0, 0, task, cluster])
        known[0] += float(value)
        known[1] += 1
    if missing:
        which = "none has" if missing == len(rows) else f"{missing} of {len(rows)} lack"
        raise Untested(f"of its per-sample outcomes {which} the column {column!r}")
    values = numpy.array([total / count for total, count, *_ in sums.values()])
    return Outcomes(tuple(sums), tuple(x[2] for x in sums.values()), tuple(x[3] for x in sums.values()), values)


def spent(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of answers with the columns that means over right and over wrong ones are quotients of."""
    return [
        {
            **row,
            "wrong": 1 - row["correct"],
            "tokens_if_correct": row["tokens"] * row["correct"],
            "tokens_if_wrong": row["tokens"] * (1 - row["correct"]),
        }
        for row in rows
    ]


def _document(sample: str, task: str) -> str:
    """``copy/17`` of ``copy/17/2``, the third answer of a document of the task ``copy``; other ids are whole."""
    inside = sample.removeprefix(f"{task}/") if task else ""
    return f"{task}/{inside.split('/')[0]}" if inside and inside != sample and "/" in inside else sample


def _passage(sample: str) -> str:
    """What a window of running text is left out with: neighbours are alike (on the King James text the paired
    differences of adjacent windows correlate by up to 0.5), so ten in a row count as one."""
    window = _WINDOW.fullmatch(sample)
    return f"windows {int(window[1]) // _PASSAGE}" if window else sample


def column_of(kind: str, record: Row) -> tuple[str, float | None]:
    """The per-sample column that a record call of this ``kind`` (nll, acc, score) reads, and what its mean must
    be by the record. Perplexities are read as their logarithm, the mean NLL. Untested when there is none."""
    metric = str(record.get("metric"))
    if kind == "acc" and metric not in ("acc", "accuracy"):
        raise Untested(f"its task {record.get('task')} has no accuracy (its score is {metric})")
    column = "nll" if kind == "nll" else _COLUMNS.get(metric, metric)
    if column == "nll":
        value = record.get("nll")
        if value is None and metric == "perplexity" and record.get(metric):
            value = log(record[metric])
        if value is None:
            raise Untested(f"its task {record.get('task')} has no NLL (its score is {metric})")
        return column, value
    return column, record.get(metric)


def are_shares(column: str, values: Array) -> bool:
    """Whether the outcomes of a per-sample column are shares of right answers: between 0 and 1, and not the NLL or a
    number of tokens, which may happen to be."""
    return column != "nll" and not column.startswith("tokens") and is_bounded(values)


def layout(first: Outcomes, columns: Sequence[tuple[str, Array, float | None]]) -> Population:
    """The population of ``first`` under the average that gives every record's own score from its samples: that
    of its tasks' means, or that of all samples. ``columns``: (run, its values in the order of ``first``, its
    record's score). Untested when neither does: then the samples are not those of the record."""
    strata = _numbered(first.strata)
    one_stratum = numpy.zeros_like(strata)
    problem = None
    for candidate in (
        Population(strata, _numbered(first.clusters)),
        Population(one_stratum, _numbered(first.clusters)),
    ):
        problem = next((found for column in columns if (found := _mismatch(*column, candidate))), None)
        if problem is None:
            return candidate
    raise Untested(str(problem))


def _numbered(names: Sequence[str]) -> Indices:
    """0, 1, ... in order of first appearance, so that every hundredth cluster is spread over the text."""
    known = {name: at for at, name in enumerate(dict.fromkeys(names))}
    return numpy.array([known[name] for name in names], numpy.int64)


def _mismatch(run: str, values: Array, score: float | None, population: Population) -> str | None:
    ones = numpy.ones((1, 1)), numpy.ones((1, population.size))
    found = float(mean(values[None, :], population, *ones)[0])
    if score is None or isclose(found, score, rel_tol=_AGREEMENT, abs_tol=_AGREEMENT):
        return None
    return f"{run}: its per-sample outcomes give {found:.6g}, its record says {score:.6g}"
