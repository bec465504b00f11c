"""Weights of which little is left, as lists of places and values: below a sixth of them faster than a bitmap.

A bitmap costs a kernel the same for every column, whatever it holds; from about five sixths of zeros on that takes
longer than reading it. ``Lists`` costs what it holds. It is made from a ``Bitmap`` when a model is loaded or swapped,
and never stored in a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsebench.kernels import build
from sparsebench.kernels.formats import (
    BLOCK,
    NM,
    Bitmap,
    Matrix,
    checked,
    mask_of,
    padded,
    size_of,
    tiled,
    untiled,
    whole_numbers,
)

DTYPE = torch.bfloat16  # of the values
SLICE = 16  # rows that take their steps together
LANES = 32  # of a step: two for each row of a slice
_PLACES = BLOCK // 2 * LANES  # of a chunk of a slice
FROM = 5 / 6  # zeros / all, from which lists are faster than a bitmap; at 80% they are as fast
Array = np.ndarray[Any, Any]
_FAST = ("avx512", "avx512vbmi2")  # where the kernel is more than a loop over the entries


@dataclass(frozen=True)
class Lists:
    """A matrix (``rows``, ``columns``) of any mask in bfloat16, in slices of 16 rows and chunks of 64 columns.

    A step takes up to two entries of each row of a slice from a chunk, lanes 2 r and 2 r + 1 from row r. ``steps``:
    uint8 (slices, chunks); ``masks``: int32, one per step, bit l: lane l is taken; ``index``: uint8, the column of each
    entry within its chunk, and ``values``: bfloat16, both 1-D in the order (slice, chunk, step, lane), then 64 spare
    bytes; ``starts``: int64 (slices + 1, 2), where a slice's masks and its entries begin.
    """

    rows: int
    columns: int
    steps: Tensor
    masks: Tensor
    index: Tensor
    values: Tensor
    starts: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, kept: Tensor | None = None) -> Lists:
        """Packs ``weight`` (out, in) bfloat16; ``kept``: (out, in) bool, what is nonzero if not given."""
        weight, kept = checked(weight, kept)
        if weight.dtype != DTYPE:
            raise ValueError(f"lists hold bfloat16, not {str(weight.dtype).removeprefix('torch.')}")
        bits = tiled(kept, SLICE).numpy()
        slices, chunks = bits.shape[:2]
        where = np.flatnonzero(bits)
        rank = np.cumsum(bits, axis=-1, dtype=np.uint8).reshape(-1)[where] - 1  # of an entry in its row of the chunk
        row, column = where // BLOCK % SLICE, (where % BLOCK).astype(np.uint8)
        place = where // (SLICE * BLOCK) * _PLACES + (rank >> 1) * np.int64(LANES) + 2 * row + (rank & 1)
        taken = np.zeros(slices * chunks * _PLACES, dtype=bool)
        taken[place] = True
        value = whole_numbers(tiled(weight, SLICE)).reshape(-1)[where]
        masks = np.packbits(taken.reshape(slices, chunks, -1), axis=-1, bitorder="little").view(np.int32)
        used = masks != 0  # the steps of a chunk are its first ones
        starts = torch.zeros(slices + 1, 2, dtype=torch.int64)
        starts[1:, 0] = torch.from_numpy(used.sum((1, 2))).cumsum(0)
        starts[1:, 1] = torch.from_numpy(bits.sum((1, 2, 3))).cumsum(0)
        index, values = (torch.from_numpy(_ordered(one, place, taken)) for one in (column, value))
        steps = torch.from_numpy(used.sum(-1).astype(np.uint8))
        parts = steps, padded(torch.from_numpy(masks[used])), padded(index), padded(values.view(weight.dtype)), starts
        return cls(weight.shape[0], weight.shape[1], *parts)

    def dense(self) -> Tensor:
        """(rows, columns), zeros where nothing was kept."""
        slices, chunks = self.steps.shape
        octets = self.masks[: int(self.starts[-1, 0])].numpy().view(np.uint8).reshape(-1, LANES // 8)
        step, lane = map(torch.from_numpy, np.unpackbits(octets, axis=-1, bitorder="little").nonzero())
        chunk = torch.arange(slices * chunks).repeat_interleave(self.steps.flatten().long())[step]
        full = torch.zeros(slices, chunks, SLICE, BLOCK, dtype=self.values.dtype)
        full.view(slices * chunks, SLICE, BLOCK)[chunk, lane // 2, self.index[: len(lane)].long()] = self.stored
        return untiled(full, self.rows, self.columns)

    @property
    def stored(self) -> Tensor:
        """The values without the spare bytes, a view."""
        return self.values[: int(self.starts[-1, 1])]

    @property
    def nbytes(self) -> int:
        """Bytes of everything but the spare ones."""
        kept = len(self.stored)
        return size_of(self.steps, self.starts, self.stored, self.index[:kept]) + 4 * int(self.starts[-1, 0])

    @property
    def density(self) -> float:
        """Kept entries / all."""
        return len(self.stored) / max(1, self.rows * self.columns)


def _ordered(entries: Array, place: Array, taken: Array) -> Array:
    """``entries`` (n,) in ascending order of their places, which are those that are taken."""
    spread = np.empty(len(taken), dtype=entries.dtype)
    spread[place] = entries
    ordered: Array = spread[taken]
    return ordered


def quickest(matrix: Matrix) -> Matrix | Lists:
    """A packed matrix on the CPU in the format in which this machine multiplies it with a vector soonest."""
    if not isinstance(matrix, Bitmap | NM) or matrix.values.dtype != DTYPE or matrix.values.device.type != "cpu":
        return matrix
    return listed(matrix) if pays(1 - matrix.density) else matrix


def pays(sparsity: float) -> bool:
    """Whether lists of bfloat16 with so many zeros / all are faster here than a bitmap."""
    kernels = build.library()
    return sparsity >= FROM and kernels is not None and kernels.isa in _FAST


def listed(matrix: Bitmap | NM) -> Lists:
    """The same entries as lists, zeros that were kept included."""
    return Lists.from_dense(matrix.dense(), mask_of(matrix))


def bitmap_of(lists: Lists) -> Bitmap:
    """The same entries as a bitmap."""
    return Bitmap.from_dense(lists.dense(), mask_of(lists))
