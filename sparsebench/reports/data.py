"""A sweep as tables: one row a planned run, whatever became of it.

Nothing is left out silently: a run that was planned and not made, failed or missed its sparsity is a row with its
``state`` and ``why``. Records of different versions of a method, task or corpus are never put into one table.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsebench.analysis import ledger, outcomes
from sparsebench.config import Workspace
from sparsebench.errors import UserError, closest
from sparsebench.results import query, view
from sparsebench.results.store import Store
from sparsebench.sweep import spec
from sparsebench.sweep.plan import Plan, newest
from sparsebench.sweep.spec import Sweep

if TYPE_CHECKING:
    from pandas import DataFrame

STATES = ("ok", "flagged", "failed", "lost", "running", "missing")
DENSE = "dense"
LEVEL = ["model_label", "task_label", "method_label", "level"]  # what one point of a curve has alike
# What says the same as another column, or cannot change a result.
_NO_LABEL = ("sparsity", "pattern", "device", "device_map", "batch_size", "rung")


@dataclass(frozen=True)
class SweepData:
    """What a report is made of.

    ``runs``: a DataFrame with one row a planned run in the order of the plan: the planned options under their dotted
    names, the record's columns, and state (one of STATES), why, model_label, task_label, method_label (names with
    the options that vary), level (what was asked for), score, score_se, n (of the task's primary metric), quality
    (higher is better; minus the logarithm for a perplexity) and quality_se. ``records``: the records themselves.
    ``spec``: the sweep's file, None when there is none any more. ``notes``: what a reader must know of the store.
    """

    name: str
    store: Store
    workspace: Workspace
    plan: Plan
    spec: Sweep | None
    runs: DataFrame
    records: list[dict[str, Any]]
    better: Mapping[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def methods(self) -> list[str]:
        """Every method label, in the order of the plan, dense first."""
        labels = list(dict.fromkeys(self.runs["method_label"]))
        return sorted(labels, key=lambda label: label != DENSE)

    @property
    def naive(self) -> list[str]:
        """The labels that the sweep names as baselines, without dense."""
        names = set(self.spec.baselines if self.spec else ()) - {DENSE}
        return [label for label in self.methods if label.split()[0] in names]

    @cached_property
    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """The per-sample outcomes of the runs that count, by run id."""
        return outcomes.read(self.store, "samples", self._attempts(("ok",)))

    def layers(self, run_ids: Iterable[str]) -> DataFrame:
        """The per-layer rows of these runs: run_id, layer, achieved, zeros, total ..."""
        from pandas import DataFrame

        wanted = {key: one for key, one in self._attempts(("ok", "flagged")).items() if key in set(run_ids)}
        rows = outcomes.read(self.store, "layers", wanted)
        return DataFrame([row for run_id in wanted for row in rows[run_id]])

    @property
    def revision(self) -> str:
        """Twelve digits that change when a record does."""
        parts = [f"{one['run_id']} {one['attempt']} {one['status']}" for one in self.records]
        return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:12]

    def _attempts(self, states: Sequence[str]) -> dict[str, int]:
        chosen = self.runs[self.runs["state"].isin(states)]
        return {str(run_id): int(one) for run_id, one in zip(chosen["run_id"], chosen["attempt"], strict=True)}


def load(name: str, store_folder: str | Path, config_dir: str | Path | None = None) -> SweepData:
    """The newest plan of that name with its records.

    UserError when there is no such plan, when nothing of it is finished, and when its records were made by
    different versions of a method, task, model or corpus.
    """
    workspace = Workspace(Path(config_dir) if config_dir else None)
    store = Store(Path(store_folder).expanduser())
    plan = newest(store.folder, name)
    if plan is None:
        kept = sorted(one.name for one in (store.folder / "plans").glob("*") if one.is_dir())
        hint = closest(name, kept) if kept else f"; start it with: sweep {name}"
        raise UserError(f"report {name}: store={store.folder} has no plan of that name{hint}")
    found = query.planned(store, {run.run_id: run.point for run in plan.runs})
    records, by_id = found.records, {one["run_id"]: one for one in found.records}
    finished = [one for one in records if one["status"] == "ok"]
    if not finished:
        states = ", ".join(f"{key} {count}" for key, count in _counts(plan, by_id).items() if count)
        raise UserError(f"report {name}: none of its {len(plan.runs)} runs is finished ({states}); see: status {name}")
    _check_versions(name, store, finished)
    better = {one.metric: one.better for one in workspace.catalogue.found["task"].values()}
    known = spec.names(workspace)
    notes = [f"{found.torn} torn lines of the store were skipped"] if found.torn else []
    notes += [] if name in known else [f"there is no file of the sweep {name} any more: its claims are not known"]
    return SweepData(
        name, store, workspace, plan, spec.load(workspace, name) if name in known else None,
        _runs(plan, by_id, better), records, better, notes,
    )  # fmt: skip


def _counts(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    states = [_state(records.get(run_id)) for run_id in plan.ids()]
    return {state: states.count(state) for state in STATES}


def _state(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "missing"
    return "flagged" if record["status"] == "ok" and record.get("flagged") else str(record["status"])


def _why(record: Mapping[str, Any] | None, state: str) -> str:
    """Why a run does not count, in words; empty for one that does."""
    if state == "missing" or record is None:
        return "planned, not run yet"
    if state == "running":
        return "begun and not finished"
    if state == "flagged":
        return f"achieved {record.get('achieved')} where {record.get('sparsity')} was asked for"
    return str(record.get("error") or "") if state != "ok" else ""


def _check_versions(name: str, store: Store, finished: Sequence[Mapping[str, Any]]) -> None:
    """UserError when one part of the runs was made by several versions of its code."""
    configs = outcomes.read(store, "configs", {one["run_id"]: one["attempt"] for one in finished})
    versions: dict[tuple[str, str], dict[Any, int]] = {}
    for rows in configs.values():
        for part, kind in ledger.parts_of(rows[-1]["config"] if rows else {}):
            counts = versions.setdefault((kind, part["name"]), {})
            counts[part["version"]] = counts.get(part["version"], 0) + 1
    for (kind, part_name), counts in versions.items():
        if len(counts) > 1:
            shown = ", ".join(f"{count} of version {version}" for version, count in sorted(counts.items()))
            raise UserError(
                f"report {name}: records of different versions of {kind} {part_name} are mixed ({shown}); "
                f"run the sweep again, so that all are of one: sweep {name}"
            )


def _runs(plan: Plan, records: Mapping[str, dict[str, Any]], better: Mapping[str, str]) -> DataFrame:
    from pandas import DataFrame

    labels = _Labels([run.point for run in plan.runs])
    rows = []
    for run in plan.runs:
        record = records.get(run.run_id)
        state = _state(record)
        own: dict[str, Any] = {**run.point, **(record or {}), "run_id": run.run_id}
        own |= {"state": state, "why": _why(record, state), **labels.of(run.point), **_scored(record, better)}
        own["command"] = " ".join(run.words)
        rows.append(
            {key: "; ".join(map(str, one)) if isinstance(one, (list, tuple)) else one for key, one in own.items()}
        )
    frame = DataFrame(rows)
    dense = frame["method"] == DENSE
    if "achieved" not in frame:
        frame["achieved"] = math.nan
    frame.loc[dense & frame["achieved"].isna(), "achieved"] = 0.0
    return frame


def _scored(record: Mapping[str, Any] | None, better: Mapping[str, str]) -> dict[str, Any]:
    """The primary score under names that are the same for every metric."""
    empty = dict.fromkeys(("score", "score_se", "n", "quality", "quality_se"), math.nan)
    metric = record.get("metric") if record else None
    score = record.get(str(metric)) if record else None
    if record is None or not isinstance(score, (int, float)) or isinstance(score, bool):
        return empty | {"better": better.get(str(metric), "higher")}
    error = record.get(f"{metric}_stderr")
    sign = 1 if better.get(str(metric), "higher") == "higher" else -1
    logged = is_logged(str(metric)) and score > 0
    error = math.nan if error is None else float(error)
    return {
        "score": float(score),
        "score_se": error,
        "n": record.get(f"{metric}_n", math.nan),
        "quality": sign * (math.log(score) if logged else float(score)),
        "quality_se": error / score if logged else error,
        "better": better.get(str(metric), "higher"),
    }


def is_logged(metric: str) -> bool:
    """Whether the metric is averaged and tested as its logarithm."""
    return metric == "perplexity"


class _Labels:
    """Names for model, task and method that tell apart what the plan varies, and the level that was asked for."""

    def __init__(self, points: Sequence[Mapping[str, Any]]) -> None:
        self.patterns = len({point.get("pattern") for point in points if point["method"] != DENSE}) > 1
        self.varying: dict[tuple[str, str], list[str]] = {}
        self.levels: dict[str, str] = {}
        for group in ("model", "task", "method"):
            for name in dict.fromkeys(str(point[group]) for point in points):
                own = [point for point in points if str(point[group]) == name]
                prefixes = (f"{group}.",) if group != "method" else ("method.", "calibration")
                keys = dict.fromkeys(key for point in own for key in point if key.startswith(prefixes))
                keys = dict.fromkeys(key for key in keys if key != "method" and key.rpartition(".")[2] not in _NO_LABEL)
                varying = [key for key in keys if len({_plain(point.get(key)) for point in own}) > 1]
                self.varying[group, name] = varying
                if group == "method" and all(point.get("sparsity") is None for point in own):
                    self._take_level(name, own, varying)

    def _take_level(self, name: str, own: Sequence[Mapping[str, Any]], varying: list[str]) -> None:
        """A method without a sparsity (a budget, a threshold) has its one varying number for a level."""
        numeric = [key for key in varying if all(_is_number(point.get(key)) for point in own)]
        if len(numeric) == 1:
            self.levels[name] = numeric[0]
            varying.remove(numeric[0])

    def of(self, point: Mapping[str, Any]) -> dict[str, Any]:
        method = str(point["method"])
        level = point.get(self.levels.get(method, "sparsity"))
        found: dict[str, Any] = {"level": math.nan if level is None or not _is_number(level) else float(level)}
        for group in ("model", "task", "method"):
            parts = [_worded(key, point.get(key)) for key in self.varying[group, str(point[group])]]
            if group == "method" and self.patterns and method != DENSE and ":" in str(point.get("pattern")):
                parts.append(str(point["pattern"]))
            found[f"{group}_label"] = " ".join([str(point[group]), *filter(None, parts)])
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _worded(key: str, value: Any) -> str:
    """``outliers`` of a switch that is on, nothing of one that is off, else ``name=value``."""
    name = key.rpartition(".")[2]
    if isinstance(value, bool):
        return name if value else ""
    return "" if value is None else f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"


def records_csv(sweep: SweepData) -> str:
    """The sweep's records as ``results format=csv`` writes them."""
    return str(view.table(sweep.records, format="csv"))
