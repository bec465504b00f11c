"""The store: append-only JSON lines, one shard per writer, safe without locks on a network file system.

A store is a folder with ``records/``, ``layers/``, ``samples/``, ``configs/`` and ``errors/``; in each, one
shard (``<host>-<pid>-<start>-<random>.jsonl``) per process that wrote. Nobody but its writer ever appends to
a shard, nothing is ever rewritten, and no lock or clock is needed to read: ``record.rank`` decides which of a
run's lines is its record. The record line is written last: once it is on disk the run is done, and
``kill -9`` at any other moment loses the run in flight and nothing else.

Other programs read the same files: ``pandas.read_json(shard, lines=True)``, or all at once in DuckDB,
``select * from read_json_auto('store/records/*.jsonl', union_by_name=true, ignore_errors=true)``
(``ignore_errors`` skips torn lines).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import sparsebench
from sparsebench.errors import UserError
from sparsebench.results.index import Index
from sparsebench.results.record import SCHEMA, STATUSES, column_order, decode, decode_records, encode, rank

DETAILS = ("layers", "samples", "configs", "errors")
_OWN = ("run_id", "attempt", "host", "pid", "pid_start", "started", "schema")  # columns no caller can set
_ERROR_LENGTH = 300  # characters of an error that the record itself carries


class Store:
    """A folder of records. Nothing is made on disk before the first ``begin``.

    ``torn``: how many torn or garbled lines the last read skipped. UserError when ``folder`` is a file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.torn = 0
        self._lock = threading.RLock()
        self._shard: str | None = None
        self._shard_pid = -1
        self._index = Index()
        if os.path.lexists(self.folder) and not os.path.isdir(self.folder):
            raise UserError(f"store={self.folder}: is not a folder; give another")

    def check_writable(self) -> None:
        """UserError when the store could not be written. Leaves nothing behind, not even the folder."""
        for folder in (self.folder, *(self.folder / kind for kind in ("records", *DETAILS))):
            while not os.path.lexists(folder):  # what does not exist will be made in its nearest ancestor
                folder = folder.parent
            try:
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise self._not_writable(error) from None

    def begin(self, run_id: str, fields: Mapping[str, Any]) -> Attempt:
        """Appends the ``running`` line of the run's next attempt. ``fields``: columns known so far.

        Earlier attempts whose process on this host is gone are declared ``lost`` first. Two processes may
        begin the same run at once. UserError when the store cannot be written.
        """
        with self._lock:
            known = [line for _, line in self._lines_of(run_id)]
            number = 1 + max((line["attempt"] for line in known), default=0)
            line = {
                "version": sparsebench.__version__,
                **fields,
                "run_id": run_id,
                "status": "running",
                "attempt": number,
                **own_process(),
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "schema": SCHEMA,
            }
            lost = [
                {**one, "status": "lost", "error": f"process {one['pid']} on {one['host']} vanished"}
                for one in _vanished(known)
            ]
            try:
                self._append("records", [encode(_ordered(one)) for one in (*lost, line)])
            except OSError as error:
                raise self._not_writable(error) from None
        return Attempt(self, number, line)

    def declare_lost(self, run_id: str, gone: Callable[[Mapping[str, Any]], bool], reason: str) -> int:
        """Appends a ``lost`` line for each unfinished attempt whose ``running`` line ``gone`` says is nobody's
        any more (a queue knows about other hosts, what ``begin`` cannot). Returns how many. UserError when the
        store cannot be written."""
        with self._lock:
            lines = [line for line in _unfinished([line for _, line in self._lines_of(run_id)]) if gone(line)]
            try:
                if lines:
                    lost = [{**one, "status": "lost", "error": reason} for one in lines]
                    self._append("records", [encode(_ordered(one)) for one in lost])
            except OSError as error:
                raise self._not_writable(error) from None
        return len(lines)

    def find(self, run_id: str) -> dict[str, Any] | None:
        """The run's record, or None. Fast: only the run's lines are parsed, and the shards are read once."""
        return max((line for _, line in self._lines_of(run_id)), key=rank, default=None)

    def records(self) -> list[dict[str, Any]]:
        """One record a run, in order of first appearance by shard name, then line."""
        best: dict[str, dict[str, Any]] = {}
        with no_garbage_collection():
            for _, line in self._read_records():
                known = best.get(line["run_id"])
                if known is None or rank(line) > rank(known):
                    best[line["run_id"]] = line
        return list(best.values())

    def details(self, kind: str, run_id: str, attempt: int) -> list[dict[str, Any]]:
        """The rows of one attempt: ``layers``, ``samples``, ``configs`` (column ``config``) or ``errors``
        (column ``error``), each with ``run_id`` and ``attempt``; [] when there are none.

        Where two processes made the same attempt, the rows beside the line that ``find`` picks.
        """
        if kind not in DETAILS:
            raise ValueError(f"details: kind must be one of {', '.join(DETAILS)}, not {kind!r}")
        lines = [(shard, line) for shard, line in self._lines_of(run_id) if line["attempt"] == attempt]
        if not lines:
            return []
        shard, _ = max(lines, key=lambda one: rank(one[1]))
        rows = decode(self._whole_lines(self.folder / kind / shard, run_id))
        return [row for row in rows if row and (row.get("run_id"), row.get("attempt")) == (run_id, attempt)]

    def note(self, kind: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows beside the records, in ``<kind>/`` (``tracking``: what was mirrored). OSError as ``finish``."""
        with self._lock:
            self._append(kind, [encode(row) for row in rows])

    def notes(self, kind: str) -> list[dict[str, Any]]:
        """All rows that ``note`` wrote, by shard name, then line."""
        shards = sorted((self.folder / kind).glob("*.jsonl"))
        return [row for shard in shards for row in decode(self._whole_lines(shard, None)) if row]

    def _lines_of(self, run_id: str) -> list[tuple[str, dict[str, Any]]]:
        """(shard name, line) of every line of one run, by shard name, then line."""
        found: list[tuple[str, dict[str, Any]]] = []
        garbled = 0
        try:
            with self._lock:
                places = list(self._index.lines(run_id, self.shards()))
            for shard, lines in places:
                for line in decode_records(lines):
                    garbled += line is None
                    if line is not None and line["run_id"] == run_id:
                        found.append((shard.name, line))
        except OSError as error:
            raise self._not_readable(error) from None
        self.torn = self._index.torn + garbled
        return found

    def _read_records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        self.torn = 0
        for path in self.shards():
            for line in decode_records(self._whole_lines(path, None)):
                if line is None:
                    self.torn += 1
                else:
                    yield path.name, line

    def shards(self) -> list[Path]:
        """The record shards there are, by name. UserError when the folder cannot be read."""
        folder = self.folder / "records"
        try:
            names = sorted(name for name in os.listdir(folder) if name.endswith(".jsonl"))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._not_readable(error) from None
        return [folder / name for name in names]

    def _whole_lines(self, path: Path, run_id: str | None) -> Iterator[bytes]:
        """The shard's lines that end in a newline, with it; only those that contain ``run_id`` if given."""
        try:
            with open(path, "rb") as file:
                yield from self._each_line(file) if run_id is None else self._lines_with(run_id, file.read())
        except FileNotFoundError:  # removed since it was listed
            return
        except OSError as error:
            raise self._not_readable(error) from None

    def _each_line(self, file: BinaryIO) -> Iterator[bytes]:
        for line in file:
            if not line.endswith(b"\n"):
                self.torn += 1
                return  # if the file grew meanwhile, what follows is the rest of this line
            yield line

    def _lines_with(self, run_id: str, data: bytes) -> Iterator[bytes]:
        end = data.rfind(b"\n") + 1
        self.torn += end < len(data)
        needle, at = json.dumps(run_id).encode(), 0
        while (at := data.find(needle, at, end)) >= 0:
            start, at = data.rfind(b"\n", 0, at) + 1, data.index(b"\n", at) + 1
            yield data[start:at]

    def _append(self, kind: str, lines: Sequence[bytes]) -> None:
        """Writes whole lines to this process's own shard and waits until they are on disk.

        The file is closed each time: network file systems show a file's growth to others when it is closed.
        """
        if self._shard is None or self._shard_pid != os.getpid():  # the latter in a forked child
            self._shard, self._shard_pid = _shard_name(), os.getpid()
        path = self.folder / kind / self._shard
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "ab") as file:
                file.write(b"".join(lines))
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            self._shard = None  # it may end in half a line now, so the next one begins a fresh shard
            raise

    def _finish(self, record: dict[str, Any], details: dict[str, list[dict[str, Any]]]) -> None:
        key = {"run_id": record["run_id"], "attempt": record["attempt"]}
        # Everything is encoded before anything is written: what cannot be encoded leaves no half of itself.
        encoded = {
            kind: [encode({**key, **row, **key}, flat=kind != "configs") for row in rows]
            for kind, rows in details.items()
            if rows
        }
        line = encode(record)
        with self._lock:
            for kind, lines in encoded.items():
                self._append(kind, lines)
            self._append("records", [line])

    def _not_readable(self, error: OSError) -> UserError:
        return UserError(f"store={self.folder}: cannot be read: {error.strerror}: {error.filename}")

    def _not_writable(self, error: OSError) -> UserError:
        return UserError(f"store={self.folder}: cannot be written: {error.strerror or error}; give another folder")


