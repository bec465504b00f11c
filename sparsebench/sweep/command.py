"""The verbs ``sweep``, ``status``, ``cancel`` and ``logs``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsebench.config import Workspace, parse_values
from sparsebench.declare import options_of
from sparsebench.errors import UserError, closest
from sparsebench.results.store import Store, vanished
from sparsebench.results.tail import Tail
from sparsebench.sweep import plan as plans
from sparsebench.sweep import spec
from sparsebench.sweep.engine import Engine
from sparsebench.sweep.launch import ClusterOptions, Inline, Launcher, Local

LAUNCHERS = ("inline", "local")
_ORDER = ("ok", "failed", "lost", "running", "pending")


@dataclass(frozen=True)
class Request:
    """What the words behind ``sweep`` ask for, taken apart."""

    store: Path
    launcher: str
    options: ClusterOptions
    retry: bool
    words: list[str]  # what belongs to the sweep itself

    @classmethod
    def of(cls, words: Sequence[str], default_store: Path) -> Request:
        given = {k: v for k, v in parse_values([w for w in words if _is_ours(w)]).items()}
        single = {key: values[0] for key, values in given.items() if len(values) == 1}
        if len(single) < len(given):
            raise UserError(f"{next(iter(set(given) - set(single)))}: takes one value")
        launcher = single.pop("cluster", "local")
        if launcher not in LAUNCHERS:
            raise UserError(f"cluster={launcher}: unknown launcher{closest(str(launcher), LAUNCHERS)}")
        retry = single.pop("retry", None)
        if retry not in (None, "failed"):
            raise UserError(f"retry={retry}: valid: failed")
        store = Path(str(single.pop("store", default_store))).expanduser()
        return cls(store, launcher, _cluster(single), retry == "failed", [w for w in words if not _is_ours(w)])


def _is_ours(word: str) -> bool:
    key = word.partition("=")[0]
    return key in ("cluster", "retry", "store") or key.startswith("cluster.")


def _cluster(given: dict[str, Any]) -> ClusterOptions:
    valid = options_of(ClusterOptions)
    found = {}
    for key, value in given.items():
        name = key.removeprefix("cluster.")
        if name not in valid:
            raise UserError(f"{key}: unknown option of cluster{closest(name, valid)}")
        found[name] = valid[name].check(key, value)
    return ClusterOptions(**found)


def run(workspace: Workspace, name: str, words: Sequence[str], default_store: Path, *, only_plan: bool) -> int:
    """``sweep <name>``: plans, then (unless ``only_plan``) runs to the end. The exit code."""
    request = Request.of(words, default_store)
    sweep = spec.load(workspace, name, request.words)
    plan = plans.make(workspace, sweep)
    store = Store(request.store)
    store.check_writable()
    tail = Tail(store.folder)
    tail.look()
    for problem in plan.untested:
        _say(f"untested: {problem}")
    if only_plan:
        print(_described(plan, tail, request))
        return 0
    plan, new, gone = plans.keep(plan, store.folder)
    if plan.number > 1 and (new or gone):
        _say(f"plan {plan.number} of {name}: {len(new)} runs are new, {len(gone)} are no longer in it")
    redo = {run_id for run_id in plan.ids() if request.retry and tail.status(run_id) == "failed"}
    launcher = _launcher(request, store.folder / "jobs" / name)
    with _Display(name) as display:
        engine = Engine(plan, store, launcher, request.options, workspace.config_dir, redo, display.look)
        counts = engine.run()
    print(_summary(name, plan, engine.tail, counts))
    return 0 if counts["ok"] == len(plan.runs) else 1


def _launcher(request: Request, folder: Path) -> Launcher:
    if request.launcher == "inline":
        return Inline()
    return Local.of(folder, request.options.workers)


def detach(words: Sequence[str], name: str, store: Path) -> int:
    """Starts the same command as a process of its own and returns at once."""
    folder = store / "jobs" / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "engine.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sparsebench", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    print(f"sweep {name} goes on as process {process.pid}; `status {name}` shows it, log: {folder / 'engine.log'}")
    return 0


def status(name: str, store: Path) -> int:
    """``status <sweep>``: what is done, running, failed, lost and pending of the newest plan."""
    plan = plans.newest(store, name)
    if plan is None:
        raise UserError(f"status {name}: store={store} has no plan of that name; start it with: sweep {name}")
    tail = Tail(store)
    tail.look()
    counts = Counter(tail.status(run_id) or "pending" for run_id in plan.ids())
    print(_summary(name, plan, tail, counts))
    return 0


def cancel(name: str, store: Path) -> int:
    """``cancel <sweep>``: ends the worker processes of this machine and marks what they were at as lost."""
    plan = plans.newest(store, name)
    if plan is None:
        raise UserError(f"cancel {name}: store={store} has no plan of that name")
    ended = 0
    for file in sorted((store / "jobs" / name).glob("*.json")):
        for process in _processes_of(file):
            os.kill(process, signal.SIGTERM)
            ended += 1
    lost = sum(Store(store).declare_lost(run_id, vanished, "cancelled") for run_id in plan.ids()) if ended else 0
    print(
        f"cancelled {name}: {ended} processes ended, {lost} runs marked lost; `sweep {name}` goes on where it stopped"
    )
    return 0


def _processes_of(chunk: Path) -> list[int]:
    """Processes of this machine whose command line names the chunk's file."""
    wanted, found = str(chunk).encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile, or is somebody else's
            continue
        if wanted in words and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def logs(run_id: str, store: Path) -> int:
    """``logs <run id>``: the record's error and traceback, and the end of the worker's log."""
    matching = [r for r in Store(store).records() if r["run_id"].startswith(run_id)]
    if len(matching) != 1:
        raise UserError(f"logs {run_id}: {len(matching)} runs have an id that begins so")
    record = matching[0]
    print(f"{record['run_id']} {record.get('method')} {record['status']} {record.get('error') or ''}")
    for row in Store(store).details("errors", record["run_id"], record["attempt"]):
        print(row["error"])
    for file in sorted((store / "jobs").glob("*/*.json")):
        if record["run_id"] in file.read_text(encoding="utf-8") and file.with_suffix(".log").exists():
            print(f"--- {file.with_suffix('.log')}")
            print("\n".join(file.with_suffix(".log").read_text(errors="replace").splitlines()[-20:]))
    return 0


