"""A claim's record calls as numbers: which runs each means, their outcomes paired by sample and by seed.

What the calls mean (values are of the runs that the claim's ``select`` and the call's own keys choose):

- ``nll``: mean NLL; ``acc``: accuracy; ``score``: the task's primary score, the logarithm of a perplexity;
- ``drop``: dense minus method, so that a loss is positive whichever direction is better for the task;
- ``achieved``: achieved sparsity; ``cost.flops``: FLOPs per token, of a prefill or, where the task decodes through
  the cache, of decoding; ``cost.bytes``: bytes of the weights; ``cost.ms``: measured latency;
- ``tokens.mean``: tokens of an answer; ``tokens.correct``, ``tokens.wrong``: of right and of wrong answers only;
- ``knee.<rule>``: the knee over achieved sparsity, none where a hinge is no better than a line (``curves.py``);
  ``knee.collapse``: the smallest sparsity at which the score is below half of dense, 1 where none is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy

from sparsebench.analysis import fairness, fitted
from sparsebench.analysis.claims import Claim
from sparsebench.analysis.expressions import Call, Expression, Reference, Value
from sparsebench.analysis.leaves import Constant, Drop, Knee, Leaf, Mean, Quotient, evaluated
from sparsebench.analysis.outcomes import Outcomes, Row, Untested, are_shares, column_of, layout, outcomes, spent
from sparsebench.analysis.selection import CURVE_LEVELS, Point, differences, matching, nearest, same, value_of
from sparsebench.analysis.statistics import Array, Population, Weights

Values = Mapping[str, Value]
Node = Call | Reference
_DENSE: dict[str, Value] = {"method": "dense"}
_TOKENS = {
    "tokens.mean": ["tokens"],
    "tokens.correct": ["tokens_if_correct", "correct"],
    "tokens.wrong": ["tokens_if_wrong", "wrong"],
}  # the columns of ``spent`` whose means they are, or are the quotient of
_HINTS = 5000  # planned runs that are looked through for a hint


@dataclass(frozen=True)
class Evidence:
    """What claims are tested on. ``points``: the planned runs as claims select them, each with its ``run_id``;
    ``records``, ``samples``: record and per-sample rows by run id; ``better``: ``lower`` or ``higher`` by metric;
    ``methods``: what each method declares, by label; ``trouble``: run ids whose records must not be used, and why.
    """

    points: Sequence[Point]
    records: Mapping[str, Row]
    samples: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    better: Mapping[str, str] = field(default_factory=dict)
    methods: fairness.Methods = field(default_factory=dict)
    trouble: Mapping[str, str] = field(default_factory=dict)
    plan: Sequence[Point] = ()  # all planned runs, where ``points`` are only those of one claim

    def of(self, claim: Claim) -> Evidence:
        """What one claim can look at; the sweep may be a thousand times larger."""
        return replace(self, points=related(claim, self.points), plan=self.plan or self.points)

    def nearest(self, select: Mapping[str, Value]) -> str:
        """In which keys the closest planned run differs from what was selected."""
        return nearest([dict(point) for point in (self.plan or self.points)[:_HINTS]], dict(select))

    def record(self, point: Point) -> Row:
        """The record of a planned run. Untested when there is none that may be used."""
        run_id = point["run_id"]
        record, name = self.records.get(run_id), named(point)
        if record is None or record["status"] == "running":
            raise Untested(f"no record: {name} ({'still running' if record else 'planned, not run yet'})")
        if record["status"] != "ok":
            raise Untested(f"{record['status']} record: {name}: {record.get('error')}")
        if record.get("flagged"):
            asked, got = record.get("sparsity"), record.get("achieved")
            raise Untested(f"achieved sparsity is off: {name}: {got} where {asked} was asked")
        if run_id in self.trouble:
            raise Untested(f"{name}: {self.trouble[run_id]}")
        return record


@dataclass(frozen=True)
class _Chosen:
    """The runs of one call in one component, by seed (None: it serves every seed). ``levels`` has one entry, or
    one per sparsity of a curve."""

    levels: list[dict[Any, Point]]
    dense: dict[Any, Point] | None

    def all(self) -> list[dict[Any, Point]]:
        return [*self.levels, *([self.dense] if self.dense else [])]


class Bench:
    """Everything that one test of a claim looks at: the leaves of its calls in one or several components (values
    of for_each), over one set of seeds. Untested when anything is missing, unusable or unfair."""

    def __init__(self, claim: Claim, evidence: Evidence, components: Sequence[Values]) -> None:
        self.claim, self.evidence = claim, evidence
        chosen: list[dict[Node, _Chosen]] = [
            {call: self._choose(call, one) for call in claim.record_calls}
            | {constant: self._fitted_runs(constant, one) for constant in claim.references}
            for one in components
        ]
        runs = [by_seed for calls in chosen for one in calls.values() for by_seed in one.all()]
        self.seeds: list[Any] = sorted({seed for one in runs for seed in one if seed is not None}) or [None]
        for by_seed in runs:
            self._check_seeds(by_seed)
        for calls, values in zip(chosen, components, strict=True):
            self._check_fair(calls, values)
        self._shared: dict[Any, _Shared] = {}
        if claim.unit != "none":
            self._collect(chosen)
        self.populations = [shared.close() for shared in self._shared.values()]
        self.bounded = bool(self._shared) and all(shared.bounded for shared in self._shared.values())
        self.leaves: list[dict[Node, Leaf]] = [{call: self._leaf(call, one) for call, one in x.items()} for x in chosen]
        if claim.unit != "none":
            self._check_minimum()

    def value(self, at: int, side: Expression, weights: Weights) -> Array:
        """``side`` in component number ``at``: (B,); not finite where arithmetic fails."""
        found = {call: leaf.at(weights) for call, leaf in self.leaves[at].items()}
        count = max(len(one) for one in (weights.seeds, *weights.items, *found.values()))
        return numpy.broadcast_to(evaluated(side, found), (count,))

    def _choose(self, call: Call, values: Values) -> _Chosen:
        curve = call.kind.startswith("knee.")
        select = self.claim.select_of(call, values)
        levels = self._by_level(call, select) if curve else [self._by_seed(call, select)]
        twin = {**select, **_DENSE} if _has_twin(call) else None
        return _Chosen(levels, self._by_seed(call, twin) if twin else None)

    def _fitted_runs(self, constant: Reference, values: Values) -> _Chosen:
        """The runs that a law is fitted to: one level for all that differ in no more than their seed."""
        groups: dict[str, list[Point]] = {}
        for point in self._find({**self.claim.select, **values}):
            own = {key: value for key, value in point.items() if key not in ("seed", "run_id")}
            groups.setdefault(repr(sorted(own.items(), key=lambda one: one[0])), []).append(point)
        return _Chosen([self._paired(constant, one, "seed" in self.claim.select) for one in groups.values()], None)

    def _find(self, select: Mapping[str, Value]) -> list[Point]:
        found = matching(self.evidence.points, select)
        pinned = select.get("seed")
        if pinned is not None:
            found = [one for one in found if value_of(one, "seed") is None or same(value_of(one, "seed"), pinned)]
        if not found:
            asked = ", ".join(f"{key}={value}" for key, value in select.items())
            raise Untested(f"no record: {asked}{self.evidence.nearest(select)}")
        return found

    def _by_seed(self, call: Call, select: Mapping[str, Value]) -> dict[Any, Point]:
        return self._paired(call, self._find(select), select.get("seed") is not None)

    def _by_level(self, call: Call, select: Mapping[str, Value]) -> list[dict[Any, Point]]:
        groups: dict[float, list[Point]] = {}
        for point in self._find(select):
            if value_of(point, "method") != "dense":
                groups.setdefault(float(value_of(point, "sparsity") or 0.0), []).append(point)
        if len(groups) < CURVE_LEVELS:
            raise Untested(f"{call}: runs at {len(groups)} sparsities, a knee needs {CURVE_LEVELS}")
        return [self._paired(call, groups[level], select.get("seed") is not None) for level in sorted(groups)]

    def _paired(self, call: Node, found: list[Point], pinned: bool) -> dict[Any, Point]:
        """One run per seed. A run whose seed is named serves every seed, as one without a seed does."""
        groups: dict[Any, list[Point]] = {}
        for point in found:
            groups.setdefault(None if pinned else value_of(point, "seed"), []).append(point)
        several = (
            found if None in groups and len(groups) > 1 else next((x for x in groups.values() if len(x) > 1), None)
        )
        if several:
            what = f"{len(several)} records match {call} for one seed: {differences(several)}"
            raise Untested(f"{what}; name in its select what tells them apart")
        return {seed: points[0] for seed, points in groups.items()}

    def _check_seeds(self, by_seed: Mapping[Any, Point]) -> None:
        missing = [seed for seed in self.seeds if seed not in by_seed and None not in by_seed]
        if missing:
            name = named({**next(iter(by_seed.values())), "seed": None})
            raise Untested(f"no record: {name}, seed={missing[0]} (both sides need the same seeds)")
        for point in by_seed.values():
            self.evidence.record(point)

    def _check_fair(self, every: Mapping[Node, _Chosen], values: Values) -> None:
        """What the claim itself sets apart may differ; nothing else that makes a comparison unfair may. A fit
        compares nothing."""
        calls = {call: one for call, one in every.items() if isinstance(call, Call)}
        first = [next(iter(level.values())) for one in calls.values() for level in one.levels]
        rows = {one["run_id"]: {**one, **self.evidence.record(one)} for one in first}
        own = {key for call in calls for key in call.select}
        own |= {"sparsity"} if any(call.kind.startswith("knee.") for call in calls) else set()
        for finding in fairness.check(list(rows.values()), self.evidence.methods, ignore=own):
            if finding.severity == "refused":
                at = "".join(f" at {key}={value}" for key, value in values.items())
                raise Untested(f"unfair pair{at}: {finding.sentence}")

    def _collect(self, chosen: Iterable[Mapping[Node, _Chosen]]) -> None:
        for calls in chosen:
            for call, one in calls.items():
                kind = self._kind(call)
                for by_seed in one.all() if _has_outcomes(kind) else ():
                    for point in by_seed.values():
                        self._add(kind, point)

    def _kind(self, node: Node) -> str:
        return str(self.claim.fit["value"]) if isinstance(node, Reference) else node.kind

    def _add(self, kind: str, point: Point) -> None:
        record = self.evidence.record(point)
        try:
            columns = _columns(kind, record)
            rows = self.evidence.samples.get(point["run_id"], ())
            rows = spent(rows) if kind in _TOKENS else rows
            for column, score in columns:
                found = outcomes(rows, column)
                self._shared.setdefault(_population(point, record), _Shared()).add(point, column, found, score)
        except Untested as problem:
            raise Untested(f"{named(point)}: {problem}") from None

    def _leaf(self, call: Node, chosen: _Chosen) -> Leaf:
        kind = self._kind(call)
        levels = [self._score(kind, level) for level in chosen.levels]
        if isinstance(call, Reference):
            firsts = [self._over_seeds(level)[0] for level in chosen.levels]
            columns = {
                variable: [fitted.cell(str(column), point, self.evidence.record(point)) for point in firsts]
                for variable, column in self.claim.fit.items()
                if variable != "value"
            }
            return fitted.fitted(call, columns, levels)
        if chosen.dense is None:
            return levels[0]
        dense = self._score(kind, chosen.dense)
        metric = str(self.evidence.record(self._over_seeds(chosen.dense)[0]).get("metric"))
        if metric not in self.evidence.better:
            raise Untested(f"{call}: whether more {metric} is better is not known")
        sign = 1 if self.evidence.better[metric] == "higher" else -1
        if call.kind == "knee.collapse" and sign < 0:
            raise Untested(f"{call}: half of the dense score says nothing of {metric}, which is better when lower")
        if call.kind == "drop":
            return Drop(dense, levels[0], sign)
        achieved = [[self.evidence.record(p)["achieved"] for p in self._over_seeds(level)] for level in chosen.levels]
        x = numpy.array([0.0, *(sum(level) / len(level) for level in achieved)])
        if (numpy.diff(x) <= 0).any():
            raise Untested(f"{call}: the achieved sparsities do not increase with what was asked")
        return Knee(call.kind.removeprefix("knee."), x, (dense, *levels), sign, metric == "perplexity")

    def _score(self, kind: str, by_seed: Mapping[Any, Point]) -> Leaf:
        points = self._over_seeds(by_seed)
        if not _has_outcomes(kind):
            return Constant(numpy.array([_cost(kind, self.evidence.record(point), point) for point in points]))
        records = [self.evidence.record(point) for point in points]
        if self.claim.unit == "none":
            return Constant(numpy.array([_recorded(kind, record) for record in records], float))
        keys = list(self._shared)
        key = _population(points[0], records[0])
        means = []
        for columns in zip(*([name for name, _ in _columns(kind, record)] for record in records), strict=True):
            rows = [self._shared[key].of(p["run_id"], column) for p, column in zip(points, columns, strict=True)]
            means.append(Mean(numpy.stack(rows), self.populations[keys.index(key)], keys.index(key)))
        return means[0] if len(means) == 1 else Quotient(*means)

    def _over_seeds(self, by_seed: Mapping[Any, Point]) -> list[Point]:
        return [by_seed[seed] if seed in by_seed else by_seed[None] for seed in self.seeds]

    def _check_minimum(self) -> None:
        claim, seeds = self.claim, len(self.seeds)
        needed = max(claim.min_seeds, 2 if claim.unit == "seeds" else 1)
        if seeds < needed:
            raise Untested(f"{seeds} seed{'s' if seeds > 1 else ''}, at least {needed} are needed")
        if "samples" in claim.unit:
            if not self.populations:
                raise Untested(f"unit={claim.unit}: none of its calls has per-sample outcomes; write unit: none")
            fewest = min(one.size for one in self.populations)
            if fewest < claim.min_samples:
                raise Untested(f"{fewest} samples, at least {claim.min_samples} are needed")


class _Shared:
    """The samples that several runs share, and each run's outcomes in one order."""

    def __init__(self) -> None:
        self.first: Outcomes | None = None
        self.columns: dict[tuple[str, str], tuple[str, Array, float | None]] = {}

    def add(self, point: Point, column: str, found: Outcomes, score: float | None) -> None:
        """Untested when the samples are not those of the runs before."""
        first = self.first = self.first or found
        if set(first.ids) != set(found.ids):
            only = len(set(found.ids) - set(first.ids)), len(set(first.ids) - set(found.ids))
            raise Untested(f"its samples are not those of the other runs ({only[0]} only here, {only[1]} only there)")
        place = {one: at for at, one in enumerate(found.ids)}
        values = found.values[[place[one] for one in first.ids]]
        self.columns[point["run_id"], column] = (named(point), values, score)

    def close(self) -> Population:
        """The population, once all runs are known."""
        if self.first is None:
            raise ValueError("a population without samples")
        return layout(self.first, list(self.columns.values()))

    def of(self, run_id: str, column: str) -> Array:
        return self.columns[run_id, column][1]

    @property
    def bounded(self) -> bool:
        return all(are_shares(column, values) for (_, column), (_, values, _) in self.columns.items())


