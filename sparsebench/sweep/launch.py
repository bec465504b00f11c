"""Launchers behind one small interface: start a chunk, say which chunks still live, stop them.

``inline`` runs a chunk in this process, ``local`` in a bounded pool of processes on this machine that
outlive this one. The engine does everything else.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sparsebench.declare import Declared, option
from sparsebench.errors import UserError
from sparsebench.paths import import_path
from sparsebench.results.store import process_of, vanished
from sparsebench.sweep.chunk import Chunk


@dataclass(frozen=True)
class ClusterOptions(Declared):
    """Options of ``cluster.*``; ``conf/cluster/<name>.yaml`` holds what differs for a launcher."""

    workers: int = option(0, "local: processes at once; 0: one per GPU, or one per two cores", low=0, high=1024)
    retries: int = option(2, "how often a lost run is tried again, alone", low=0, high=10)
    chunk_minutes: float = option(10.0, "estimated minutes of work in a chunk", above=0.0, high=10_000.0)
    poll: float = option(0.5, "seconds between two looks at the store", above=0.0, high=600.0)
    partition: str | None = option(None, "slurm: partition, or several joined by commas; none: the cluster's default")
    account: str | None = option(None, "slurm: account that is charged")
    qos: str | None = option(None, "slurm: quality of service")
    constraint: str | None = option(None, "slurm: features that a node must have")
    cpus: int = option(4, "slurm: CPUs of a chunk", low=1, high=1024)
    gpus: int = option(0, "slurm: GPUs of a chunk", low=0, high=64)
    mem_gb: float = option(0.0, "slurm: memory of a chunk; 0: the cluster's default", low=0.0, high=1e5, unit="GB")
    time_min: int = option(60, "slurm: time limit of a chunk", low=1, high=100_000, unit="minutes")
    signal_s: int = option(120, "slurm: how long before its time limit a chunk is queued again", low=1, high=3600)
    requeues: int = option(3, "slurm: how often a chunk that reached its time limit is queued again", low=0, high=1000)
    array_parallelism: int = option(8, "slurm: chunks that run at once", low=1, high=10_000)
    max_chunks: int = option(1000, "slurm: chunks in the queue at once", low=1, high=100_000)
    setup: tuple[str, ...] = option((), "slurm: shell lines before the worker starts, such as module load cuda")


class Launcher(Protocol):
    """Where chunks run."""

    @property
    def slots(self) -> int:
        """How many chunks may be started and not ended."""
        ...

    @property
    def width(self) -> int:
        """How many of them run at once."""
        ...

    def start(self, chunks: Sequence[Chunk], label: str) -> list[str]:
        """Starts the chunks and returns what they are called; fewer names when there was no room for all."""
        ...

    def attach(self) -> dict[str, list[str]]:
        """Chunks that an earlier process started and that still live: name -> run ids. Counted as alive from now."""
        ...

    def alive(self) -> set[str]:
        """The names of started and attached chunks that have not ended."""
        ...

    def gone(self, owner: Mapping[str, Any]) -> bool:
        """Whether the owner of a lease (host, pid, pid_start, job) is known to be gone for good."""
        ...

    def fate(self, owner: Mapping[str, Any]) -> str:
        """What became of an owner that is gone, in words."""
        ...

    def withdrawn(self, job: str) -> bool:
        """Whether a person took the chunk out of the queue: its runs are not tried again."""
        ...

    def stop(self) -> None:
        """Ends all chunks that this launcher started or attached to."""
        ...


class OnThisMachine:
    """What launchers without a queue have in common: processes tell who is gone."""

    def gone(self, owner: Mapping[str, Any]) -> bool:
        return vanished(owner)

    def fate(self, owner: Mapping[str, Any]) -> str:
        return f"process {owner.get('pid')} on {owner.get('host')} vanished"

    def withdrawn(self, job: str) -> bool:
        return False


@dataclass
class Inline(OnThisMachine):
    """Chunks run in this process, one at a time, when they are started."""

    slots: int = 1
    width: int = 1
    count: int = 0

    def start(self, chunks: Sequence[Chunk], label: str) -> list[str]:
        for chunk in chunks:
            chunk()
        self.count += len(chunks)
        return [f"inline-{self.count - index}" for index in range(len(chunks))]

    def attach(self) -> dict[str, list[str]]:
        return {}

    def alive(self) -> set[str]:
        return set()

    def stop(self) -> None:
        """Nothing runs between two starts."""


@dataclass
class Local(OnThisMachine):
    """A bounded pool of worker processes. They are their own sessions: ctrl-C here does not reach them."""

    folder: Path
    slots: int
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    attached: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> its process, see process_of
    count: int = 0

    @classmethod
    def of(cls, folder: Path, workers: int) -> Local:
        gpus = _gpus()
        return cls(folder, workers or len(gpus) or max(1, (os.cpu_count() or 1) // 2))

    @property
    def width(self) -> int:
        return self.slots

    def start(self, chunks: Sequence[Chunk], label: str) -> list[str]:
        try:
            return [self._start(chunk, label) for chunk in chunks]
        except OSError as error:
            raise UserError(f"{self.folder}: cannot start a worker: {error.strerror or error}") from None

    def _start(self, chunk: Chunk, label: str) -> str:
        self.count += 1
        name = f"{label}-{secrets.token_hex(4)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = self.folder.resolve()  # `workers` finds the process by it
        file, log = folder / f"{name}.json", folder / f"{name}.log"
        chunk.job = name
        file.write_text(chunk.to_json(), encoding="utf-8")
        with open(log, "wb") as output:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "sparsebench.sweep.chunk", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
        return name

    def _environment(self) -> dict[str, str]:
        threads = max(1, (os.cpu_count() or 1) // self.slots)
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        gpus = _gpus()
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = gpus[self.count % len(gpus)]
        return env | {"PYTHONPATH": import_path()}

    def attach(self) -> dict[str, list[str]]:
        found = {name: pid for name, pid in workers(self.folder).items() if name not in self.running}
        self.attached = {name: process_of(pid) for name, pid in found.items()}
        files = {name: self.folder / f"{name}.json" for name in found}
        return {name: Chunk.from_json(file.read_text(encoding="utf-8")).run_ids() for name, file in files.items()}

    def alive(self) -> set[str]:
        self.running = {name: process for name, process in self.running.items() if process.poll() is None}
        self.attached = {name: process for name, process in self.attached.items() if not vanished(process)}
        return {*self.running, *self.attached}

    def stop(self) -> None:
        self.alive()
        for pid in [process.pid for process in self.running.values()] + [one["pid"] for one in self.attached.values()]:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(pid, signal.SIGTERM)


def workers(folder: Path) -> dict[str, int]:
    """The chunks in ``folder`` that a process of this machine works on: name -> process id."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile, or is somebody else's
            continue
        if b"sparsebench.sweep.chunk" in words:
            file = Path(os.fsdecode(words[words.index(b"sparsebench.sweep.chunk") + 1]))
            if file.parent == folder.resolve():
                found[file.stem] = int(process.name)
    return found


def _gpus() -> list[str]:
    """The GPUs this process may use, without importing torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one for one in named.split(",") if one.strip()]
    return [str(index) for index, _ in enumerate(sorted(Path("/proc/driver/nvidia/gpus").glob("*")))]
