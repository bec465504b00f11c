"""A world without torch to try the engine in: runs that do nothing, and workers that die when they are told to.

``python tests/sweep/sweep_world.py <store> <runs> <seed>`` drives a plan of such runs to its end.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsebench.results.store import Store
from sparsebench.sweep.chunk import Chunk
from sparsebench.sweep.engine import Engine
from sparsebench.sweep.launch import ClusterOptions, OnThisMachine
from sparsebench.sweep.plan import Plan, Planned

FAST = ClusterOptions(poll=0.005)


def planned(number: int, *words: str, model: str = "m", sparse_model: int | None = None) -> Planned:
    """A run that does what ``words`` say: nothing, nap, fail, die, die_once, die_early, die_early_once."""
    name = number if sparse_model is None else sparse_model
    return Planned(f"{number:016x}", f"{name:016x}", words, model, {"method": f"method{number % 3}"})


def plan_of(runs: Sequence[Planned], name: str = "toy") -> Plan:
    return Plan(name, tuple(runs), 1)


class StubChunk(Chunk):
    """A chunk whose experiment only writes the lines of a run, and a journal of who made which run when."""

    def _experiment(self) -> Any:
        return Store(Path(self.store))

    def _one(self, experiment: Any, run_id: str, words: Sequence[str]) -> str:
        store: Store = experiment
        line = store.find(run_id)
        first = line is None
        if "die_early" in words or ("die_early_once" in words and first):
            self.die()
        journal(store.folder, "begin", run_id)
        attempt = store.begin(run_id, {"method": "toy"})
        if "nap" in words:
            time.sleep(0.003)
        if "die" in words or ("die_once" in words and first):
            self.die()
        status = "failed" if "fail" in words else "ok"
        attempt.finish(status, {"seconds": 0.001}, error="Traceback:\nValueError: no" if "fail" in words else None)
        journal(store.folder, "end", run_id)
        return status

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def journal(folder: Path, what: str, run_id: str) -> None:
    """One line, appended as a whole: processes that share the file do not mix their lines."""
    with open(folder / "journal", "ab", buffering=0) as file:
        file.write(f"{what} {run_id} {os.getpid()} {time.monotonic_ns()}\n".encode())


def attempts_made(folder: Path) -> Counter[str]:
    """How often each run was begun."""
    return Counter(line.split()[1] for line in (folder / "journal").read_text().splitlines() if line[:5] == "begin")


def overlaps(folder: Path) -> list[str]:
    """Runs that two processes made at the same time. A process that was killed is at work until its next
    successor begins, so only what ended can overlap."""
    spans: dict[str, list[tuple[int, int]]] = {}
    open_spans: dict[tuple[str, str], int] = {}
    for line in (folder / "journal").read_text().splitlines():
        what, run_id, pid, at = line.split()
        if what == "begin":
            open_spans[run_id, pid] = int(at)
        else:
            spans.setdefault(run_id, []).append((open_spans.pop((run_id, pid)), int(at)))
    return [
        run_id for run_id, found in spans.items()
        for (_, end), (start, _) in zip(sorted(found), sorted(found)[1:], strict=False) if start < end
    ]  # fmt: skip


@dataclass
class Forked(OnThisMachine):
    """The local launcher with forked workers instead of fresh interpreters."""

    slots: int = 2
    children: dict[str, int] = field(default_factory=dict)
    chunks: list[list[str]] = field(default_factory=list)  # what was started

    @property
    def width(self) -> int:
        return self.slots

    def start(self, chunks: Sequence[Chunk], label: str) -> list[str]:
        names = []
        for chunk in chunks:
            name = f"{label}-{len(self.chunks)}"
            self.chunks.append(chunk.run_ids())
            pid = os.fork()
            if pid == 0:
                code = 1
                with contextlib.suppress(BaseException):
                    os.setsid()
                    StubChunk(**vars(chunk))()
                    code = 0
                os._exit(code)
            self.children[name] = pid
            names.append(name)
        return names

    def attach(self) -> dict[str, list[str]]:
        return {}

    def alive(self) -> set[str]:
        self.children = {name: pid for name, pid in self.children.items() if os.waitpid(pid, os.WNOHANG) == (0, 0)}
        return set(self.children)

    def stop(self) -> None:
        for pid in self.children.values():
            os.kill(pid, signal.SIGKILL)


def words_of(number: int) -> tuple[str, ...]:
    """Of every twenty runs one fails, one kills its worker once, and one always."""
    return {3: ("fail",), 7: ("die_once",), 11: ("die",)}.get(number % 20, ("nap",))


def many(count: int) -> list[Planned]:
    return [planned(number, *words_of(number), model=f"m{number % 3}") for number in range(count)]


def main(store: str, count: str, seed: str) -> int:
    random.seed(int(seed))
    options = ClusterOptions(poll=0.005, retries=1, chunk_minutes=0.0002)
    Engine(plan_of(many(int(count))), Store(Path(store)), Forked(2), options).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