def _described(plan: plans.Plan, tail: Tail, request: Request) -> str:
    done = [run_id for run_id in plan.ids() if tail.status(run_id) == "ok"]
    open_runs = [run for run in plan.runs if run.run_id not in set(done)]
    timed = [tail.best[run_id].get("seconds") or 0.0 for run_id in done]
    each = sum(timed) / len(timed) if timed else None
    size = max(1, int(request.options.chunk_minutes * 60 / (each or 10.0)))
    groups = plans.chunks(open_runs, size)
    flops = [tail.best[run_id].get("flops_prefill") for run_id in done]
    lines = [
        f"{plan.sweep}: {len(plan.runs)} runs, {len(done)} already in {request.store}, {len(open_runs)} to make",
        f"{len({run.sparse_model_id for run in plan.runs})} sparse models, {len(groups)} chunks of at most {size} runs",
    ]
    if each:
        lines.append(f"about {each * len(open_runs) / 60:.1f} minutes on one worker ({each:.1f} s a run so far)")
        known = [float(one) for one in flops if one]
        if known:
            lines.append(f"{sum(known) / len(known):.3g} FLOPs per evaluated token on average so far")
    return "\n".join(lines)


def _summary(name: str, plan: plans.Plan, tail: Tail, counts: Counter[str]) -> str:
    lines = [f"{name}: {len(plan.runs)} runs: " + ", ".join(f"{counts[s]} {s}" for s in _ORDER if counts[s])]
    methods = sorted({str(run.point["method"]) for run in plan.runs})
    for method in methods if len(methods) > 1 else ():
        own = Counter(tail.status(r.run_id) or "pending" for r in plan.runs if r.point["method"] == method)
        lines.append(f"  {method:<20} " + ", ".join(f"{own[s]} {s}" for s in _ORDER if own[s]))
    for run in plan.runs:
        state = tail.status(run.run_id)
        if state in ("failed", "lost"):
            lines.append(f"  {run.run_id[:8]} {state}: {tail.best[run.run_id].get('error')}")
            lines.append(f"           python -m sparsebench {' '.join(run.words)} force=true")
    return "\n".join(lines)


class _Display:
    """A live line on stderr while the engine works; silent when that is not a terminal."""

    def __init__(self, name: str) -> None:
        self.name, self.live = name, sys.stderr.isatty()

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            print(file=sys.stderr)

    def look(self, counts: Counter[str], left: float | None) -> None:
        if self.live:
            states = ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
            rest = f", about {left / 60:.1f} min left" if left else ""
            print(f"\r\033[K{self.name}: {states}{rest}", end="", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    print(f"sparsebench: {text}", file=sys.stderr)
