"""Launchers behind one small interface: start a chunk, say which chunks still live, stop them.

``inline`` runs a chunk in this process, ``local`` in a bounded pool of processes on this machine that
outlive this one. The engine does everything else.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sparsebench.declare import Declared, option
from sparsebench.sweep.chunk import Chunk


@dataclass(frozen=True)
class ClusterOptions(Declared):
    """Options of ``cluster.*``; ``conf/cluster/<name>.yaml`` holds what differs for a launcher."""

    workers: int = option(0, "local: processes at once; 0: one per GPU, or one per two cores", low=0, high=1024)
    retries: int = option(2, "how often a lost run is tried again, alone", low=0, high=10)
    chunk_minutes: float = option(10.0, "estimated minutes of work in a chunk", above=0.0, high=10_000.0)
    poll: float = option(0.5, "seconds between two looks at the store", above=0.0, high=600.0)


class Launcher(Protocol):
    """Where chunks run."""

    slots: int

    def start(self, chunk: Chunk, label: str) -> str:
        """Starts the chunk and returns what it is called."""
        ...

    def alive(self) -> set[str]:
        """The names of started chunks that have not ended."""
        ...

    def stop(self) -> None:
        """Ends all chunks that this launcher started."""
        ...


@dataclass
class Inline:
    """Chunks run in this process, one at a time, when they are started."""

    slots: int = 1
    count: int = 0

    def start(self, chunk: Chunk, label: str) -> str:
        self.count += 1
        chunk()
        return f"inline-{self.count}"

    def alive(self) -> set[str]:
        return set()

    def stop(self) -> None:
        """Nothing runs between two starts."""


@dataclass
class Local:
    """A bounded pool of worker processes. They are their own sessions: ctrl-C here does not reach them."""

    folder: Path
    slots: int
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    count: int = 0

    @classmethod
    def of(cls, folder: Path, workers: int) -> Local:
        gpus = _gpus()
        return cls(folder, workers or len(gpus) or max(1, (os.cpu_count() or 1) // 2))

    def start(self, chunk: Chunk, label: str) -> str:
        self.count += 1
        name = f"{label}-{os.getpid()}-{self.count}"
        self.folder.mkdir(parents=True, exist_ok=True)
        file, log = self.folder / f"{name}.json", self.folder / f"{name}.log"
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
        package = str(Path(__file__).resolve().parents[2])
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        return env

    def alive(self) -> set[str]:
        self.running = {name: process for name, process in self.running.items() if process.poll() is None}
        return set(self.running)

    def stop(self) -> None:
        for process in self.running.values():
            os.killpg(process.pid, signal.SIGTERM)


def _gpus() -> list[str]:
    """The GPUs this process may use, without importing torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one for one in named.split(",") if one.strip()]
    return [str(index) for index, _ in enumerate(sorted(Path("/proc/driver/nvidia/gpus").glob("*")))]
