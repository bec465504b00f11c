"""May these runs share a table? The handbook's fairness rules (Liu and Wang 2023, arXiv 2302.02596), as checks.

A *row* is one run: its planned point and its record in one flat mapping. Each finding is one sentence with a
severity:

- ``refused``: the comparison means nothing (other base model, other data, unequal sparsity ...); a report does not
  show it, or, where its reader insists (``Policy(allow_unfair=True)``), shows it under a ``watermark``;
- ``watermark``: it may be shown, and must say so (runs that missed their sparsity);
- ``warning``: one sentence under the table (granularity, phase, calibration, budget, seeds, missing baselines ...).

Dense is what the others are compared with: rules about sparsity, calibration and budget leave it out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsebench.analysis.selection import order, value_of
from sparsebench.catalogue import Declaration
from sparsebench.config import Workspace
from sparsebench.errors import UserError

Row = Mapping[str, Any]
Methods = Mapping[str, Sequence[Declaration]]
"""Label of a method (``wanda+dsnot``) -> what each of its parts declares."""

SEVERITIES = ("refused", "watermark", "warning")
_NO_MATTER = re.compile(r"(model|task)\.(device|device_map|batch_size)|model\.rung")
_BUDGET = ("recovery_steps", "train_tokens", "train_steps", "flops_training")
_COSTS = ("flops_training", "seconds_sparsify")
_SCOPE = re.compile(r"method\..*\.(include|exclude)")
_SHOWN = 4  # values that a sentence lists
_RETRAINING = ("finetune", "full_training")


@dataclass(frozen=True)
class Finding:
    """``rule``: its name; ``sentence``: what a reader must know; ``runs``: ids of the runs it is about."""

    severity: str
    rule: str
    sentence: str
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Policy:
    """``sparsity_tol``: how far achieved sparsities of one request may lie apart (or one entry, where ``numel`` is
    recorded); ``seeds``: fewer are a warning; ``allow_unfair``: refusals become watermarks."""

    sparsity_tol: float = 0.005
    seeds: int = 3
    allow_unfair: bool = False


def declared(workspace: Workspace, labels: Iterable[str]) -> dict[str, list[Declaration]]:
    """What the methods of these labels declare. A method that is not known any more declares nothing."""
    known = workspace.choices("method")
    found: dict[str, list[Declaration]] = {}
    for label in labels:
        parts = [name for name in label.split("+") if name in known]
        kinds = [workspace.group("method", name).get("kind", name) for name in parts]
        found[label] = [workspace.catalogue.get("method", kind) for kind in kinds]
    return found


def check(
    rows: Sequence[Row],
    methods: Methods,
    *,
    axes: Collection[str] = (),
    ignore: Collection[str] = (),
    policy: Policy = Policy(),
) -> list[Finding]:
    """What speaks against showing ``rows`` side by side, the worst first, each finding once.

    ``axes``: keys that span the table (``model``, ``sparsity``): rows are compared where they agree in them.
    ``ignore``: keys that the comparison itself sets apart, and that may therefore differ.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(value_of(row, key) for key in axes), []).append(row)
    found: dict[tuple[str, str], Finding] = {}
    for group in groups.values():
        for finding in _of_group(_Group(group, methods, frozenset(ignore), policy)):
            known = found.setdefault((finding.rule, finding.sentence), finding)
            runs = tuple(dict.fromkeys(known.runs + finding.runs))
            found[finding.rule, finding.sentence] = replace(known, runs=runs)
    for finding in [*_status(rows), *_seeds(rows, methods, policy), *_baselines(rows, methods)]:
        found.setdefault((finding.rule, finding.sentence), finding)
    if policy.allow_unfair:
        found = {key: replace(x, severity="watermark") if x.severity == "refused" else x for key, x in found.items()}
    return sorted(found.values(), key=lambda one: SEVERITIES.index(one.severity))


