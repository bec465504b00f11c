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

from sparsebench.config import Workspace, parse_values, runs
from sparsebench.errors import Mistakes, UserError
from sparsebench.results.store import Store
from sparsebench.results.tail import Tail
from sparsebench.results.tracking import TRACKING, Mirror, mirror
from sparsebench.settings import Group
from sparsebench.sweep import plan as plans
from sparsebench.sweep import slurm, spec
from sparsebench.sweep.engine import Engine, cancel_file
from sparsebench.sweep.launch import ClusterOptions, Inline, Launcher, Local

CLUSTER = Group("cluster", "launcher", ("inline", "local", "slurm"), ClusterOptions)
_END_ROUNDS = 50  # tenths of a second that a worker may take to end
_ORDER = ("ok", "failed", "lost", "running", "pending")


@dataclass(frozen=True)
class Request:
    """What the words behind ``sweep`` ask for, taken apart."""

    store: Path
    launcher: str
    options: ClusterOptions
    retry: bool
    tracking: list[str]  # words of tracking
    words: list[str]  # what belongs to the sweep itself

    @classmethod
    def of(cls, words: Sequence[str], default_store: Path, config_dir: Path | None = None) -> Request:
        given = parse_values([word for word in words if word.partition("=")[0] in ("retry", "store")])
        single = {key: values[0] for key, values in given.items() if len(values) == 1}
        if len(single) < len(given):
            raise UserError(f"{next(iter(set(given) - set(single)))}: takes one value")
        launcher, options = CLUSTER.chosen(words, "local", config_dir)
        retry = single.get("retry")
        if retry not in (None, "failed"):
            raise UserError(f"retry={retry}: valid: failed")
        store = Path(str(single.get("store", default_store))).expanduser()
        tracking = [word for word in words if TRACKING.owns(word)]
        rest = [word for word in words if not (CLUSTER.owns(word) or TRACKING.owns(word))]
        rest = [word for word in rest if word.partition("=")[0] not in ("retry", "store")]
        return cls(store, launcher, options, retry == "failed", tracking, rest)


def run(workspace: Workspace, name: str, words: Sequence[str], default_store: Path, *, only_plan: bool) -> int:
    """``sweep <name>``: plans, then (unless ``only_plan``) runs to the end. The exit code."""
    request = Request.of(words, default_store, workspace.config_dir)
    sweep = spec.load(workspace, name, request.words)
    plan = plans.make(workspace, sweep)
    store = Store(request.store)
    store.check_writable()
    mirror(request.tracking, store, name, workspace.config_dir)  # a mistake is told before anything starts
    tail = Tail(store.folder)
    tail.look()
    for problem in plan.untested:
        _say(f"untested: {problem}")
    if only_plan:
        print(_described(plan, tail, request))
        return 0
    launcher = _launcher(request, store.folder, plan)
    if request.launcher != "slurm":  # a login node need not be able to load the models
        _check(workspace, plan, store, tail)
    plan, new, gone = plans.keep(plan, store.folder)
    if plan.number > 1 and (new or gone):
        _say(f"plan {plan.number} of {name}: {len(new)} runs are new, {len(gone)} are no longer in it")
    redo = {run_id for run_id in plan.ids() if request.retry and tail.status(run_id) == "failed"}
    with _Display(name) as display:
        tracking = tuple(request.tracking)
        engine = Engine(plan, store, launcher, request.options, workspace.config_dir, redo, display.look, tracking)
        counts = engine.run()
    print(_summary(name, plan, engine.tail, counts, _again(store.folder, workspace.config_dir)))
    again = mirror(request.tracking, store, name, workspace.config_dir)  # what the workers mirrored is known to it
    if again is not None:
        _track(plan, engine.tail, again)
    return 0 if counts["ok"] == len(plan.runs) else 1


def _check(workspace: Workspace, plan: plans.Plan, store: Store, tail: Tail) -> None:
    """Mistakes that only the models themselves can tell (a pattern that does not divide a layer, a text that is too
    short), found before anything starts: one run of each kind is checked, its level and seed aside."""
    kinds: dict[str, plans.Planned] = {}
    for run in plan.runs:
        if tail.status(run.run_id) != "ok":
            kinds.setdefault(
                str([(k, v) for k, v in run.point.items() if k.rpartition(".")[2] not in ("sparsity", "seed")]), run
            )
    if not kinds:
        return
    from sparsebench.experiment import Experiment

    experiment = Experiment(workspace, store)
    found = [run for planned in kinds.values() for run in runs(workspace, planned.words)]
    errors = dict.fromkeys(str(error) for error in experiment.problems(found))
    if errors:
        raise Mistakes(f"sweep {plan.sweep}: {len(errors)} mistakes, nothing was started", list(errors))


def track(name: str, words: Sequence[str], store: Path, config_dir: Path | None) -> int:
    """``track <sweep>``: mirrors the finished runs of its newest plan that were not mirrored yet. The exit code."""
    plan = plans.newest(store, name)
    if plan is None:
        raise UserError(f"track {name}: store={store} has no plan of that name; start it with: sweep {name}")
    chosen = words if any(word.startswith("tracking=") for word in words) else ["tracking=wandb", *words]
    mirrored = mirror(chosen, Store(store), name, config_dir)
    if mirrored is None:
        raise UserError("tracking=none: nothing to mirror to; valid: wandb")
    tail = Tail(store)
    tail.look()
    return 0 if _track(plan, tail, mirrored) else 1


def _track(plan: plans.Plan, tail: Tail, mirrored: Mirror) -> bool:
    """Mirrors what was not yet, says what was done; whether all of it went well."""
    records = [tail.best[run_id] for run_id in plan.ids() if tail.status(run_id) in ("ok", "failed")]
    fresh = [record for record in records if not mirrored.has(record)]
    done = sum(mirrored.push(record) for record in fresh)
    _say(f"{plan.sweep}: {done} runs mirrored now, {len(records) - len(fresh)} before")
    for line in mirrored.told().splitlines():
        _say(line)
    return not mirrored.problems


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
