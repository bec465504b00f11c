"""Records by filters, without reading more of a store into memory than was asked for.

A store is read in one pass: lines that cannot meet the filters are passed over as bytes, before they are parsed.
``compact`` writes the records that count into one Parquet file (typed columns, and each record's line as it is),
which answers faster still; what was appended since is read from the shards. The shards stay as they are.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsebench.errors import UserError
from sparsebench.results import view
from sparsebench.results.record import COLUMNS, SCORES, decode_records, leading_run_id, rank
from sparsebench.results.store import Store, no_garbage_collection

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

_BLOCK = 1 << 24  # bytes read at once
_BATCH = 20_000  # records of a row group
_KEY = b"sparsebench"  # of the Parquet file's own metadata
# Columns that every line of a run has alike, as texts: a line without the value asked for is another run's.
_ALIKE = ("method", "model", "task", "calibration", "pattern", "sparse_model_id")
_NUMBERS = (
    "sparsity achieved achieved_model seed attempt flops_prefill flops_prefill_dense flops_decode flops_decode_dense "
    "cost_length cost_length_decode bytes_weights bytes_weights_dense kv_bytes_per_token bytes_decode seconds "
    "peak_memory_bytes pid restarts schema seconds_sparsify seconds_evaluate"
).split()


@dataclass
class Found:
    """``records``: one per run, in order of first appearance; ``torn``: lines that were no records."""

    records: list[dict[str, Any]] = field(default_factory=list)
    torn: int = 0


def records(store: Store, filters: Mapping[str, str]) -> Found:
    """The records that meet every filter (as ``view.select``); memory grows with them, not with the store.

    UserError for a column that nothing has, a value that its column never has, or a store that cannot be read."""
    view.check_values(filters)
    return _read(store, filters, None)


def _read(store: Store, filters: Mapping[str, str], wanted: Container[str] | None) -> Found:
    """As ``records``; of the shards' lines only those of the runs ``wanted``, if given, are parsed and kept."""
    found, best = Found(), dict[str, dict[str, Any]]()
    with no_garbage_collection():
        covered = _covered(store.folder, filters, best)
        needles = _needles(filters)
        for shard in store.shards():
            for lines in _blocks(shard, covered.get(shard.name, 0), needles, found):
                chosen = lines if wanted is None else [line for line in lines if _may_be(line, wanted)]
                for line in decode_records(chosen):
                    if line is None:
                        found.torn += 1
                    else:
                        known = best.get(line["run_id"])
                        if known is None or rank(line) > rank(known):
                            best[line["run_id"]] = line
    store.torn = found.torn  # as after any other read of it
    unknown = set(filters) - set(COLUMNS)
    if unknown and not unknown <= set().union(*best.values()):
        view.check_columns(_some(store), filters)  # others may have the column
        return found
    found.records = view.select(list(best.values()), filters)
    return found


def planned(store: Store, points: Mapping[str, Mapping[str, Any]]) -> Found:
    """The records of these runs (run id -> its point: method, model, task ...), in their order; what has none is left
    out. Lines of other methods, models and tasks are passed over."""
    filters = {}
    for column in ("method", "model", "task") if points else ():
        values = {str(point.get(column, ",")) for point in points.values()}
        if not any("," in value for value in values):  # a filter's values are joined by commas
            filters[column] = ",".join(sorted(values))
    found = _read(store, filters, points) if points else Found()
    known = {one["run_id"]: one for one in found.records}
    return Found([known[run_id] for run_id in points if run_id in known], found.torn)


def _may_be(line: bytes, wanted: Container[str]) -> bool:
    run_id = leading_run_id(line)
    return not run_id or run_id in wanted


def _needles(filters: Mapping[str, str]) -> list[bytes]:
    """Byte strings of which a line that meets the filters has at least one; [] when nothing is known."""
    choices = []
    for column in _ALIKE:
        values = [one.strip() for one in str(filters.get(column, "none")).split(",")]
        if all(value.lower() not in ("none", "null", "") for value in values):
            end = b"" if column.endswith("_id") else b'"'  # ids are asked for by their beginning
            choices.append([f'"{column}":'.encode() + json.dumps(value).encode()[:-1] + end for value in values])
    return min(choices, key=len, default=[])


def _blocks(shard: Path, start: int, needles: Sequence[bytes], found: Found) -> Iterator[list[bytes]]:
    """The shard's whole lines from byte ``start`` that have a needle, some at a time."""
    try:
        with open(shard, "rb") as file:
            file.seek(start)
            rest = b""
            while block := file.read(_BLOCK):
                data = rest + block
                end = data.rfind(b"\n") + 1
                data, rest = data[:end], data[end:]
                yield _with(needles, data) if needles else data.splitlines(keepends=True)
            found.torn += bool(rest)
    except FileNotFoundError:  # removed since it was listed
        return
    except OSError as error:
        raise UserError(f"store: cannot be read: {error.strerror}: {error.filename}") from None


def _with(needles: Sequence[bytes], data: bytes) -> list[bytes]:
    """The lines of ``data`` that contain a needle, in order, each once."""
    places: dict[int, int] = {}
    for needle in needles:
        at = 0
        while (at := data.find(needle, at)) >= 0:
            start, at = data.rfind(b"\n", 0, at) + 1, data.index(b"\n", at) + 1
            places[start] = at
    return [data[start:end] for start, end in sorted(places.items())]


