"""Where the lines of each run lie in a store's shards: read once, then only what was appended."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_LINE = re.compile(rb'(?:\{"run_id":"([^"\\]*)"[^\n]*|[^\n]+)\n')  # records begin with their run id
Place = tuple[int, int]  # first byte and the one behind the last


class Index:
    """``lines(run_id, shards)`` gives the run's whole lines, shard by shard.

    A shard that shrank or vanished was changed by hand: everything is read again. ``torn``: shards that ended in
    half a line when they were last looked at. OSError when a shard cannot be read."""

    def __init__(self) -> None:
        self._read: dict[Path, int] = {}  # shard -> bytes that were read, always a whole number of lines
        self._places: dict[bytes | None, list[tuple[Path, Place]]] = {}  # None: lines that begin otherwise
        self.torn = 0

    def lines(self, run_id: str, shards: list[Path]) -> Iterator[tuple[Path, list[bytes]]]:
        """(shard, the lines with their newlines that are the run's or may be), in the order of ``shards``."""
        self._look(shards)
        found: dict[Path, list[Place]] = {}
        for key in (run_id.encode(), None):
            for shard, place in self._places.get(key, ()):
                found.setdefault(shard, []).append(place)
        for shard in shards:
            if shard in found:
                with open(shard, "rb") as file:
                    yield shard, [_piece(file, place) for place in sorted(found[shard])]

    def _look(self, shards: list[Path]) -> None:
        sizes = {}
        for shard in shards:
            try:
                sizes[shard] = shard.stat().st_size
            except FileNotFoundError:  # removed since it was listed
                continue
        if any(sizes.get(shard, -1) < done for shard, done in self._read.items()):
            self._read, self._places = {}, {}
        self.torn = 0
        for shard, size in sizes.items():
            done = self._read.get(shard, 0)
            if size > done:
                self._read[shard] = done = self._append(shard, done)
                self.torn += size > done

    def _append(self, shard: Path, done: int) -> int:
        """Enters the whole lines behind byte ``done``; returns how far the shard was read."""
        with open(shard, "rb") as file:
            file.seek(done)
            data = file.read()
        end = 0
        for match in _LINE.finditer(data):
            end = match.end()
            self._places.setdefault(match[1], []).append((shard, (done + match.start(), done + end)))
        return done + max(end, data.rfind(b"\n") + 1)


def _piece(file: BinaryIO, place: Place) -> bytes:
    file.seek(place[0])
    return file.read(place[1] - place[0])
