"""Compressed weights in a file: safetensors with a bitmap and packed values in place of each sparse matrix.

A matrix ``name`` of R x C is stored as ``name.mask`` uint8 (R, 8 * ceil(C / 64)), bit j of byte i of a row being
column 8 i + j; ``name.values``, the kept entries row by row; and ``name.row_ptr`` int32 (R + 1), where each row's
values start. A matrix of 4-bit groups (``GroupQuantised``, K of them kept, g columns each) is ``name.row_ptr`` int32
(R + 1), where each row's groups start; ``name.column`` int16 or int32 (K), ascending in a row; ``name.codes`` uint8
(K, g / 2), the first of two values in the low half; ``name.scale`` and ``name.zero`` float16 (K): a value is
``scale * (code - zero)``.
Whatever else is in the file is stored as it is, under its own name. The header's metadata hold ``format``
(``sparsebench.bitmap64``), ``version``, ``matrices`` (JSON: name -> shape, with n:m as ``pattern`` where every group
keeps n, with g as ``group`` where there are 4-bit groups) and ``checksums`` (JSON: tensor -> CRC-32 of its bytes).
Rows are independent, so a reader that knows nothing of this project needs a dozen lines. Reading checks everything
before anything is used (a kernel that trusts a wrong offset would read foreign memory) and never makes a dense matrix.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsebench.errors import UserError
from sparsebench.kernels.formats import BLOCK, NM, ROWS, Bitmap, GroupQuantised, Matrix, blocks_of, padded

FORMAT = "sparsebench.bitmap64"
VERSION = "1"
PARTS = ("mask", "values", "row_ptr")
GROUP_PARTS = ("row_ptr", "column", "codes", "scale", "zero")
VALUES = (torch.bfloat16, torch.float32, torch.float16)  # number formats of the values
_MOST = 2**31 - 1  # kept entries of a matrix: row_ptr is int32
_AT_ONCE = 2**20  # entries of a matrix that are reordered at a time

Entry = Matrix | Tensor


def write(file: Path, entries: Mapping[str, Entry]) -> int:
    """Writes ``entries`` (name -> matrix or dense tensor) to ``file``, equal ones in equal bytes; returns their number.

    UserError when the file cannot be written, a name is taken twice or a matrix keeps 2^31 entries or more.
    """
    tensors: dict[str, Tensor] = {}
    matrices = {name: entry for name, entry in entries.items() if not isinstance(entry, Tensor)}
    for name, entry in entries.items():
        parts = {name: entry.contiguous()} if isinstance(entry, Tensor) else _stored(name, entry)
        taken = sorted(parts.keys() & tensors.keys())
        if taken:
            raise UserError(f"{file}: two tensors would be called {taken[0]}")
        tensors |= parts
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "matrices": json.dumps({name: _header(entry) for name, entry in matrices.items()}),
        "checksums": json.dumps({name: _checksum(tensor) for name, tensor in tensors.items()}),
    }
    try:
        save_file(tensors, file, metadata)
        _order_metadata(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be written: {_one_line(error)}") from error
    return file.stat().st_size


def stored_bytes(entry: Entry) -> int:
    """Bytes of an entry in a file, without the header's."""
    if isinstance(entry, Tensor):
        return entry.numel() * entry.element_size()
    if isinstance(entry, GroupQuantised):
        return entry.nbytes
    mask = entry.rows * BLOCK // 8 * blocks_of(entry.columns)
    return mask + entry.stored.numel() * entry.stored.element_size() + 4 * (entry.rows + 1)


