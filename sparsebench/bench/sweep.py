"""Runs an hour in chunks against one process per run, and what the orchestration itself costs.

The same grid is made twice on this machine, with as many processes at once: by a sweep, whose runs share imports,
model, data and sparse models within a chunk, and by one ``python -m sparsebench`` for each run. Then a plan of runs
that do nothing but begin and end their records goes through the engine: what that takes per run is overhead.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsebench.bench.base import Report, Say
from sparsebench.declare import Declared, option
from sparsebench.errors import UserError
from sparsebench.paths import import_path
from sparsebench.results.store import Store
from sparsebench.run import Run
from sparsebench.sweep import plan as plans
from sparsebench.sweep.chunk import Chunk
from sparsebench.sweep.engine import Engine
from sparsebench.sweep.launch import ClusterOptions, Inline
from sparsebench.sweep.plan import Plan, Planned

_SETTINGS = ("row", "layer")  # of magnitude and random: with five seeds each, ten settings


@dataclass(frozen=True)
class Options(Declared):
    """What is measured."""

    runs: int = option(100, "runs of the grid: ten settings by runs / 10 levels", low=10, high=1000)
    singles: int = option(100, "how many of them are made by a process of their own", low=1, high=1000)
    idle: int = option(1000, "runs that do nothing, for the overhead", low=1, high=100_000)
    workers: int = option(0, "processes at once; 0: one per two cores", low=0, high=1024)
    windows: int = option(8, "windows of text that a run scores", low=1, high=10_000)


def run(options: Options, say: Say) -> Report:
    """Runs per hour both ways, their ratio, seconds of work in a run, and milliseconds of overhead per run."""
    workers = options.workers or max(1, (os.cpu_count() or 1) // 2)
    with tempfile.TemporaryDirectory(prefix="sparsebench-bench-") as folder:
        top = Path(folder)
        say(f"{options.runs} runs in chunks, {workers} processes at once")
        chunked = _chunked(options, workers, top)
        singles = min(options.singles, options.runs)
        say(f"{singles} runs with a process each, {workers} at once")
        alone = _alone(options, workers, singles, top)
        say(f"{options.idle} runs that do nothing")
        overhead = _idle(options.idle, top)
    rows = [_row("chunked", chunked), _row("one process per run", alone)]
    rows[0]["against one process"] = rows[0]["runs an hour"] / rows[1]["runs an hour"]
    notes = [f"overhead: {1000 * overhead:.1f} ms a run over {options.idle} runs that only begin and end their records"]
    return Report(rows, {"processes at once": workers, "cores": os.cpu_count()}, notes)


@dataclass(frozen=True)
class _Timed:
    runs: int
    seconds: float
    work: float  # mean seconds inside a run


def _row(what: str, timed: _Timed) -> dict[str, Any]:
    return {
        "how": what,
        "runs": timed.runs,
        "seconds": timed.seconds,
        "work a run (s)": timed.work,
        "runs an hour": 3600 * timed.runs / timed.seconds,
    }


def _grid(options: Options) -> list[str]:
    """The grid's words: random pruning by row and by layer with five seeds each, at levels up to 0.9."""
    levels = ",".join(f"{0.9 * (index + 1) / (options.runs // 10):.4f}" for index in range(options.runs // 10))
    common = ["model=tiny_100k", "task=perplexity", f"task.windows={options.windows}", "method=random"]
    return [*common, f"method.random.group={','.join(_SETTINGS)}", f"sparsity={levels}", "seed=0,1,2,3,4"]


def _chunked(options: Options, workers: int, top: Path) -> _Timed:
    """The grid as a sweep of its own through the command line, with the local launcher."""
    sweeps = top / "mine" / "sweeps"
    sweeps.mkdir(parents=True)
    axes = "".join(f"  {key}: [{value}]\n" for key, value in (word.split("=", 1) for word in _grid(options)[:-1]))
    (sweeps / "bench.yaml").write_text(f"summary: bench\ngrid:\n{axes}seeds: [0, 1, 2, 3, 4]\nbaselines: []\n", "utf-8")
    words = ["sweep", "bench", "--config-dir", str(top / "mine"), f"store={top / 'chunked'}"]
    started = time.perf_counter()
    _command([*words, f"cluster.workers={workers}"])
    return _timed(top / "chunked", time.perf_counter() - started)


def _alone(options: Options, workers: int, count: int, top: Path) -> _Timed:
    """Evenly chosen runs of the grid, each by its own command."""
    from sparsebench.config import Workspace, runs

    points = [
        [
            *("method=random", "model=tiny_100k", f"task.windows={options.windows}", f"seed={run.seed}"),
            *(f"method.random.group={run.methods[0].options['group']}", f"sparsity={run.sparsity}"),
        ]
        for run in runs(Workspace(None), _grid(options), sweep=True)
    ]
    chosen = points[:: max(1, len(points) // count)][:count]
    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda words: _command([*words, f"store={top / 'alone'}"], workers), chosen))
    return _timed(top / "alone", time.perf_counter() - started)


def _command(words: Sequence[str], workers: int = 0) -> None:
    threads = max(1, (os.cpu_count() or 1) // workers) if workers else 0
    env = os.environ | {"PYTHONPATH": import_path()} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    ended = subprocess.run([sys.executable, "-m", "sparsebench", *words], env=env, capture_output=True, text=True)
    if ended.returncode:
        raise UserError(
            f"bench sweep: `{' '.join(words)}` ended with {ended.returncode}: {ended.stderr.strip()[-300:]}"
        )


def _timed(store: Path, seconds: float) -> _Timed:
    records = [record for record in Store(store).records() if record["status"] == "ok"]
    return _Timed(len(records), seconds, sum(record["seconds"] for record in records) / len(records))


@dataclass
class _IdleExperiment:
    """Begins and ends records."""

    workspace: Any
    store: Store

    def run(self, run: Run) -> dict[str, Any]:
        run_id = run.run_id("idle")
        self.store.find(run_id)
        return self.store.begin(run_id, {"method": run.label}).finish("ok", {"seconds": 0.0})


class _IdleChunk(Chunk):
    def _experiment(self) -> Any:
        from sparsebench.config import Workspace

        return _IdleExperiment(Workspace(None), Store(Path(self.store)))


class _IdleInline(Inline):
    def start(self, chunks: Sequence[Chunk], label: str) -> list[str]:
        return super().start([_IdleChunk(**vars(chunk)) for chunk in chunks], label)


def _idle(count: int, top: Path) -> float:
    """Seconds a run of an engine whose runs do nothing."""
    from sparsebench.config import Workspace, runs

    levels = ",".join(f"{0.9 * (index + 1) / count:.8f}" for index in range(count))
    words = ["method=magnitude", "model=tiny_100k", f"sparsity={levels}"]
    made = runs(Workspace(None), words, sweep=True)
    planned = [
        Planned(run.run_id("idle"), run.sparse_model_id("idle"), (*words[:2], f"sparsity={run.sparsity}"), "", {})
        for run in made
    ]
    plan, _, _ = plans.keep(Plan("idle", tuple(planned)), top / "idle")
    engine = Engine(plan, Store(top / "idle"), _IdleInline(), ClusterOptions(poll=0.001))
    started = time.perf_counter()
    counts: Counter[str] = engine.run()
    if counts["ok"] != count:
        raise UserError(f"bench sweep: of {count} runs that do nothing {counts['ok']} are ok")
    return (time.perf_counter() - started) / count
