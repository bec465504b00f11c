"""The ledger: every claim of every sweep with its verdict on what a store holds.

A sweep's runs are those of the newest plan that the store keeps under its name, so a claim is tested on exactly the
runs that were planned together. A sweep that was never run, or whose newest grid lacks a claim's runs, leaves the
claim untested, and the ledger says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsebench.analysis import fairness, outcomes
from sparsebench.analysis.claims import Claim
from sparsebench.analysis.measures import Evidence, related
from sparsebench.analysis.selection import order, same
from sparsebench.analysis.verdicts import REPRODUCED, UNTESTED, Verdict, judge
from sparsebench.config import Workspace
from sparsebench.errors import UserError, closest
from sparsebench.results import query
from sparsebench.results.store import Store
from sparsebench.sweep import spec
from sparsebench.sweep.plan import Plan, fits, newest
from sparsebench.sweep.spec import Sweep


@dataclass(frozen=True)
class Entry:
    """One claim of one sweep, or (``verdict`` None) a sweep that states none."""

    sweep: str
    paper: str
    verdict: Verdict | None


@dataclass(frozen=True)
class Ledger:
    """``entries`` by paper, then sweep, then in the order of its file; ``notes``: what a reader must know of a
    sweep as a whole (missing baselines, an older grid, skipped lines), by paper."""

    entries: list[Entry]
    notes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def papers(self) -> list[str]:
        return list(dict.fromkeys(entry.paper for entry in self.entries))

    def of(self, paper: str) -> list[Verdict]:
        return [entry.verdict for entry in self.entries if entry.paper == paper and entry.verdict]

    def headline(self, paper: str | None = None) -> tuple[int, int, int]:
        """(reproduced, all, untested) of the main claims that are expected to hold for small models."""
        counted = [x.verdict for one in ([paper] if paper else self.papers) for x in self.of(one) if x.counts]
        return counted.count(REPRODUCED), len(counted), counted.count(UNTESTED)


def build(workspace: Workspace, store: Store, papers: Collection[str] = ()) -> Ledger:
    """The ledger of all papers that have a sweep, or of the named ones. UserError for a paper without a sweep and
    for a sweep file with mistakes."""
    sweeps = [spec.load(workspace, name) for name, file in spec.names(workspace).items() if _may_name(file, papers)]
    known = {paper for sweep in sweeps for paper in _papers(sweep)}
    for paper in papers:
        if paper not in known:
            everything = {one for name in spec.names(workspace) for one in _papers(spec.load(workspace, name))}
            raise UserError(f"claims {paper}: no sweep of that paper{closest(paper, everything)}")
    chosen = [sweep for sweep in sweeps if not papers or _papers(sweep) & set(papers)]
    plans = {sweep.name: newest(store.folder, sweep.name) for sweep in chosen}
    evidence = _evidence(workspace, store, chosen, plans)
    pairs = [(sweep, claim) for sweep in chosen for claim in sweep.claims]
    verdicts = judge([(claim, evidence[sweep.name]) for sweep, claim in pairs])
    entries = [
        Entry(sweep.name, claim.paper, _placed(sweep, claim, plans[sweep.name], verdict))
        for (sweep, claim), verdict in zip(pairs, verdicts, strict=True)
    ]
    claimed = {entry.paper for entry in entries}
    entries += [Entry(one.name, one.paper, None) for one in chosen if one.paper and one.paper not in claimed]
    entries = [entry for entry in entries if not papers or entry.paper in papers]
    notes: dict[str, list[str]] = {}
    for sweep in chosen:
        for paper in sorted(_papers(sweep)):
            notes.setdefault(paper, []).extend(_notes(workspace, sweep, plans[sweep.name]))
    return Ledger(sorted(entries, key=lambda entry: entry.paper), {key: one for key, one in notes.items() if one})


def evidence_of(workspace: Workspace, store: Store, sweep: Sweep, plan: Plan | None) -> Evidence:
    """What the claims of one sweep are tested on, for reports."""
    return _evidence(workspace, store, [sweep], {sweep.name: plan})[sweep.name]


def _may_name(file: Path, papers: Collection[str]) -> bool:
    """Whether a sweep's file can be of one of the papers: composing every file takes far longer than a look."""
    text = file.read_text(encoding="utf-8", errors="replace") if papers else ""
    return not papers or "defaults:" in text or any(paper in text for paper in papers)


def _papers(sweep: Sweep) -> set[str]:
    return {claim.paper for claim in sweep.claims} | ({sweep.paper} if sweep.paper else set())


