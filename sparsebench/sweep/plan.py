"""From a sweep to its runs: expand the grid, validate every point, give it its id, see what is done.

Everything is checked before anything is started; all mistakes are reported at once. A plan is kept
in the store (``plans/<sweep>/<number>.jsonl``: a header, then one line per run), so that what belongs
to a sweep never depends on the records.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsebench import __version__
from sparsebench.analysis.claims import check_selects
from sparsebench.config import Unused, Workspace, resolve
from sparsebench.errors import Mistakes, UserError, closest
from sparsebench.results.store import no_garbage_collection
from sparsebench.run import Part, Run
from sparsebench.sweep.spec import Sweep

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")  # a text that needs no quotes on the command line ...
_NOT_TEXT = {"null", "true", "false", "nan", "inf"}  # ... unless it would be read as something else


@dataclass(frozen=True)
class Planned:
    """One run of a plan: its ids, the words that make it again on the command line, its flat point.
    ``group``: runs of one model have the same; they share chunks."""

    run_id: str
    sparse_model_id: str
    words: tuple[str, ...]
    group: str
    point: dict[str, Any] = field(hash=False)


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep in order; ``number`` counts the plans that were kept under its name."""

    sweep: str
    runs: tuple[Planned, ...]
    number: int = 0
    untested: tuple[str, ...] = ()  # what keeps claims of an overridden grid from being tested

    def ids(self) -> list[str]:
        return [run.run_id for run in self.runs]


def make(workspace: Workspace, sweep: Sweep) -> Plan:
    """Expands and validates. Mistakes, a UserError, with one line per mistake (the first 20)."""
    with no_garbage_collection():
        return _made(workspace, sweep)


def _made(workspace: Workspace, sweep: Sweep) -> Plan:
    errors: dict[str, None] = dict.fromkeys(_strays(workspace, sweep))
    found: dict[str, Planned] = {}
    contents: dict[str, str | UserError] = {}  # one question a model, whatever the answer: a hub may be slow to refuse
    unused = Unused()
    hits: set[int] = set()
    for point in _points(workspace, sweep):
        own = Unused()
        try:
            run = resolve(workspace, point, own)
            unused.used |= own.used
            unused.errors |= own.errors
            key = str(run.model)
            if key not in contents:
                contents[key] = _content(workspace, run.model)
            if isinstance(content := contents[key], UserError):
                raise content
        except UserError as error:
            # a combination that cannot be run may be what a rule leaves out
            fits = _excluded(sweep, {**point, "method": "+".join(point["method"])})
            hits.update(fits)
            if not fits:
                errors.setdefault(str(error))
            continue
        planned = _planned(run, {name: one for name, one in point.items() if name not in own.errors}, content)
        # rules are about what the grid says, also where a run has no use for it
        fits = _excluded(sweep, planned.point | {name: one for name, one in point.items() if name in own.errors})
        hits.update(fits)
        if not fits:
            found.setdefault(planned.run_id, planned)
    errors |= dict.fromkeys(str(error) for error in unused.mistakes())
    if not errors and not sweep.overridden:
        idle = [rule for index, rule in enumerate(sweep.exclude) if index not in hits]
        errors |= dict.fromkeys(f"exclude {rule}: no run of the grid fits it" for rule in idle)
    plan = Plan(sweep.name, tuple(found.values()))
    if not errors and not plan.runs:
        errors.setdefault("no run is left after the exclusions")
    untested: list[str] = []
    for claim in sweep.claims if not errors else ():
        problems = check_selects(claim, [run.point for run in plan.runs], sweep.seeds)
        if sweep.overridden:  # another grid may leave a claim without its runs
            untested += problems
        else:
            errors |= dict.fromkeys(problems)
    if errors:
        raise Mistakes(f"sweep {sweep.name}: {len(errors)} mistakes, nothing was started", list(errors))
    return replace(plan, untested=tuple(untested))


def _methods(sweep: Sweep) -> list[list[str]]:
    """The stacks of the axis ``method`` and the baselines that are not among them."""
    methods = [_stack(value) for value in sweep.grid.get("method", ["wanda"])]
    return methods + [[name] for name in sweep.baselines if [name] not in methods]