def related(claim: Claim, points: Sequence[Point]) -> list[Point]:
    """The planned runs that a test of the claim can look at, whatever the values of for_each."""
    selects = [claim.select_of(call) for call in claim.record_calls] + [claim.select for _ in claim.references]
    selects += [{**claim.select_of(call), **_DENSE} for call in claim.record_calls if _has_twin(call)]
    chosen = {id(point) for select in selects for point in matching(points, select)}
    return [point for point in points if id(point) in chosen]


def named(point: Point) -> str:
    """A run in a message: ``method=wanda, model=tiny_1m, sparsity=0.5, task=perplexity, seed=0``."""
    keys = ("method", "model", "sparsity", "pattern", "task", "seed")
    shown = {key: value_of(point, key) for key in keys}
    return ", ".join(f"{key}={value}" for key, value in shown.items() if value not in (None, "unstructured"))


def _population(point: Point, record: Row) -> tuple[Any, ...]:
    """What runs must agree in for equal sample ids to mean equal samples. The embedded models share a tokenizer,
    which cuts the windows of a text; other models are paired only with themselves."""
    task = sorted((key, str(value)) for key, value in point.items() if key == "task" or key.startswith("task."))
    model = "ladder" if "model.rung" in point else (value_of(point, "model"), value_of(point, "model.path"))
    return (*task, record.get("context"), record.get("length"), model)


