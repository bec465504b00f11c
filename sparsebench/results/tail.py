"""Follows a store as it grows: each look reads only what was appended since the last one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from sparsebench.results.record import decode_records, rank


class Tail:
    """The best line of each run (``best``) and how often each was lost (``lost``), as of the last look."""

    def __init__(self, store: Path) -> None:
        self._folder = store / "records"
        self._read: dict[str, int] = {}  # shard -> bytes that were read, always a whole number of lines
        self.best: dict[str, dict[str, Any]] = {}
        self.lost: Counter[str] = Counter()

    def look(self) -> None:
        """Reads the complete lines that were appended to any shard."""
        for path in sorted(self._folder.glob("*.jsonl")):
            done = self._read.get(path.name, 0)
            with open(path, "rb") as file:
                file.seek(done)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read[path.name] = done + len(whole)
            for line in decode_records(whole.splitlines(keepends=True)):
                if line is not None:
                    self._add(line)

    def _add(self, line: dict[str, Any]) -> None:
        run_id = line["run_id"]
        self.lost[run_id] += line["status"] == "lost"
        known = self.best.get(run_id)
        if known is None or rank(line) > rank(known):
            self.best[run_id] = line

    def status(self, run_id: str) -> str | None:
        """running, ok, failed, lost, or None for a run that has left nothing yet. An attempt that is
        ``running`` shows over an older ``lost`` one."""
        line = self.best.get(run_id)
        return str(line["status"]) if line else None