def _some(store: Store) -> Iterator[dict[str, Any]]:
    """The records in the first block of each shard: enough to know which columns there are."""
    for shard in store.shards():
        lines = next(_blocks(shard, 0, (), Found()), [])
        yield from (line for line in decode_records(lines) if line is not None)


def compact(store: Store) -> tuple[Path, int]:
    """Writes the compacted form of all records; its file and how many they are. The older one is removed when the
    new one is whole. UserError for a store without records, or one that cannot be written."""
    places, sizes = _best_places(store)
    if not places:
        raise UserError(f"store={store.folder}: there are no records to compact")
    folder = store.folder / "compact"
    draft = folder / f".{secrets.token_hex(8)}"
    try:
        folder.mkdir(exist_ok=True)
        _write(draft, store.folder / "records", places, sizes)
        older = list(folder.glob("*.parquet"))
        file = folder / f"{sum(sizes.values()):015}-{secrets.token_hex(4)}.parquet"
        os.replace(draft, file)
        for one in older:
            one.unlink(missing_ok=True)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UserError(f"store={store.folder}: cannot be written: {error.strerror or error}") from None
    return file, len(places)


def _best_places(store: Store) -> tuple[list[tuple[str, int, int]], dict[str, int]]:
    """Where the line that counts of each run lies (shard, start, end), and how far each shard was read."""
    best: dict[str, tuple[tuple[int, int, bool], str, int, int]] = {}
    sizes = {}
    with no_garbage_collection():
        for shard in store.shards():
            at = 0
            for lines in _blocks(shard, 0, (), Found()):
                for raw, line in zip(lines, decode_records(lines), strict=True):
                    if line is not None and (line["run_id"] not in best or rank(line) > best[line["run_id"]][0]):
                        best[line["run_id"]] = (rank(line), shard.name, at, at + len(raw))
                    at += len(raw)
            sizes[shard.name] = at
    return [place for _, *place in best.values()], sizes  # type: ignore[misc]


def _write(file: Path, shards: Path, places: Sequence[tuple[str, int, int]], sizes: Mapping[str, int]) -> None:
    """The Parquet file: row groups of typed columns with each record's line."""
    import pyarrow
    from pyarrow import parquet

    texts = [name for name in COLUMNS if name not in (*_NUMBERS, SCORES, "flagged")]
    fields = [pyarrow.field(name, pyarrow.string()) for name in texts]
    fields += [pyarrow.field(name, pyarrow.float64()) for name in _NUMBERS]
    fields += [pyarrow.field("flagged", pyarrow.bool_()), pyarrow.field("line", pyarrow.binary())]
    schema = pyarrow.schema(fields, metadata={_KEY: json.dumps({"shards": dict(sizes)}).encode()})
    with ExitStack() as stack, parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        opened = {name: stack.enter_context(open(shards / name, "rb")) for name in sizes}
        for start in range(0, len(places), _BATCH):
            lines = []
            for name, first, last in places[start : start + _BATCH]:
                opened[name].seek(first)
                lines.append(opened[name].read(last - first))
            writer.write_table(_table(lines, texts, schema))


def _table(lines: list[bytes], texts: list[str], schema: pyarrow.Schema) -> pyarrow.Table:
    import pyarrow

    rows = [line for line in decode_records(lines) if line is not None]
    columns: dict[str, list[Any]] = {name: [_text(row.get(name)) for row in rows] for name in texts}
    columns |= {name: [_number(row.get(name)) for row in rows] for name in _NUMBERS}
    columns["flagged"] = [bool(row.get("flagged")) for row in rows]
    columns["line"] = lines
    return pyarrow.table(columns, schema=schema)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _covered(folder: Path, filters: Mapping[str, str], best: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Puts what the compacted file has of the selection into ``best``; how far it covers each shard."""
    for file in sorted((folder / "compact").glob("*.parquet"), reverse=True):
        from pyarrow import parquet

        opened = parquet.ParquetFile(file)
        sizes: dict[str, int] = json.loads((opened.schema_arrow.metadata or {})[_KEY])["shards"]
        if any(_size(folder / "records" / name) < size for name, size in sizes.items()):
            continue  # somebody changed the shards by hand
        for lines in _selected(opened, filters):
            best |= {line["run_id"]: line for line in decode_records(lines) if line is not None}
        return sizes
    return {}


def _selected(opened: parquet.ParquetFile, filters: Mapping[str, str]) -> Iterator[list[bytes]]:
    """The lines of the rows that meet the filters on text columns, a row group at a time."""
    import pyarrow.compute as compute

    exact = {column: values for column, values in filters.items() if column in _ALIKE and not column.endswith("_id")}
    for group in range(opened.num_row_groups):
        if not exact:
            yield opened.read_row_group(group, columns=["line"])["line"].to_pylist()
            continue
        keys = opened.read_row_group(group, columns=list(exact))
        keep = None
        for column, values in exact.items():
            wanted = [None if one.strip().lower() in ("none", "null", "") else one.strip() for one in values.split(",")]
            here = compute.is_in(keys[column], value_set=_array(wanted))
            keep = here if keep is None else compute.and_(keep, here)
        if compute.any(keep).as_py():
            yield opened.read_row_group(group, columns=["line"])["line"].filter(keep).to_pylist()


def _array(values: list[str | None]) -> pyarrow.Array:
    import pyarrow

    return pyarrow.array(values, pyarrow.string())


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1
