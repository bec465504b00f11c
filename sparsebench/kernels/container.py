"""Compressed weights in a file: safetensors with a bitmap and packed values in place of each sparse matrix.

A matrix ``name`` of R x C is stored as ``name.mask`` uint8 (R, 8 * ceil(C / 64)), bit j of byte i of a row being
column 8 i + j; ``name.values``, the kept entries row by row; and ``name.row_ptr`` int32 (R + 1), where each row's
values start.
Whatever else is in the file is stored as it is, under its own name. The header's metadata hold ``format``
(``sparsebench.bitmap64``), ``version``, ``matrices`` (JSON: name -> shape, and n:m where every group keeps n) and
``checksums`` (JSON: tensor -> CRC-32 of its bytes). Rows are independent, so a reader that knows nothing of this
project needs a dozen lines. Reading checks everything before anything is used: a kernel that trusts a wrong offset
would read foreign memory.
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
from sparsebench.kernels.formats import BLOCK, NM, Bitmap, blocks_of

FORMAT = "sparsebench.bitmap64"
VERSION = "1"
PARTS = ("mask", "values", "row_ptr")
_VALUES = (torch.bfloat16, torch.float32, torch.float16)
_MOST = 2**31 - 1  # kept entries of a matrix: row_ptr is int32

Entry = Bitmap | NM | Tensor


def write(file: Path, entries: Mapping[str, Entry]) -> int:
    """Writes ``entries`` (name -> matrix or dense tensor) to ``file``; returns the file's bytes.

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
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be written: {_one_line(error)}") from error
    return file.stat().st_size


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
        if not isinstance(header, dict):
            raise _Damage(f"{name} has no shape")
        parts = [tensors.pop(f"{name}.{part}", None) for part in PARTS]
        found[name] = _matrix(name, header, *parts)
    return {**tensors, **found}


def _matrix(
    name: str, header: dict[str, Any], mask: Tensor | None, values: Tensor | None, row_ptr: Tensor | None
) -> Bitmap | NM:
    """A matrix from its stored parts, each checked against the others."""
    shape: Any = header.get("shape")
    pattern: Any = header.get("pattern")
    if not _whole(shape, 0):
        raise _Damage(f"{name} has no shape of two whole numbers")
    rows, columns = map(int, shape)
    if mask is None or values is None or row_ptr is None:
        raise _Damage(f"{name} lacks one of {', '.join(PARTS)}")
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (rows, BLOCK // 8 * blocks_of(columns)):
        raise _Damage(f"{name}.mask does not describe {rows} x {columns}")
    if values.dtype not in _VALUES or values.ndim != 1:
        raise _Damage(f"{name}.values is not a vector of a known number format")
    if row_ptr.dtype != torch.int32 or tuple(row_ptr.shape) != (rows + 1,):
        raise _Damage(f"{name}.row_ptr does not have {rows + 1} offsets")
    kept = np.unpackbits(mask.numpy(), axis=-1, bitorder="little").astype(bool).reshape(rows, -1)
    if kept[:, columns:].any():
        raise _Damage(f"{name}.mask keeps columns beyond the last")
    kept = kept[:, :columns]
    ends = np.concatenate([[0], kept.sum(1, dtype=np.int64).cumsum()])
    if not np.array_equal(ends, row_ptr.numpy()) or ends[-1] != values.numel():
        raise _Damage(f"{name}: mask, values and row_ptr do not count the same entries")
    dense, where = torch.zeros(rows, columns, dtype=values.dtype), torch.from_numpy(np.ascontiguousarray(kept))
    dense[where] = values
    if pattern is None:
        return Bitmap.from_dense(dense, where)
    if not _whole(pattern, 1) or pattern[0] > pattern[1] or BLOCK % pattern[1] or columns % pattern[1]:
        raise _Damage(f"{name} has an impossible pattern")
    if bool((where.view(rows, -1, pattern[1]).sum(-1) != pattern[0]).any()):
        raise _Damage(f"{name} does not keep {pattern[0]} of every {pattern[1]}")
    return NM.from_dense(dense, pattern[0], pattern[1], where)


def _stored(name: str, entry: Bitmap | NM) -> dict[str, Tensor]:
    """The parts of a matrix, row by row."""
    if entry.stored.numel() > _MOST:
        raise UserError(f"{name}: keeps {entry.stored.numel()} entries, a file takes {_MOST} per matrix")
    groups, blocks, together = entry.mask.shape
    words = entry.mask.transpose(1, 2).reshape(groups * together, blocks)[: entry.rows].contiguous()
    octets = words.numpy().view(np.uint8).reshape(entry.rows, BLOCK // 8 * blocks)
    kept = np.unpackbits(octets, axis=-1, bitorder="little").astype(bool).reshape(entry.rows, -1)[:, : entry.columns]
    row_ptr = torch.zeros(entry.rows + 1, dtype=torch.int32)
    row_ptr[1:] = torch.from_numpy(kept.sum(1, dtype=np.int64).cumsum())
    values = entry.dense()[torch.from_numpy(np.ascontiguousarray(kept))]
    return {f"{name}.mask": torch.from_numpy(octets), f"{name}.values": values, f"{name}.row_ptr": row_ptr}


def _header(entry: Bitmap | NM) -> dict[str, list[int]]:
    shape = {"shape": [entry.rows, entry.columns]}
    return shape | {"pattern": [entry.n, entry.m]} if isinstance(entry, NM) else shape


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


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data) if tensor.numel() else 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
