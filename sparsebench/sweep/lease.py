"""Leases: an exclusive-create file per run, so that two workers never make the same run at once.

``leases/<run id>/<number>`` names its owner (host, process, job). The newest one counts. It is void once
its owner is gone: a process of this host that no longer runs, or a job that the queue calls dead. Creating
the next number exclusively is the only way to take over, so of two who try one wins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsebench.results.store import own_process, vanished

Gone = Callable[[Mapping[str, Any]], bool]  # owner -> whether it is known to be gone


class Leases:
    """The leases of one store. ``job``: what the queue calls this worker, None without a queue."""

    def __init__(self, store: Path, job: str | None = None, gone: Gone = vanished) -> None:
        self._folder, self._job, self._gone = store / "leases", job, gone

    def take(self, run_id: str) -> bool:
        """Whether this process now holds the run."""
        folder = self._folder / run_id
        folder.mkdir(parents=True, exist_ok=True)
        number = self._newest(folder)
        if number and not self._is_void(folder / str(number)):
            return False
        owner = json.dumps({**own_process(), "job": self._job}).encode()
        temporary = folder / f".{os.getpid()}.{number + 1}"
        temporary.write_bytes(owner)
        try:
            os.link(temporary, folder / str(number + 1))  # exclusive, and never seen half written
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def release(self, run_id: str) -> None:
        """Gives the run back once its record is written."""
        folder = self._folder / run_id
        number = self._newest(folder)
        (folder / str(number)).write_bytes(b"{}")

    def held(self, run_id: str) -> bool:
        """Whether somebody who is not known to be gone holds the run."""
        folder = self._folder / run_id
        number = self._newest(folder)
        return bool(number) and not self._is_void(folder / str(number))

    def _newest(self, folder: Path) -> int:
        if not folder.is_dir():
            return 0
        return max((int(name) for name in os.listdir(folder) if name.isdigit()), default=0)

    def _is_void(self, file: Path) -> bool:
        owner = json.loads(file.read_bytes() or b"{}")
        return not owner or self._gone(owner)
