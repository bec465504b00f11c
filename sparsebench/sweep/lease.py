"""Leases: an exclusive-create file per run, so that two workers never make the same run at once.

``leases/<run id>/<number>`` names its owner (host, process, job). The newest one counts. It is void once
its owner gave it back or is gone: a process of this host that no longer runs, or a job that the queue calls
dead. Creating the next number exclusively is the only way to take over, so of two who try one wins.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsebench.errors import UserError
from sparsebench.results.store import own_process, vanished

Gone = Callable[[Mapping[str, Any]], bool]  # owner -> whether it is known to be gone
_RELEASED: dict[str, Any] = {}


class Leases:
    """The leases of one store. ``job``: what the queue calls this worker, None without a queue; ``again``: the
    queue has started it before, so that other processes of the same job are dead."""

    def __init__(self, store: Path, job: str | None = None, gone: Gone = vanished, *, again: bool = False) -> None:
        self._folder, self._job, self._gone, self._again = store / "leases", job, gone, again
        self._self = own_process()
        self._mine: dict[str, Path] = {}  # run -> the lease that this object took

    def take(self, run_id: str) -> bool:
        """Whether this process now holds the run, and did not before. UserError when the store cannot be written."""
        folder = self._folder / run_id
        number = self._newest(folder)
        if number and not self._is_void(self._owner(folder / str(number))):
            return False
        lease = folder / str(number + 1)
        temporary = folder / f".{secrets.token_hex(8)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(json.dumps({**self._self, "job": self._job}).encode())
            try:
                os.link(temporary, lease)  # exclusive, and never seen half written
            except FileExistsError:
                return False
            finally:
                temporary.unlink()
        except OSError as error:
            where = f"store={self._folder.parent}"
            raise UserError(f"{where}: cannot be written: {error.strerror or error}; give another folder") from None
        self._mine[run_id] = lease
        return True

    def release(self, run_id: str) -> None:
        """Gives back what this object took, once the run's record is written; nobody else's lease is touched."""
        self._mine.pop(run_id).write_bytes(json.dumps(_RELEASED).encode())

    def held(self, run_id: str) -> bool:
        """Whether somebody who is not known to be gone holds the run."""
        owner = self.owner(run_id)
        return owner is not None and not self._is_void(owner)

    def taken(self) -> set[str]:
        """The runs that were ever leased: the others need no look."""
        try:
            return set(os.listdir(self._folder))
        except FileNotFoundError:
            return set()

    def abandoned(self, run_id: str) -> bool:
        """Whether the run's last owner went without giving it back."""
        owner = self.owner(run_id)
        return bool(owner) and self._gone(owner or {})

    def owner(self, run_id: str) -> dict[str, Any] | None:
        """Who took the run last: host, pid, pid_start, job; {} once given back, None if nobody ever did."""
        folder = self._folder / run_id
        number = self._newest(folder)
        return self._owner(folder / str(number)) if number else None

    def _newest(self, folder: Path) -> int:
        try:
            return max((int(name) for name in os.listdir(folder) if name.isdigit()), default=0)
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def _owner(self, file: Path) -> dict[str, Any]:
        owner: dict[str, Any] = json.loads(file.read_bytes() or b"{}")  # empty while it is being given back
        return owner

    def _is_void(self, owner: Mapping[str, Any]) -> bool:
        if not owner or self._gone(owner):
            return True
        if not self._again or self._job is None or owner.get("job") != self._job:
            return False
        return any(owner.get(key) != value for key, value in self._self.items())
