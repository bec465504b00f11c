"""Drives a plan to its end: submit what is pending, see what died, retry what was lost, lose nothing.

The store is the truth. A run is done when its record says ok or failed; a run whose process died is
marked ``lost`` and tried again alone, up to ``retries`` times; everything else of its chunk goes on.
Stopping the engine leaves the workers running, and starting it again finds them and their leases.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sparsebench.errors import UserError
from sparsebench.results.store import Store, own_process
from sparsebench.results.tail import Tail
from sparsebench.sweep.chunk import Chunk
from sparsebench.sweep.launch import ClusterOptions, Launcher
from sparsebench.sweep.lease import Leases
from sparsebench.sweep.plan import Plan, Planned, chunks

DEFAULT_SECONDS = 10.0  # of a run that nothing is known about
_NAMES = ("method", "model", "calibration", "task", "sparsity", "pattern", "seed")  # columns that a plan knows
MOST_BARREN = 10  # chunks in a row that may end without having begun one run

Look = Callable[[Counter[str], float | None], None]  # counts by status, seconds left


def cancel_file(store: Path, sweep: str) -> Path:
    """While this file exists, the sweep's engine stops (wherever it runs)."""
    return store / "jobs" / sweep / "cancelled"


@dataclass
class Engine:
    """One plan on one launcher. ``redo``: runs with a failed record that are to be tried again."""

    plan: Plan
    store: Store
    launcher: Launcher
    options: ClusterOptions
    config_dir: Path | None = None
    redo: set[str] = field(default_factory=set)
    look: Look = lambda counts, left: None
    tracking: tuple[str, ...] = ()  # words for the workers' mirror
    working: dict[str, list[str]] = field(default_factory=dict)  # chunk -> its run ids

    def __post_init__(self) -> None:
        self.tail = Tail(self.store.folder)
        self.leases = Leases(self.store.folder, gone=self.launcher.gone)
        self.open = {run.run_id: run for run in self.plan.runs}  # all that is not ok
        self.states: dict[str, str] = {}  # of what is open
        self.tail.look()
        self.lost_before = Counter(self.tail.lost)
        self.attempts_before = {run_id: self.tail.attempt(run_id) for run_id in self.open}
        self.attempts = dict(self.attempts_before)  # when the run was last put into a chunk
        self.withdrawn: set[str] = set()  # runs of chunks that a person cancelled
        self.barren = 0
        self.host = own_process()["host"]

    def run(self) -> Counter[str]:
        """Runs the plan to its end; counts by status. KeyboardInterrupt leaves the workers running.

        UserError when the store cannot be written, or when workers keep ending before they begin a run.
        """
        cancel_file(self.store.folder, self.plan.sweep).unlink(missing_ok=True)
        self.working |= self.launcher.attach()
        started, first = time.monotonic(), None
        while True:
            if cancel_file(self.store.folder, self.plan.sweep).exists():
                raise KeyboardInterrupt
            self._bury()
            counts = self.counts()
            left = counts["pending"] + counts["running"]
            first = left if first is None else first
            self.look(counts, (time.monotonic() - started) / (first - left) * left if left < first else None)
            ready, held = self._ready()
            if not self.working and not ready and not held:
                return counts
            self._start(ready)
            if self.launcher.alive() or not self.working:  # the latter: others' workers hold what is left
                time.sleep(self.options.poll)

    def counts(self) -> Counter[str]:
        """How many runs are ok, failed, lost, running or pending."""
        self.states = {run_id: self._status(run_id) for run_id in self.open}
        for run_id in [run_id for run_id, state in self.states.items() if state == "ok"]:
            del self.open[run_id], self.states[run_id]
        return Counter(self.states.values()) + Counter(ok=len(self.plan.runs) - len(self.open))

    def _status(self, run_id: str) -> str:
        line = self.tail.best.get(run_id)
        if line is None:
            return "pending"
        if self.tail.going(run_id):
            return "running"
        if run_id in self.redo and line["status"] == "failed" and line["attempt"] <= self.attempts_before[run_id]:
            return "pending"
        if line["status"] == "lost" and self._tries(run_id) <= self.options.retries:
            return "pending"
        return str(line["status"])

    def _tries(self, run_id: str) -> int:
        """How often the run was lost since this engine began."""
        return self.tail.lost[run_id] - self.lost_before[run_id]

    def _ready(self) -> tuple[list[Planned], bool]:
        """The runs to put into chunks, and whether somebody (of this engine or not) is at work on others."""
        busy = {run_id for ids in self.working.values() for run_id in ids}
        leased = self.leases.taken()
        ready, held = [], False
        for run_id, state in self.states.items():
            if state not in ("pending", "running") or run_id in busy or run_id in self.withdrawn:
                continue
            if run_id in leased and self.leases.held(run_id):
                held = True
            elif state == "pending":
                ready.append(self.open[run_id])
            elif any(line["host"] == self.host for line in self.tail.going(run_id)):
                held = True  # a process of this machine that is no worker, as the verb `run`
        return ready, held

    def _start(self, ready: Sequence[Planned]) -> None:
        free = self.launcher.slots - len(self.working)
        groups = self._chunks(ready)[:free] if ready and free > 0 else []
        if not groups:
            return
        self.attempts |= {run.run_id: self.tail.attempt(run.run_id) for group in groups for run in group}
        made = [Chunk.of(self.store.folder, self.config_dir, group, self.attempts) for group in groups]
        for chunk in made:
            chunk.tracking = [self.plan.sweep, *self.tracking] if self.tracking else []
        names = self.launcher.start(made, self.plan.sweep)
        self.working |= {name: chunk.run_ids() for name, chunk in zip(names, made, strict=False)}

    def _bury(self) -> None:
        """Takes chunks that ended off the list and marks what died with them as lost."""
        alive = self.launcher.alive()
        self.tail.look()  # after the question who lives, so that what the dead wrote is seen
        for run_id in [run_id for run_id in self.tail.running if run_id in self.open]:
            for line in self.tail.running[run_id].values():
                owner = self.leases.owner(run_id) or {}
                owner = owner if _same_process(owner, line) else line
                if self.launcher.gone(owner):
                    self.store.declare_lost(run_id, partial(_same_process, line), self.launcher.fate(owner))
                    if self.leases.take(run_id):  # on other hosts nobody could know that its owner is dead
                        self.leases.release(run_id)
        self.tail.look()
        for name in [name for name in self.working if name not in alive]:
            ids = [run_id for run_id in self.working.pop(name) if run_id in self.open]
            if self.launcher.withdrawn(name):
                self.withdrawn.update(ids)
                continue
            blamed = [run_id for run_id in ids if self._died_before_it_began(run_id)]
            moved = [run_id for run_id in ids if self._has_moved(run_id) or self.leases.held(run_id)]
            self.barren = 0 if moved or blamed or not ids else self.barren + 1
        self.tail.look()
        if self.barren >= MOST_BARREN:
            where = self.store.folder / "jobs" / self.plan.sweep
            raise UserError(
                f"sweep {self.plan.sweep}: {self.barren} workers in a row ended without beginning a run; logs: {where}"
            )

    def _has_moved(self, run_id: str) -> bool:
        """Whether anybody made, or is making, the run since it was put into a chunk."""
        return bool(self.tail.going(run_id)) or self.tail.attempt(run_id) > self.attempts[run_id]

    def _died_before_it_began(self, run_id: str) -> bool:
        """Marks a run as lost whose worker went with the lease in hand but before its ``running`` line (it can
        die of loading the model)."""
        if self._has_moved(run_id) or not self.leases.abandoned(run_id) or not self.leases.take(run_id):
            return False
        try:
            self.tail.look()
            if not self._has_moved(run_id):
                error = {"error": "its worker died before the run began"}
                point = self.open[run_id].point
                named = {key: point.get(key) for key in _NAMES if key in point}
                self.store.begin(run_id, named).finish("lost", error)
        finally:
            self.leases.release(run_id)
        return True

    def _chunks(self, runs: Sequence[Planned]) -> list[list[Planned]]:
        """Lost runs alone, the others by model and by estimated minutes, at least one chunk per slot."""
        alone = [[run] for run in runs if self._was_lost(run)]
        rest = [run for run in runs if not self._was_lost(run)]
        if not rest:
            return alone
        by_time = max(1, int(self.options.chunk_minutes * 60 / self.seconds()))
        share = -(-len(rest) // self.launcher.width)
        return [*chunks(rest, max(1, min(by_time, share))), *alone]

    def _was_lost(self, run: Planned) -> bool:
        line = self.tail.best.get(run.run_id)
        return line is not None and line["status"] == "lost"

    def seconds(self) -> float:
        """The mean seconds of this plan's finished runs, or a guess."""
        known = [self.tail.best[r.run_id].get("seconds") for r in self.plan.runs if r.run_id in self.tail.best]
        timed = [float(value) for value in known if isinstance(value, (int, float))]
        return max(sum(timed) / len(timed), 1e-3) if timed else DEFAULT_SECONDS


def _same_process(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("host", "pid", "pid_start"))