def _points(workspace: Workspace, sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Every combination of the axes as {key: value}; an axis of a method applies to that method only."""
    grid = {key: values for key, values in sweep.grid.items() if key != "method"}
    if "task" in grid:  # task=[a,b] is one run per task
        grid["task"] = [one for value in grid["task"] for one in (value if isinstance(value, list) else [value])]
    own = {key: values for key, values in grid.items() if key.startswith("method.")}
    common = {key: values for key, values in grid.items() if key not in own}
    for method in _methods(sweep):
        axes = dict(common)
        axes |= {key: values for key, values in own.items() if key.split(".")[1] in method}
        label = "+".join(method)
        if label in sweep.levels:
            axes["sparsity"] = sweep.levels[label]
        axes["seed"] = sweep.seeds if _draws(workspace, method) else sweep.seeds[:1]
        for values in itertools.product(*axes.values()):
            yield {"method": method, **dict(zip(axes, values, strict=True))}


def _draws(workspace: Workspace, method: list[str]) -> bool:
    """Whether the seed can change the result: else all seeds are one run."""
    known = workspace.choices("method")
    kinds = [workspace.group("method", name).get("kind", name) for name in method if name in known]
    uses = [entry for kind in kinds for entry in workspace.catalogue.get("method", kind).uses]
    return any(entry.split(" if ")[0] == "seed" for entry in uses)


def _content(workspace: Workspace, model: Part) -> str | UserError:
    """The hash of the model's content, or why there is none."""
    try:
        content: str = workspace.catalogue.load("model", model.name)(**model.options).content()
    except UserError as error:
        return error
    return content


def _strays(workspace: Workspace, sweep: Sweep) -> Iterator[str]:
    """Axes and levels of methods that are not in the grid. What the file says of a method that the command
    line took out of the grid is no mistake."""
    methods = _methods(sweep)
    names, labels = {name for method in methods for name in method}, {"+".join(method) for method in methods}
    replaced = "method" in sweep.given
    for key in sweep.grid:
        head, _, rest = key.partition(".")
        name = rest.partition(".")[0]
        if head == "method" and rest and name not in names:
            if name not in workspace.choices("method"):
                yield f"{key}: unknown method {name!r}{closest(name, workspace.choices('method'))}"
            elif key in sweep.given or not replaced:
                yield f"{key}: method {name} is not in the grid"
    for label in sweep.levels:
        if label not in labels and not replaced:
            yield f"levels.{label}: no such method in the grid{closest(label, labels)}"


def _stack(value: Any) -> list[str]:
    if isinstance(value, str):
        return value.split("+")
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]


def _planned(run: Run, point: dict[str, Any], content: str) -> Planned:
    """``point``: what this run has a use for; the rest of the grid's keys would be refused as unknown options."""
    words = tuple(_word(key, value) for key, value in point.items() if key != "seed" or run.seed is not None)
    group = f"{run.model.label}-{hashlib.sha256(str(run.model).encode()).hexdigest()[:12]}"
    return Planned(run.run_id(content), run.sparse_model_id(content), words, group, _flat(run))


def _word(key: str, value: Any) -> str:
    """``key=value`` in Hydra's grammar, such that it is read as the same value."""
    if isinstance(value, (list, tuple)) and key == "method" and len(value) == 1:
        return f"{key}={value[0]}"
    return f"{key}={_written(value)}"


def _written(value: Any) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, str) and (not _PLAIN.fullmatch(value) or value.lower() in _NOT_TEXT):
        return QuotedString(value, Quote.single).with_quotes()
    return str(value)


def _flat(run: Run) -> dict[str, Any]:
    """The point as claims select it: names, levels, and every option under its dotted key."""
    point: dict[str, Any] = {
        "method": run.label,
        "model": run.model.label,
        "task": run.task.label,
        "calibration": run.calibration.label if run.calibration else None,
        "sparsity": run.sparsity,
        "pattern": run.pattern,
        "seed": run.seed,
    }
    parts = [("model", run.model), ("task", run.task), ("calibration", run.calibration)]
    parts += [(f"method.{part.label}", part) for part in run.methods]
    for prefix, part in parts:
        if part is not None:
            options = {key: list(one) if isinstance(one, tuple) else one for key, one in part.options.items()}
            point |= {f"{prefix}.{key}": value for key, value in options.items()}
    return point


