"""From a sweep to its runs: expand the grid, validate every point, give it its id, see what is done.

Everything is checked before anything is started; all mistakes are reported at once. A plan is kept
in the store (``plans/<sweep>/<number>.jsonl``: a header, then one line per run), so that what belongs
to a sweep never depends on the records.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsebench import __version__
from sparsebench.analysis.claims import check_selects
from sparsebench.config import Unused, Workspace, resolve
from sparsebench.errors import Mistakes, UserError
from sparsebench.run import Run
from sparsebench.sweep.spec import Sweep


@dataclass(frozen=True)
class Planned:
    """One run of a plan: its ids, the words that make it again on the command line, its flat point."""

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
    """Expands and validates. UserError with one line per mistake (the first 20)."""
    errors: dict[str, None] = {}
    found: dict[str, Planned] = {}
    contents: dict[str, str] = {}
    unused = Unused()
    for point in _points(sweep):
        try:
            run = resolve(workspace, point, unused)
            key = str(run.model)
            if key not in contents:
                contents[key] = workspace.catalogue.load("model", run.model.name)(**run.model.options).content()
        except UserError as error:
            errors.setdefault(str(error))
            continue
        planned = _planned(run, point, contents[key])
        if not _excluded(sweep, planned.point):
            found.setdefault(planned.run_id, planned)
    errors |= dict.fromkeys(str(error) for error in unused.mistakes())
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


def _points(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Every combination of the axes as {key: value}; an axis of a method applies to that method only."""
    grid = dict(sweep.grid)
    methods = [_stack(value) for value in grid.pop("method", ["wanda"])]
    methods += [[name] for name in sweep.baselines if [name] not in methods]
    own = {key: values for key, values in grid.items() if key.startswith("method.")}
    common = {key: values for key, values in grid.items() if key not in own}
    for method in methods:
        axes = dict(common)
        axes |= {key: values for key, values in own.items() if key.split(".")[1] in method}
        label = "+".join(method)
        if label in sweep.levels:
            axes["sparsity"] = sweep.levels[label]
        axes["seed"] = sweep.seeds
        for values in itertools.product(*axes.values()):
            yield {"method": method, **dict(zip(axes, values, strict=True))}


def _stack(value: Any) -> list[str]:
    if isinstance(value, str):
        return value.split("+")
    return [str(one) for one in value]


def _planned(run: Run, point: dict[str, Any], content: str) -> Planned:
    words = tuple(_word(key, value) for key, value in point.items() if key != "seed" or run.seed is not None)
    return Planned(run.run_id(content), run.sparse_model_id(content), words, str(run.model), _flat(run))


def _word(key: str, value: Any) -> str:
    """``key=value`` in Hydra's grammar."""
    if value is None:
        return f"{key}=null"
    if isinstance(value, bool):
        return f"{key}={str(value).lower()}"
    if isinstance(value, (list, tuple)):
        return f"{key}=[{','.join(_word('', one)[1:] for one in value)}]"
    if isinstance(value, str) and not value.replace("_", "").replace("-", "").replace(".", "").isalnum():
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"{key}='{escaped}'"
    return f"{key}={value}"


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
            point |= {f"{prefix}.{key}": value for key, value in part.options.items()}
    return point


def _excluded(sweep: Sweep, point: dict[str, Any]) -> bool:
    def fits(rule: dict[str, list[Any]]) -> bool:
        return all(any(_same(point.get(key), one) for one in values) for key, values in rule.items())

    return any(fits(rule) for rule in sweep.exclude)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and not isinstance(a, bool):
        return abs(a - b) <= 1e-9
    return bool(a == b)


def keep(plan: Plan, store: Path) -> tuple[Plan, list[str], list[str]]:
    """Writes the plan beside the records unless the newest kept one has the same runs; returns it with
    its number, and the run ids that are new in it and that are no longer in it."""
    folder = store / "plans" / plan.sweep
    kept = newest(store, plan.sweep)
    before = kept.ids() if kept else []
    new = [run_id for run_id in plan.ids() if run_id not in set(before)]
    gone = [run_id for run_id in before if run_id not in set(plan.ids())]
    if kept and not new and not gone:
        return replace(kept, untested=plan.untested), [], []
    number = (kept.number if kept else 0) + 1
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"sweep": plan.sweep, "number": number, "version": __version__, "runs": len(plan.runs)}]
    lines += [{**vars(run), "words": list(run.words)} for run in plan.runs]
    file = folder / f"{number:04}.jsonl"
    temporary = file.with_suffix(f".{id(plan)}.tmp")
    temporary.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    temporary.rename(file)
    return replace(plan, number=number), new, gone


def newest(store: Path, sweep: str) -> Plan | None:
    """The newest plan kept under that name, or None."""
    files = sorted((store / "plans" / sweep).glob("*.jsonl"))
    if not files:
        return None
    header, *lines = [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()]
    runs = (Planned(**(line | {"words": tuple(line["words"])})) for line in lines)
    return Plan(sweep, tuple(runs), int(header["number"]))


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