def _evidence(
    workspace: Workspace, store: Store, sweeps: Sequence[Sweep], plans: Mapping[str, Plan | None]
) -> dict[str, Evidence]:
    """Reads the store once for all sweeps, and of the details only what their claims look at."""
    points = {sweep.name: _points(plans[sweep.name]) for sweep in sweeps}
    claims = [(claim, points[sweep.name]) for sweep in sweeps for claim in sweep.claims]
    wanted = {str(one["run_id"]): one for claim, own in claims for one in related(claim, own)}
    records = {one["run_id"]: one for one in query.planned(store, wanted).records}
    attempts = {run_id: one["attempt"] for run_id, one in records.items() if one["status"] == "ok"}
    samples = outcomes.read(store, "samples", attempts)
    trouble = _stale(workspace, outcomes.read(store, "configs", attempts))
    better = {one.metric: one.better for one in workspace.catalogue.found["task"].values()}
    labels = {str(point["method"]) for own in points.values() for point in own}
    methods = fairness.declared(workspace, labels)
    return {name: Evidence(own, records, samples, better, methods, trouble) for name, own in points.items()}


def _points(plan: Plan | None) -> list[dict[str, Any]]:
    return [{**run.point, "run_id": run.run_id} for run in plan.runs] if plan else []


def _stale(workspace: Workspace, configs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """The runs that were made by another version of a method, task or corpus than today's: their numbers do not
    belong beside those of today, nor beside each other."""
    found = {}
    for run_id, rows in configs.items():
        for part, kind in parts_of(rows[-1]["config"] if rows else {}):
            today = workspace.catalogue.found[kind].get(part["name"])
            if today is not None and today.version != part["version"]:
                found[run_id] = f"made by version {part['version']} of {part['name']}, which is now {today.version}; "
                found[run_id] += "run its sweep again"
    return found


def parts_of(config: Mapping[str, Any]) -> Iterable[tuple[Mapping[str, Any], str]]:
    """The parts of a stored configuration, each with its kind of declaration: label, name, version, options."""
    for part in config.get("methods") or []:
        yield part, "method"
    for name, kind in (("task", "task"), ("calibration", "corpus"), ("model", "model")):
        if config.get(name):
            yield config[name], kind


def _placed(sweep: Sweep, claim: Claim, plan: Plan | None, verdict: Verdict) -> Verdict:
    """The verdict with what the sweep as a whole adds to its reason: never run, or on part of its grid only."""
    if plan is None:
        return replace(verdict, verdict=UNTESTED, why=f"no record: the sweep was not run (sweep {sweep.name})")
    left_out = _left_out(sweep, claim, plan)
    if verdict.verdict == UNTESTED or not left_out:
        return verdict
    return replace(verdict, scope=f"{verdict.scope}, without {left_out}" if verdict.scope else f"without {left_out}")


def _left_out(sweep: Sweep, claim: Claim, plan: Plan) -> str:
    """Values that the sweep's file gives to a key of for_each and that the planned grid lacks, but for those that the
    sweep never joins with what the claim selects."""
    parts = []
    components = claim.components(_points(plan))
    for key in claim.for_each:
        declared = sorted(sweep.grid.get(key, []), key=order)
        missing = [one for one in declared if not any(same(one, values[key]) for values in components)]
        missing = [one for one in missing if not _never(sweep, {**claim.select, key: one})]
        if missing and not isinstance(missing[0], list):
            parts.append(f"{key}={', '.join(map(str, missing))}")
    return " and ".join(parts)


def _never(sweep: Sweep, known: Mapping[str, Any]) -> bool:
    """Whether a rule of the sweep leaves out every run with what is known of it."""
    return any(rule.keys() <= known.keys() and fits(rule, known) for rule in sweep.exclude)


def _notes(workspace: Workspace, sweep: Sweep, plan: Plan | None) -> list[str]:
    """Mandatory baselines that the sweep lacks."""
    labels = [str(run.point["method"]) for run in plan.runs] if plan else ["+".join(one) for one in methods_of(sweep)]
    return [f"sweep {sweep.name}: {one.sentence}" for one in fairness.of_sweep(workspace, dict.fromkeys(labels))]


def methods_of(sweep: Sweep) -> list[list[str]]:
    """The stacks of a sweep's file, its baselines included."""
    stacks = [list(one) if isinstance(one, (list, tuple)) else [str(one)] for one in sweep.grid.get("method", [])]
    return stacks + [[name] for name in sweep.baselines if [name] not in stacks]