def _excluded(sweep: Sweep, point: dict[str, Any]) -> list[int]:
    """The rules of ``exclude`` that leave the point out, by their places."""
    return [index for index, rule in enumerate(sweep.exclude) if fits(rule, point)]


def fits(rule: Mapping[str, list[Any]], point: Mapping[str, Any]) -> bool:
    """Whether a rule of ``exclude`` leaves the point out."""
    return all(any(_same(point.get(key), one) for one in values) for key, values in rule.items())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and not isinstance(a, bool):
        return abs(a - b) <= 1e-9
    return bool(a == b)


def keep(plan: Plan, store: Path) -> tuple[Plan, list[str], list[str]]:
    """Writes the plan beside the records unless the newest kept one is the same; returns it with its
    number, and the run ids that are new in it and that are no longer in it. UserError when the store
    cannot be written."""
    folder = store / "plans" / plan.sweep
    kept = newest(store, plan.sweep)
    before, now = (set(kept.ids()) if kept else set()), set(plan.ids())
    new = [run_id for run_id in plan.ids() if run_id not in before]
    gone = [run_id for run_id in kept.ids() if run_id not in now] if kept else []
    # The same runs can be asked for in other words (a model that has moved): those of today count.
    if kept and not new and not gone and {run.words for run in kept.runs} == {run.words for run in plan.runs}:
        return replace(kept, untested=plan.untested), [], []
    number = (kept.number if kept else 0) + 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{secrets.token_hex(8)}"
        try:
            temporary.write_text("\n".join(_lines(plan, number)) + "\n", encoding="utf-8")
            while True:  # another process may keep a plan at the same moment
                try:
                    os.link(temporary, folder / f"{number:04}.jsonl")
                    break
                except FileExistsError:
                    number += 1
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"store={store}: cannot be written: {error.strerror or error}; give another folder") from None
    return replace(plan, number=number), new, gone


def _lines(plan: Plan, number: int) -> Iterator[str]:
    """The header, which holds what is the same for every run's point, then one line per run."""
    common = dict(plan.runs[0].point) if plan.runs else {}
    for run in plan.runs:
        common = {key: value for key, value in common.items() if key in run.point and run.point[key] == value}
    header = {"sweep": plan.sweep, "version": __version__, "runs": len(plan.runs), "number": number, "point": common}
    yield json.dumps(header)
    for run in plan.runs:
        point = {key: value for key, value in run.point.items() if key not in common}
        yield json.dumps({**vars(run), "words": list(run.words), "point": point}, separators=(",", ":"))


def newest(store: Path, sweep: str) -> Plan | None:
    """The newest plan kept under that name, or None."""
    numbers = [int(file.stem) for file in (store / "plans" / sweep).glob("*.jsonl") if file.stem.isdigit()]
    if not numbers:
        return None
    file = store / "plans" / sweep / f"{max(numbers):04}.jsonl"
    with no_garbage_collection():
        header, *lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        common = header["point"]
        runs = tuple(
            Planned(one["run_id"], one["sparse_model_id"], tuple(one["words"]), one["group"], common | one["point"])
            for one in lines
        )
    return Plan(sweep, runs, max(numbers))


def chunks(runs: Sequence[Planned], size: int) -> list[list[Planned]]:
    """Runs of one model together, those of one sparse model next to each other, at most ``size`` a chunk.

    A sparse model is never split over two chunks unless it alone has more runs than ``size``.
    """
    grouped: dict[str, dict[str, list[Planned]]] = {}
    for run in runs:
        grouped.setdefault(run.group, {}).setdefault(run.sparse_model_id, []).append(run)
    made: list[list[Planned]] = []
    for models in grouped.values():
        current: list[Planned] = []
        for piece in _pieces(models.values(), size):
            if current and len(current) + len(piece) > size:
                made.append(current)
                current = []
            current = current + piece
        made.append(current)
    return made


def _pieces(groups: Iterable[list[Planned]], size: int) -> Iterator[list[Planned]]:
    for group in groups:
        for start in range(0, len(group), size):
            yield group[start : start + size]
