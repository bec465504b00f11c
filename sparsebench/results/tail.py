"""Follows a store as it grows: each look reads only what was appended since the last one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from sparsebench.results.record import decode_records, rank
from sparsebench.results.store import no_garbage_collection, vanished

_RUNNING = b'"status":"running"'
_Attempt = tuple[Any, ...]  # attempt, host, pid, pid_start: two processes can be making the same attempt


def _is_over(line: bytes, after: bytes) -> bool:
    """Whether ``line`` is the ``running`` line of an attempt that ``after``, the writer's next line, ends: it says
    nothing more, and half of a large store is such lines. (A line begins with its run id.)"""
    return _RUNNING in line and _RUNNING not in after and after.startswith(line[: line.find(b",") + 1])


class Tail:
    """What a store's lines say of each run, as of the last look.

    ``best``: the run's record; ``lost``: how many of its attempts were lost; ``running``: the ``running``
    lines of its attempts that have no other line yet.
    """

    def __init__(self, store: Path) -> None:
        self._folder = store / "records"
        self._read: dict[str, int] = {}  # shard -> bytes that were read, always a whole number of lines
        self._lost: set[tuple[str, _Attempt]] = set()
        self.best: dict[str, dict[str, Any]] = {}
        self.lost: Counter[str] = Counter()
        self.running: dict[str, dict[_Attempt, dict[str, Any]]] = {}

    def look(self) -> None:
        """Reads the complete lines that were appended to any shard."""
        with no_garbage_collection():
            for path in sorted(self._folder.glob("*.jsonl")):
                self._look(path)

    def _look(self, path: Path) -> None:
        done = self._read.get(path.name, 0)
        try:
            with open(path, "rb") as file:
                file.seek(done)
                data = file.read()
        except FileNotFoundError:  # removed since it was listed
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._read[path.name] = done + len(whole)
        lines = whole.splitlines(keepends=True)
        told = [one for one, after in zip(lines, [*lines[1:], b""], strict=False) if not _is_over(one, after)]
        for line in decode_records(told):
            if line is not None:
                self._add(line)

    def _add(self, line: dict[str, Any]) -> None:
        run_id, status = line["run_id"], line["status"]
        known = self.best.get(run_id)
        if known is None or rank(line) > rank(known):
            self.best[run_id] = line
        attempt = (line["attempt"], line.get("host"), line.get("pid"), line.get("pid_start"))
        if status == "running":
            if (run_id, attempt) not in self._lost:  # a shard that sorts before may hold the end of this attempt
                self.running.setdefault(run_id, {})[attempt] = line
            return
        unfinished = self.running.get(run_id)
        if unfinished is not None:
            unfinished.pop(attempt, None)
            if not unfinished:
                del self.running[run_id]
        if status == "lost" and (run_id, attempt) not in self._lost:  # several may have declared it lost
            self._lost.add((run_id, attempt))
            self.lost[run_id] += 1

    def attempt(self, run_id: str) -> int:
        """The number of the run's newest attempt that has ended, 0 before the first."""
        line = self.best.get(run_id)
        return int(line["attempt"]) if line and line["status"] != "running" else 0

    def going(self, run_id: str) -> list[dict[str, Any]]:
        """The ``running`` lines of tries that go on (or whose process died unseen); [] once the run is ok."""
        line = self.best.get(run_id)
        if line is None or line["status"] == "ok":
            return []
        ended = self.attempt(run_id)
        return [one for one in self.running.get(run_id, {}).values() if one["attempt"] >= ended]

    def status(self, run_id: str) -> str | None:
        """running, ok, failed, lost, or None for a run that has left nothing yet. A try that goes on shows
        over an older one that failed or was lost; one whose process vanished shows as lost."""
        line = self.best.get(run_id)
        if line is None:
            return None
        going = self.going(run_id)
        if not going:
            return str(line["status"])
        return "lost" if all(vanished(one) for one in going) else "running"
