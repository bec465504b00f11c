"""The verbs ``sweep``, ``status``, ``cancel`` and ``logs``."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsebench.config import Workspace, parse_values
from sparsebench.declare import options_of
from sparsebench.errors import UserError, closest
from sparsebench.paths import data_folder
from sparsebench.results.store import Store
from sparsebench.results.tail import Tail
from sparsebench.sweep import plan as plans
from sparsebench.sweep import slurm, spec
from sparsebench.sweep.engine import Engine, cancel_file
from sparsebench.sweep.launch import ClusterOptions, Inline, Launcher, Local

LAUNCHERS = ("inline", "local", "slurm")
_END_ROUNDS = 50  # tenths of a second that a worker may take to end
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
    def of(cls, words: Sequence[str], default_store: Path, config_dir: Path | None = None) -> Request:
        given: dict[str, Any] = {**parse_values([w for w in words if _is_ours(w)])}
        single = {key: values[0] for key, values in given.items() if len(values) == 1}
        if len(single) < len(given):
            raise UserError(f"{next(iter(set(given) - set(single)))}: takes one value")
        launcher, settings = _settings(str(single.pop("cluster", "local")), config_dir)
        retry = single.pop("retry", None)
        if retry not in (None, "failed"):
            raise UserError(f"retry={retry}: valid: failed")
        store = Path(str(single.pop("store", default_store))).expanduser()
        options = _cluster(settings | single)
        return cls(store, launcher, options, retry == "failed", [word for word in words if not _is_ours(word)])


def _is_ours(word: str) -> bool:
    key = word.partition("=")[0]
    return key in ("cluster", "retry", "store") or key.startswith("cluster.")


def _settings(name: str, config_dir: Path | None) -> tuple[str, dict[str, Any]]:
    """The launcher and the ``cluster.*`` options that ``cluster/<name>.yaml`` names (a user's before the project's)."""
    import yaml

    known: dict[str, Path] = {}
    for folder in (data_folder("conf"), *([config_dir] if config_dir else [])):
        known |= {file.stem: file for file in sorted((folder / "cluster").glob("*.yaml"))}
    if name not in known:
        raise UserError(f"cluster={name}: unknown launcher{closest(name, known)}")
    try:
        content = yaml.safe_load(known[name].read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{known[name]}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{known[name]}: holds `launcher:` and options of cluster, one a line")
    launcher = str(content.pop("launcher", name))
    if launcher not in LAUNCHERS:
        raise UserError(f"{known[name]}: launcher: {launcher}: unknown launcher{closest(launcher, LAUNCHERS)}")
    return launcher, {f"cluster.{key}": value for key, value in content.items()}


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
    request = Request.of(words, default_store, workspace.config_dir)
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
    launcher = _launcher(request, store.folder, plan)
    plan, new, gone = plans.keep(plan, store.folder)
    if plan.number > 1 and (new or gone):
        _say(f"plan {plan.number} of {name}: {len(new)} runs are new, {len(gone)} are no longer in it")
    redo = {run_id for run_id in plan.ids() if request.retry and tail.status(run_id) == "failed"}
    with _Display(name) as display:
        engine = Engine(plan, store, launcher, request.options, workspace.config_dir, redo, display.look)
        counts = engine.run()
    print(_summary(name, plan, engine.tail, counts, _again(store.folder, workspace.config_dir)))
    return 0 if counts["ok"] == len(plan.runs) else 1


def _launcher(request: Request, store: Path, plan: plans.Plan) -> Launcher:
    """UserError when it cannot start anything, or when jobs of another grid are still alive."""
    if request.launcher == "inline":
        return Inline()
    launcher: Launcher = Local.of(store / "jobs" / plan.sweep, request.options.workers)
    if request.launcher == "slurm":
        launcher = slurm.Slurm.of(store, plan.sweep, request.options)
    planned = set(plan.ids())
    earlier = launcher.attach()
    foreign = [job for job, run_ids in earlier.items() if not planned.issuperset(run_ids)]
    if foreign:
        raise UserError(
            f"sweep {plan.sweep}: {len(foreign)} jobs of its plan before, another grid, are still alive "
            f"({foreign[0]} ...): wait for them, or `cancel {plan.sweep}`"
        )
    if earlier:
        _say(f"sweep {plan.sweep}: {len(earlier)} jobs that were started earlier are still at work and are counted in")
    return launcher


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
    print(_summary(name, plan, tail, counts, _again(store, None)))
    queued = slurm.described(store, name)
    if queued:
        print(queued)
    return 0


def cancel(name: str, store: Path) -> int:
    """``cancel <sweep>``: stops its engine, ends its workers (processes of this machine, jobs in the queue) and
    marks what they were at as lost."""
    plan = plans.newest(store, name)
    if plan is None:
        raise UserError(f"cancel {name}: store={store} has no plan of that name")
    folder = store / "jobs" / name
    folder.mkdir(parents=True, exist_ok=True)
    cancel_file(store, name).touch()  # before its workers end, so that it starts no others
    local, queue = Local.of(folder, 1), slurm.Queue(store.resolve() / "jobs")
    processes = len(local.attach())
    local.stop()
    jobs = slurm.cancel(queue, name)
    for _ in range(_END_ROUNDS):
        if not local.alive():
            break
        time.sleep(0.1)
    tail = Tail(store)
    tail.look()
    open_runs = [run_id for run_id in plan.ids() if run_id in tail.running]
    lost = sum(Store(store).declare_lost(run_id, queue.gone, "cancelled") for run_id in open_runs)
    ended = f"{processes} processes and {jobs} jobs ended" if jobs else f"{processes} processes ended"
    print(f"cancelled {name}: {ended}, {lost} runs marked lost; `sweep {name}` goes on where it stopped")
    return 0


def logs(run_id: str, store: Path) -> int:
    """``logs <run id>``: the record's error and traceback, and the end of the worker's log."""
    matching = [r for r in Store(store).records() if r["run_id"].startswith(run_id)]
    if len(matching) != 1:
        raise UserError(f"logs {run_id}: {len(matching)} runs have an id that begins so")
    record = matching[0]
    print(f"{record['run_id']} {record.get('method')} {record['status']} {record.get('error') or ''}")
    for row in Store(store).details("errors", record["run_id"], record["attempt"]):
        print(row["error"])
    chunks = [file for file in (store / "jobs").glob("*/*.json") if record["run_id"] in file.read_text("utf-8")]
    for log in [*sorted(file.with_suffix(".log") for file in chunks), *slurm.logs_of(store / "jobs", record["run_id"])]:
        if log.exists():
            print(f"--- {log}")
            print("\n".join(log.read_text(errors="replace").splitlines()[-20:]))
    return 0


def _described(plan: plans.Plan, tail: Tail, request: Request) -> str:
    done = [run_id for run_id in plan.ids() if tail.status(run_id) == "ok"]
    made = set(done)
    open_runs = [run for run in plan.runs if run.run_id not in made]
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


def _again(store: Path, config_dir: Path | None) -> list[str]:
    """The words behind a run's own that make it again in the same store."""
    return ["force=true", f"store={store}", *(["--config-dir", str(config_dir)] if config_dir else [])]


def _summary(name: str, plan: plans.Plan, tail: Tail, counts: Counter[str], again: list[str]) -> str:
    """Counts in all and by method, and for what failed or was lost why, and the command that makes it again."""
    lines = [f"{name}: {len(plan.runs)} runs: " + ", ".join(f"{counts[s]} {s}" for s in _ORDER if counts[s])]
    states = {run.run_id: tail.status(run.run_id) or "pending" for run in plan.runs}
    methods: dict[str, Counter[str]] = {}
    for run in plan.runs:
        methods.setdefault(str(run.point["method"]), Counter())[states[run.run_id]] += 1
    for method, own in sorted(methods.items()) if len(methods) > 1 else ():
        lines.append(f"  {method:<20} " + ", ".join(f"{own[s]} {s}" for s in _ORDER if own[s]))
    for run in plan.runs:
        if states[run.run_id] in ("failed", "lost"):
            lines.append(f"  {run.run_id[:8]} {states[run.run_id]}: {tail.best[run.run_id].get('error')}")
            lines.append(f"           python -m sparsebench {shlex.join([*run.words, *again])}")
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