class Attempt:
    """One try of one run, between its ``running`` line and its last. Made by ``Store.begin``."""

    def __init__(self, store: Store, number: int, line: dict[str, Any]) -> None:
        self.number = number
        self._store = store
        self._line = line
        self._finished = False

    def finish(
        self,
        status: str,
        fields: Mapping[str, Any],
        *,
        layers: Iterable[Mapping[str, Any]] = (),
        samples: Iterable[Mapping[str, Any]] = (),
        config: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> dict[str, Any]:
        """Writes the details, then the record line (the commit point), and returns the record as it is read back.

        ``status``: ok, failed or lost. ``fields``: columns, over those given to ``begin``. ``error``: the
        traceback; its last line becomes the column ``error`` unless ``fields`` has one. Values that are not
        finite are stored as null. OSError when the disk refuses (``finish`` may then be called again);
        RuntimeError when the attempt is finished already.
        """
        if status not in STATUSES or status == "running":
            raise ValueError(f"finish: status must be ok, failed or lost, not {status!r}")
        if self._finished:
            raise RuntimeError(f"attempt {self.number} of run {self._line['run_id']} is finished already")
        own = {name: self._line[name] for name in _OWN}
        record = {**self._line, **fields, **own, "status": status}
        if error is not None and not record.get("error"):
            record["error"] = (error.strip().splitlines() or [""])[-1][:_ERROR_LENGTH]
        record = _ordered(record)
        details = {
            "layers": [dict(row) for row in layers],
            "samples": [dict(row) for row in samples],
            "configs": [{"config": config}] if config is not None else [],
            "errors": [{"error": error}] if error is not None else [],
        }
        self._store._finish(record, details)
        self._finished = True
        written: dict[str, Any] = json.loads(encode(record))
        return written


def _ordered(line: Mapping[str, Any]) -> dict[str, Any]:
    return {column: line[column] for column in column_order(line)}


def _shard_name() -> str:
    host = re.sub(r"[^A-Za-z0-9.]+", "_", socket.gethostname())[:64]
    start = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    return f"{host}-{os.getpid()}-{start}-{secrets.token_hex(8)}.jsonl"


def _vanished(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ``running`` lines that nobody finished and whose process, on this host, is gone."""
    return [line for line in _unfinished(lines) if vanished(line)]


def vanished(line: Mapping[str, Any]) -> bool:
    """Whether the process that wrote ``line`` ran on this host and is gone."""
    return line.get("host") == socket.gethostname() and not _is_alive(line.get("pid"), line.get("pid_start"))


def _unfinished(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ``running`` lines of attempts that have no other line."""

    def attempt(line: dict[str, Any]) -> tuple[Any, ...]:  # two processes can be making the same one
        return tuple(line.get(name) for name in ("attempt", "host", "pid", "pid_start"))

    lines = list(lines)
    finished = {attempt(line) for line in lines if line["status"] != "running"}
    return [line for line in lines if line["status"] == "running" and attempt(line) not in finished]


def own_process() -> dict[str, Any]:
    """What tells this process from every other: host, pid, pid_start."""
    return process_of(os.getpid())


def process_of(pid: int) -> dict[str, Any]:
    """The same for another process of this host."""
    return {"host": socket.gethostname(), "pid": pid, "pid_start": _process_start(pid)}


def _is_alive(pid: Any, start: Any) -> bool:
    """Whether this host runs the process ``pid`` that started at ``start``; True when that cannot be known."""
    if type(pid) is not int or os.name != "posix":
        return True
    if Path("/proc/self/stat").exists():
        now = _process_start(pid)
        return now is not None and start in (None, now)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _process_start(pid: int) -> str | None:
    """``<clock ticks>@<boot>`` of a live process where /proc tells it; None for one that is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()  # the name before it can hold spaces and parentheses
    return None if state in ("Z", "X") else f"{rest[18]}@{boot}"


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collecting garbage while a million dicts are made would take most of the time, and finds nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