def read(file: Path) -> dict[str, Entry]:
    """What ``write`` wrote, as it was packed. UserError, one line, for a file that is missing, foreign or damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{file}: is not {FORMAT} but {metadata.get('format', 'without a format')}")
            if metadata.get("version") != VERSION:
                raise UserError(f"{file}: version {metadata.get('version')}; this program reads version {VERSION}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file") from error
    # a damaged header can ask safetensors for anything: types it does not know, sizes beyond all memory
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
        raise UserError(f"{file}: damaged: {_one_line(error)}") from error
    try:
        return _entries(metadata, tensors)
    except _Damage as damage:
        raise UserError(f"{file}: damaged: {damage}") from damage


class _Damage(Exception):
    """What is wrong with a file, in words."""


def _entries(metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> dict[str, Entry]:
    checksums, matrices = _json(metadata, "checksums"), _json(metadata, "matrices")
    if checksums.keys() != tensors.keys():
        raise _Damage("the header's checksums are not of the file's tensors")
    for name, tensor in tensors.items():
        if checksums[name] != _checksum(tensor):
            raise _Damage(f"{name} does not have its checksum")
    found: dict[str, Entry] = {}
    for name, header in matrices.items():
        if not isinstance(header, dict) or not _whole(header.get("shape"), 0):
            raise _Damage(f"{name} has no shape of two whole numbers")
        quantised = "group" in header
        parts = [tensors.pop(f"{name}.{part}", None) for part in (GROUP_PARTS if quantised else PARTS)]
        there = [part for part in parts if part is not None]
        if len(there) < len(parts):
            raise _Damage(f"{name} lacks one of {', '.join(GROUP_PARTS if quantised else PARTS)}")
        found[name] = _groups(name, header, *there) if quantised else _matrix(name, header, *there)
    return {**tensors, **found}


def _matrix(name: str, header: dict[str, Any], mask: Tensor, values: Tensor, row_ptr: Tensor) -> Bitmap | NM:
    """A matrix from its stored parts, each checked against the others."""
    rows, columns = map(int, header["shape"])
    blocks, groups = blocks_of(columns), -(-rows // ROWS)
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (rows, BLOCK // 8 * blocks):
        raise _Damage(f"{name}.mask does not describe {rows} x {columns}")
    if values.dtype not in VALUES or values.ndim != 1:
        raise _Damage(f"{name}.values is not a vector of a known number format")
    if row_ptr.dtype != torch.int32 or tuple(row_ptr.shape) != (rows + 1,):
        raise _Damage(f"{name}.row_ptr does not have {rows + 1} offsets")
    words = np.zeros((groups * ROWS, blocks), np.int64)
    words.view(np.uint8)[:rows] = mask.numpy()
    if columns % BLOCK and (words[:, -1].view(np.uint64) >> np.uint64(columns % BLOCK)).any():
        raise _Damage(f"{name}.mask keeps columns beyond the last")
    counts = torch.from_numpy(np.bitwise_count(words.view(np.uint64)).astype(np.int64))
    ends = torch.zeros(groups * ROWS + 1, dtype=torch.int64)
    ends[1:] = counts.sum(1).cumsum(0)
    if not torch.equal(ends[: rows + 1], row_ptr.long()) or int(ends[-1]) != values.numel():
        raise _Damage(f"{name}: mask, values and row_ptr do not count the same entries")
    stream = padded(_reordered(values, counts.view(groups, ROWS, blocks), to_rows=False))
    streamed = torch.from_numpy(words).view(groups, ROWS, blocks).transpose(1, 2).contiguous()
    if "pattern" not in header:
        return Bitmap(rows, columns, streamed, stream, ends.index_select(0, torch.arange(0, len(ends), ROWS)))
    pattern: Any = header["pattern"]
    if not _whole(pattern, 1) or pattern[0] > pattern[1] or BLOCK % pattern[1] or columns % pattern[1]:
        raise _Damage(f"{name} has an impossible pattern")
    if (_per_group(words[:rows], columns, pattern[1]) != pattern[0]).any():
        raise _Damage(f"{name} does not keep {pattern[0]} of every {pattern[1]}")
    return NM(rows, columns, pattern[0], pattern[1], streamed, stream)


def _groups(
    name: str, header: dict[str, Any], row_ptr: Tensor, column: Tensor, codes: Tensor, scale: Tensor, zero: Tensor
) -> GroupQuantised:
    """A matrix of 4-bit groups from its stored parts, each checked against the others."""
    (rows, columns), group = map(int, header["shape"]), header["group"]
    if type(group) is not int or group < 2 or group % 2 or columns % group:
        raise _Damage(f"{name} has an impossible group")
    kept = scale.numel()
    if row_ptr.dtype != torch.int32 or tuple(row_ptr.shape) != (rows + 1,):
        raise _Damage(f"{name}.row_ptr does not have {rows + 1} offsets")
    if int(row_ptr[0]) or int(row_ptr[-1]) != kept or bool((row_ptr[1:] < row_ptr[:-1]).any()):
        raise _Damage(f"{name}.row_ptr does not divide {kept} groups into rows")
    if column.dtype not in (torch.int16, torch.int32) or tuple(column.shape) != (kept,):
        raise _Damage(f"{name}.column does not place {kept} groups")
    if codes.dtype != torch.uint8 or tuple(codes.shape) != (kept, group // 2):
        raise _Damage(f"{name}.codes does not hold {kept} groups of {group}")
    if any(one.dtype != torch.float16 or tuple(one.shape) != (kept,) for one in (scale, zero)):
        raise _Damage(f"{name}: scale and zero are not {kept} numbers in float16")
    if bool(((column < 0) | (column.int() >= columns // group)).any()):
        raise _Damage(f"{name}.column places a group outside the matrix")
    row = torch.repeat_interleave(row_ptr.diff().long())
    if bool(((column[1:] <= column[:-1]) & (row[1:] == row[:-1])).any()):
        raise _Damage(f"{name}.column does not ascend within a row")
    return GroupQuantised(rows, columns, group, row_ptr, column, codes, scale, zero)


def _stored(name: str, entry: Matrix) -> dict[str, Tensor]:
    """The parts of a matrix, row by row."""
    if isinstance(entry, GroupQuantised):
        return {f"{name}.{part}": getattr(entry, part).contiguous() for part in GROUP_PARTS}
    if entry.stored.numel() > _MOST:
        raise UserError(f"{name}: keeps {entry.stored.numel()} entries, a file takes {_MOST} per matrix")
    groups, blocks, together = entry.mask.shape
    words = entry.mask.transpose(1, 2).reshape(groups * together, blocks).contiguous().numpy()
    counts = torch.from_numpy(np.bitwise_count(words.view(np.uint64)).astype(np.int64))
    row_ptr = torch.zeros(entry.rows + 1, dtype=torch.int32)
    row_ptr[1:] = counts.sum(1).cumsum(0)[: entry.rows]
    octets = torch.from_numpy(words[: entry.rows].view(np.uint8).reshape(entry.rows, BLOCK // 8 * blocks))
    values = _reordered(entry.stored, counts.view(groups, together, blocks), to_rows=True)
    return {f"{name}.mask": octets, f"{name}.values": values, f"{name}.row_ptr": row_ptr}


def _reordered(values: Tensor, counts: Tensor, to_rows: bool) -> Tensor:
    """The kept entries from the kernels' order (group, block, row in the group) to that of rows, or back.

    ``counts``: int64 (groups, rows in a group, blocks), kept entries of each block of a row. Groups follow each other
    in both orders, so that only a few of them are indexed at a time.
    """
    groups, together, blocks = counts.shape
    step = max(1, _AT_ONCE // max(1, together * blocks * BLOCK))
    result, start = torch.empty_like(values), 0
    for part in counts.split(step) if groups else ():
        row_starts = (part.flatten().cumsum(0) - part.flatten()).view_as(part).transpose(1, 2).flatten()
        lengths = part.transpose(1, 2).flatten()
        stream_starts = lengths.cumsum(0) - lengths
        end = start + int(lengths.sum())
        where = torch.repeat_interleave(row_starts - stream_starts, lengths) + torch.arange(end - start)
        if to_rows:
            result[start:end][where] = values[start:end]
        else:
            result[start:end] = values[start:end][where]
        start = end
    return result


def _per_group(words: np.ndarray[Any, np.dtype[np.int64]], columns: int, m: int) -> np.ndarray[Any, Any]:
    """Kept entries of every ``m`` columns (a power of two up to 64): (rows, columns / m)."""
    fields = words.view(np.uint8 if m < 8 else f"u{m // 8}")
    if m < 8:
        rows, octets = fields.shape
        fields = np.stack([fields >> shift & 2**m - 1 for shift in range(0, 8, m)], axis=-1)
        fields = fields.reshape(rows, octets * 8 // m)
    counted: np.ndarray[Any, Any] = np.bitwise_count(fields)[:, : columns // m]
    return counted


def _header(entry: Matrix) -> dict[str, Any]:
    header: dict[str, Any] = {"shape": [entry.rows, entry.columns]}
    if isinstance(entry, GroupQuantised):
        return header | {"group": entry.group}
    return header | {"pattern": [entry.n, entry.m]} if isinstance(entry, NM) else header


def _whole(pair: Any, least: int) -> bool:
    """Whether this is a list of two whole numbers of at least ``least``."""
    return isinstance(pair, list) and len(pair) == 2 and all(type(one) is int and one >= least for one in pair)


def _json(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError) as error:
        raise _Damage(f"the header's {key} cannot be read") from error
    if not isinstance(found, dict):
        raise _Damage(f"the header's {key} cannot be read")
    return found


def _order_metadata(file: Path) -> None:
    """Sorts the header's metadata, which safetensors writes in a new order each time: equal entries give equal files,
    and so one content hash."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # as it is, unless the two disagree on how to escape a name
            stream.seek(8)
            stream.write(text.ljust(size))


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data) if tensor.numel() else 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
