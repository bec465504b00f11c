"""Drives a plan to its end: submit what is pending, see what died, retry what was lost, lose nothing.

The store is the truth. A run is done when its record says ok or failed; a run whose process died is
marked ``lost`` and tried again alone, up to ``retries`` times; everything else of its chunk goes on.
Stopping the engine leaves the workers running, and starting it again finds their leases.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparsebench.results.store import Store, vanished
from sparsebench.results.tail import Tail
from sparsebench.sweep.chunk import Chunk
from sparsebench.sweep.launch import ClusterOptions, Launcher
from sparsebench.sweep.lease import Leases
from sparsebench.sweep.plan import Plan, Planned, chunks

DEFAULT_SECONDS = 10.0  # of a run that nothing is known about

Look = Callable[[Counter[str], float | None], None]  # counts by status, seconds left


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
    working: dict[str, list[str]] = field(default_factory=dict)  # chunk -> its run ids

    def __post_init__(self) -> None:
        self.tail = Tail(self.store.folder)
        self.leases = Leases(self.store.folder)
        self.by_id = {run.run_id: run for run in self.plan.runs}
        self.tail.look()
        self.lost_before = Counter(self.tail.lost)
        self.attempts_before = {run_id: line["attempt"] for run_id, line in self.tail.best.items()}

    def run(self) -> Counter[str]:
        """Runs the plan to its end; counts by status. KeyboardInterrupt leaves the workers running."""
        started = time.monotonic()
        while True:
            self.tail.look()
            self._bury()
            ready = self._pending()
            busy = {run_id for ids in self.working.values() for run_id in ids}
            free = self.launcher.slots - len(self.working)
            for group in self._chunks([run for run in ready if run.run_id not in busy])[: max(0, free)]:
                name = self.launcher.start(Chunk.of(self.store.folder, self.config_dir, group), self.plan.sweep)
                self.working[name] = [run.run_id for run in group]
            self.tail.look()
            counts = self.counts()
            self.look(counts, self._left(started))
            if not self.working and not self._pending() and not self._held():
                return counts
            if self.launcher.alive():
                time.sleep(self.options.poll)
            elif not self.working:
                time.sleep(self.options.poll)  # somebody else's workers hold what is left

    def counts(self) -> Counter[str]:
        """How many runs are ok, failed, lost, running or pending."""
        return Counter(self._status(run_id) for run_id in self.by_id)

    def _status(self, run_id: str) -> str:
        line = self.tail.best.get(run_id)
        if line is None:
            return "pending"
        if run_id in self.redo and line["status"] == "failed" and line["attempt"] <= self.attempts_before[run_id]:
            return "pending"
        if line["status"] == "lost" and self._tries(run_id) <= self.options.retries:
            return "pending"
        return str(line["status"])

    def _tries(self, run_id: str) -> int:
        """How often the run was lost since this engine began."""
        return self.tail.lost[run_id] - self.lost_before[run_id]

    def _pending(self) -> list[Planned]:
        return [r for r in self.plan.runs if self._status(r.run_id) == "pending" and not self.leases.held(r.run_id)]

    def _held(self) -> bool:
        open_runs = (run_id for run_id in self.by_id if self._status(run_id) in ("pending", "running"))
        return any(self.leases.held(run_id) for run_id in open_runs)

    def _bury(self) -> None:
        """Takes chunks that ended off the list and marks what died with them as lost."""
        alive = self.launcher.alive()
        for name in [name for name in self.working if name not in alive]:
            del self.working[name]
        for run_id in self.by_id:
            line = self.tail.best.get(run_id)
            if line and line["status"] == "running" and vanished(line):
                self.store.declare_lost(run_id, vanished, f"process {line['pid']} on {line['host']} vanished")
        self.tail.look()

    def _chunks(self, runs: Sequence[Planned]) -> list[list[Planned]]:
        """Lost runs alone, the others by model and by estimated minutes, at least one chunk per slot."""
        alone = [[run] for run in runs if self._tries(run.run_id)]
        rest = [run for run in runs if not self._tries(run.run_id)]
        if not rest:
            return alone
        by_time = max(1, int(self.options.chunk_minutes * 60 / self.seconds()))
        share = -(-len(rest) // self.launcher.slots)
        return [*chunks(rest, max(1, min(by_time, share))), *alone]

    def seconds(self) -> float:
        """The mean seconds of this plan's finished runs, or a guess."""
        known = [self.tail.best[run_id].get("seconds") for run_id in self.by_id if run_id in self.tail.best]
        timed = [float(value) for value in known if isinstance(value, (int, float))]
        return sum(timed) / len(timed) if timed else DEFAULT_SECONDS

    def _left(self, started: float) -> float | None:
        counts = self.counts()
        open_runs = counts["pending"] + counts["running"]
        made = sum(
            1
            for run_id, line in self.tail.best.items()
            if run_id in self.by_id
            and line["attempt"] > self.attempts_before.get(run_id, 0)
            and line["status"] != "running"
        )
        return (time.monotonic() - started) / made * open_runs if made else None