def _has_twin(call: Call) -> bool:
    """Whether the call also looks at the dense run beside each of its own."""
    return call.kind == "drop" or call.kind.startswith("knee.")


def _has_outcomes(kind: str) -> bool:
    return kind in ("nll", "acc", "score", "drop") or kind in _TOKENS or kind.startswith("knee.")


def _columns(kind: str, record: Row) -> list[tuple[str, float | None]]:
    """The per-sample columns that a call reads, and what the mean of each must be by the record (None: any)."""
    if kind in _TOKENS:
        if record.get("tokens") is None:
            raise Untested(f"its task {record.get('task')} counts no tokens")
        return [(column, record["tokens"] if column == "tokens" else None) for column in _TOKENS[kind]]
    return [column_of(kind if kind in ("nll", "acc") else "score", record)]


def _recorded(kind: str, record: Row) -> float | None:
    """The record's own number for a call."""
    if kind in _TOKENS:
        column = {"tokens.mean": "tokens"}.get(kind, kind.replace(".", "_"))
        if record.get(column) is None:
            raise Untested(f"its task {record.get('task')} has no {column}")
        return float(record[column])
    return _columns(kind, record)[0][1]


def _cost(kind: str, record: Row, point: Point) -> float:
    """The number that ``achieved`` or a cost reads. Untested when the record has none."""
    decodes = value_of(point, "task.protocol") == "continuation"
    flops = "flops_decode" if decodes else "flops_prefill"
    ms = "ms_decode" if decodes else "ms_prefill"
    column = {"achieved": "achieved", "cost.flops": flops, "cost.bytes": "bytes_weights", "cost.ms": ms}[kind]
    value = record.get(column)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        reason = "its latency is simulated: no kernel was timed" if column == ms else f"it has no {column}"
        raise Untested(f"{named(point)}: {reason}")
    return float(value)