@dataclass(frozen=True)
class _Group:
    """Rows that stand side by side."""

    rows: list[Row]
    methods: Methods
    ignore: frozenset[str]
    policy: Policy

    @property
    def sparse(self) -> list[Row]:
        return [row for row in self.rows if value_of(row, "method") != "dense"]

    def of(self, row: Row) -> Sequence[Declaration]:
        return self.methods.get(str(value_of(row, "method")), ())

    def differ(
        self, severity: str, rule: str, what: str, rows: Sequence[Row], value: Callable[[Row], Any], keys: str = ""
    ) -> list[Finding]:
        """A finding when ``value`` is not the same for all ``rows``; none where the comparison is about ``keys``."""
        if any(re.fullmatch(keys, key) for key in self.ignore):
            return []
        found: dict[Any, list[Row]] = {}
        for row in rows:
            found.setdefault(value(row), []).append(row)
        if len(found) < 2:
            return []
        shown = [f"{_text(one)} ({_names(group)})" for one, group in sorted(found.items(), key=lambda x: order(x[0]))]
        more = [f"{len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []
        return [Finding(severity, rule, f"{what}: {', '.join([*shown[:_SHOWN], *more])}.", _ids(rows))]


def _of_group(group: _Group) -> list[Finding]:
    sparse, rows = group.sparse, group.rows
    declared = [row for row in sparse if group.of(row)]
    found = [
        *group.differ("refused", "checkpoint", "The base models differ", rows, _options("model"), r"model(\..*)?"),
        *group.differ("refused", "data", "The evaluation data differ", rows, _options("task"), r"task(\..*)?"),
        *group.differ("refused", "metric", "The metrics differ", rows, _column("metric"), r"task(\..*)?"),
        *group.differ("refused", "context", "The context lengths differ", rows, _context, r"(model|task)(\..*)?"),
        *group.differ(
            "refused", "reference", "The dense references differ in their bytes or dtype", rows, _dense, r"model(\..*)?"
        ),
        *group.differ(
            "refused",
            "denominator",
            "What sparsity counts differs",
            [row for row in declared if row.get("denominator") or _objects(group, row)],
            _scope(group),
            r"method(\..*)?\.(include|exclude)",
        ),
        *_matched(group),
        *_retraining(group, declared),
        *_leaks(sparse),
        *group.differ("warning", "granularity", "The granularities differ", sparse, _granularity(group), "pattern"),
        *group.differ(
            "warning", "phase", "The phases in which sparsity is found differ", declared, _phase(group), "phase"
        ),
        *_calibration(group, declared),
        *_budget(group),
        *_latency(rows),
    ]
    return found


def _scope(group: _Group) -> Callable[[Row], str]:
    """The denominator of a row: what its record says it counts, else the objects its methods zero and where."""

    def scope(row: Row) -> str:
        if row.get("denominator"):
            return str(row["denominator"])
        objects = _objects(group, row)
        limits = [
            f"{key.rpartition('.')[2]} {_text(row[key])}" for key in sorted(row) if _SCOPE.fullmatch(key) and row[key]
        ]
        return ", ".join([*objects, *limits])

    return scope


def _objects(group: _Group, row: Row) -> list[str]:
    """What the methods of a row zero; nothing where they only quantise."""
    return [one for one in dict.fromkeys(part.taxonomy.object for part in group.of(row)) if one != "none"]


def _matched(group: _Group) -> list[Finding]:
    """Rows of one request (level and pattern) must have reached the same sparsity."""
    if group.ignore & {"sparsity", "pattern"}:
        return []
    counted = [row for row in group.sparse if isinstance(row.get("achieved"), (int, float))]
    if len(counted) < 2:
        return []
    low, high = min(counted, key=lambda x: x["achieved"]), max(counted, key=lambda x: x["achieved"])
    entries = [int(row["numel"]) for row in (low, high) if row.get("numel")]
    tolerance = max([group.policy.sparsity_tol, *(1 / one for one in entries)])
    if high["achieved"] - low["achieved"] <= tolerance + 1e-12:
        return []
    values = f"{low['achieved']:.4g} ({_names([low])}) to {high['achieved']:.4g} ({_names([high])})"
    return [Finding("refused", "sparsity", f"The achieved sparsities differ: {values}.", _ids([low, high]))]


def _retraining(group: _Group, declared: Sequence[Row]) -> list[Finding]:
    """Weights that were trained against weights that were not: only beside what that costs."""

    def retrained(row: Row) -> str:
        trained = any(one.taxonomy.weights_updated_after_mask in _RETRAINING for one in group.of(row))
        return "retrained" if trained else "not retrained"

    costed = all(any(row.get(column) is not None for column in _COSTS) for row in declared)
    severity = "warning" if costed else "refused"
    what = "Some methods retrain, which has a cost of its own" + ("" if costed else " that is not recorded")
    return group.differ(severity, "retraining", what, declared, retrained)


def _leaks(rows: Sequence[Row]) -> list[Finding]:
    """Calibration on the text that is evaluated."""

    def same_text(row: Row) -> bool:
        file = value_of(row, "calibration.file")
        if file is not None:
            return bool(file == value_of(row, "task.file"))
        corpus = value_of(row, "calibration")
        return corpus is not None and corpus == value_of(row, "task.corpus") and value_of(row, "task.split") == "train"

    leaked = [row for row in rows if same_text(row)]
    if not leaked:
        return []
    sentence = f"Calibration and evaluation read the same text: {_names(leaked)}."
    return [Finding("refused", "leak", sentence, _ids(leaked))]


def _calibration(group: _Group, declared: Sequence[Row]) -> list[Finding]:
    calibrated = [row for row in declared if value_of(row, "calibration") is not None]
    return group.differ(
        "warning",
        "calibration",
        "The calibration data differ",
        calibrated,
        _options("calibration"),
        r"calibration(\..*)?",
    )


def _budget(group: _Group) -> list[Finding]:
    rows = [row for row in group.sparse if any(row.get(column) is not None for column in _BUDGET)]
    budgets = lambda row: ", ".join(f"{c} {row[c]:g}" for c in _BUDGET if row.get(c) is not None)  # noqa: E731
    return group.differ("warning", "budget", "The training budgets differ", rows, budgets)


def _latency(rows: Sequence[Row]) -> list[Finding]:
    timed = [row for row in rows if isinstance(row.get("ms_prefill"), (int, float))]
    if not timed or len(timed) == len(rows):
        return []
    return [Finding("warning", "latency", f"Latency was measured only for {_names(timed)}.", _ids(timed))]


def _status(rows: Sequence[Row]) -> list[Finding]:
    found = []
    failed = [row for row in rows if row.get("status") not in (None, "ok")]
    if failed:
        found.append(Finding("refused", "failed", f"Runs without a result: {_names(failed)}.", _ids(failed)))
    flagged = [row for row in rows if row.get("flagged")]
    if flagged:
        sentence = f"Achieved sparsity is off the request, and the run left out of every statistic: {_names(flagged)}."
        found.append(Finding("watermark", "flagged", sentence, _ids(flagged)))
    return found


def _seeds(rows: Sequence[Row], methods: Methods, policy: Policy) -> list[Finding]:
    """Methods that draw at random: too few seeds, or not the same ones."""
    seeds: dict[str, set[Any]] = {}
    for row in rows:
        if value_of(row, "seed") is not None:
            seeds.setdefault(str(value_of(row, "method")), set()).add(value_of(row, "seed"))
    found = []
    few = sorted(label for label, own in seeds.items() if len(own) < policy.seeds)
    if few:
        sentence = f"Fewer than {policy.seeds} seeds, so that nothing is known of their spread: {', '.join(few)}."
        found.append(Finding("warning", "seeds", sentence))
    if len({frozenset(own) for own in seeds.values()}) > 1:
        shown = ", ".join(f"{label} {sorted(own)}" for label, own in sorted(seeds.items()))
        found.append(Finding("warning", "unequal_seeds", f"The methods were run with different seeds: {shown}."))
    return found


def _baselines(rows: Sequence[Row], methods: Methods) -> list[Finding]:
    missing = missing_baselines({str(value_of(row, "method")) for row in rows}, methods)
    return [Finding("warning", "baselines", f"Baselines are missing: {', '.join(missing)}.")] if missing else []


def missing_baselines(labels: Collection[str], methods: Methods) -> list[str]:
    """The mandatory baselines that are not among ``labels``: dense; what each method names as its naive baseline;
    random masks for whatever selects weights; a small dense model for what is trained sparse."""
    wanted: dict[str, None] = {}
    compared = [one for label in labels for one in methods.get(label, ()) if one.taxonomy.object != "none"]
    if compared:
        wanted["dense"] = None
    for one in compared:
        if one.baseline:
            wanted[one.baseline] = None
        if one.target == "weights" and one.stage == "select":
            wanted["random"] = None
        if one.target == "training":
            wanted["dense_small"] = None
    parts = {part for label in labels for part in label.split("+")}
    return sorted(set(wanted) - parts)


def of_sweep(workspace: Workspace, labels: Collection[str]) -> list[Finding]:
    """What a sweep over these methods lacks before anything has run."""
    methods = declared(workspace, labels)
    return _baselines([{"method": label} for label in labels], methods)


def refuse(findings: Sequence[Finding], what: str) -> None:
    """UserError that names the first refusal among ``findings`` and how to insist; nothing when there is none."""
    refusals = [one for one in findings if one.severity == "refused"]
    if refusals:
        raise UserError(f"{what}: an unfair comparison: {refusals[0].sentence} (allow_unfair=true shows it, marked)")


def _options(prefix: str) -> Callable[[Row], str]:
    """A row's choice in a group with the options that can change its result."""
    inside = re.compile(rf"{prefix}(\..*)?")

    def text(row: Row) -> str:
        keys = sorted(key for key in row if inside.fullmatch(key) and not _NO_MATTER.fullmatch(key))
        options = [f"{key.partition('.')[2]}={_text(row[key])}" for key in keys if "." in key and row[key] is not None]
        return " ".join([_text(value_of(row, prefix)), *options])

    return text


def _column(name: str) -> Callable[[Row], Any]:
    return lambda row: value_of(row, name)


def _context(row: Row) -> Any:
    return value_of(row, "context") or value_of(row, "length")


def _dense(row: Row) -> str:
    return f"{_text(value_of(row, 'bytes_weights_dense'))} bytes {_text(value_of(row, 'dtype'))}"


def _granularity(group: _Group) -> Callable[[Row], str]:
    """The pattern of a weight method, else what its methods declare."""

    def text(row: Row) -> str:
        weights = [one for one in group.of(row) if one.taxonomy.object == "weights"]
        if weights or not group.of(row):
            return _text(value_of(row, "pattern"))
        return "/".join(dict.fromkeys(kind for one in group.of(row) for kind in one.taxonomy.granularity))

    return text


def _phase(group: _Group) -> Callable[[Row], str]:
    return lambda row: ", ".join(dict.fromkeys(one.taxonomy.when_mask_is_found for one in group.of(row)))


def _names(rows: Sequence[Row]) -> str:
    """The runs' methods, each once, with the number of its runs."""
    counts: dict[str, int] = {}
    for row in rows:
        label = str(value_of(row, "method"))
        counts[label] = counts.get(label, 0) + 1
    shown = [label if count == 1 else f"{count} runs of {label}" for label, count in counts.items()]
    more = [f"{len(shown) - _SHOWN} more methods"] if len(shown) > _SHOWN else []
    return ", ".join([*shown[:_SHOWN], *more])


def _ids(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(str(row["run_id"]) for row in rows if row.get("run_id"))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)
