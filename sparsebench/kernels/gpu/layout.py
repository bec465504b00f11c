"""Sparse weights as the GPU kernels read them.

``Tiles`` is the bitmap of ``formats`` cut into tiles of 16 rows by 64 columns (the rows of one tensor-core operand):
what a program reads in one step lies together, and every row of a tile knows where its values start, so that no lane
waits for another's count. Over the bitmap on the CPU that adds 16 bits per 64 columns: 1.6% of dense bfloat16.
``SemiStructured`` is torch's own 2:4 format, for the sparse tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsebench.kernels import lists
from sparsebench.kernels.bits import packed_bits, unpacked_bits
from sparsebench.kernels.formats import NM, Bitmap, GroupQuantised, Matrix, mask_of, padded, tiled, untiled
from sparsebench.kernels.lists import Lists

TILE_ROWS = 16


@dataclass(frozen=True)
class Tiles:
    """A matrix (``rows``, ``columns``) of any mask, on any device.

    ``mask``: int64 (row tiles, blocks, 16), words as in ``Bitmap``; ``within``: int16 (row tiles, blocks, 16), where a
    row's values start in its tile; ``starts``: int64 (row tiles, blocks), where a tile's values start; ``values``: 1-D,
    in the order (row tile, block, row, column), then 64 spare bytes.
    """

    rows: int
    columns: int
    mask: Tensor
    within: Tensor
    starts: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, kept: Tensor | None = None) -> Tiles:
        """Packs ``weight`` (out, in) on its device; ``kept``: (out, in) bool, what is nonzero if not given."""
        weight = weight.detach()
        kept = weight != 0 if kept is None else kept.detach().bool()
        if weight.ndim != 2 or kept.shape != weight.shape:
            raise ValueError(f"a matrix and its mask are needed, not {tuple(weight.shape)} and {tuple(kept.shape)}")
        rows, columns = weight.shape
        bits = tiled(kept, TILE_ROWS)
        counts = bits.sum(-1)
        totals = counts.sum(-1)
        return cls(
            rows,
            columns,
            packed_bits(bits).view(torch.int64).squeeze(-1),
            (counts.cumsum(-1) - counts).to(torch.int16),
            (totals.flatten().cumsum(0).view(totals.shape) - totals),
            padded(tiled(weight, TILE_ROWS)[bits]),
        )

    def dense(self) -> Tensor:
        """(rows, columns), zeros where nothing was kept."""
        bits = unpacked_bits(self.mask[..., None].view(torch.uint8))
        full = torch.zeros(bits.shape, dtype=self.values.dtype, device=self.values.device)
        full[bits] = self.stored
        return untiled(full, self.rows, self.columns)

    @property
    def stored(self) -> Tensor:
        """The values without the spare bytes, a view."""
        return self.values[: self.values.numel() - padded(self.values[:0]).numel()]

    @property
    def nbytes(self) -> int:
        """Bytes of mask, starts and values, without the spare ones."""
        parts = (self.mask, self.within, self.starts, self.stored)
        return sum(one.numel() * one.element_size() for one in parts)

    @property
    def density(self) -> float:
        """Kept entries / all."""
        return self.stored.numel() / max(1, self.rows * self.columns)


@dataclass(frozen=True)
class SemiStructured:
    """A matrix (``rows``, ``columns``) with two kept of every four columns, in torch's format for sparse tensor cores.
    ``compressed``: torch's own tensor of that kind."""

    rows: int
    columns: int
    compressed: Tensor

    @classmethod
    def from_nm(cls, matrix: NM, device: torch.device) -> SemiStructured:
        """ValueError, in one line, where torch cannot hold or multiply it (``refusal``)."""
        why = refusal(matrix, device)
        if why is not None:
            raise ValueError(f"2:4 in torch's format: {why}")
        compressed: Tensor = torch.sparse.to_sparse_semi_structured(matrix.dense().to(device))
        return cls(matrix.rows, matrix.columns, compressed)

    def dense(self) -> Tensor:
        """(rows, columns)."""
        return self.compressed.to_dense()

    @property
    def nbytes(self) -> int:
        """Bytes of the kept values and two bits for each."""
        return self.rows * self.columns * self.compressed.element_size() * 9 // 16

    @property
    def density(self) -> float:
        """Stored entries / all."""
        return 0.5


Packed = Tiles | SemiStructured


def refusal(matrix: NM, device: torch.device) -> str | None:
    """Why torch's 2:4 path does not take a matrix on this device, or None. float32 is refused although torch has it:
    it would be multiplied in TF32, and as one of every two."""
    if (matrix.n, matrix.m) != (2, 4):
        return f"the pattern is {matrix.n}:{matrix.m}"
    if matrix.values.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {str(matrix.values.dtype).removeprefix('torch.')}"
    if matrix.rows % 32 or matrix.columns % 64 or not matrix.rows:
        return f"needs a multiple of 32 outputs and 64 inputs, not {matrix.rows} x {matrix.columns}"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"needs an NVIDIA GPU, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"needs compute capability 8.0, not {capability[0]}.{capability[1]}"


def uploaded(matrix: Bitmap | NM, device: torch.device) -> Tiles | SemiStructured:
    """A packed matrix in the GPU's format: torch's for 2:4 where it takes it, tiles for everything else."""
    if isinstance(matrix, NM) and refusal(matrix, device) is None:
        return SemiStructured.from_nm(matrix, device)
    return Tiles.from_dense(matrix.dense().to(device), mask_of(matrix).to(device))


def resident(matrix: Matrix | Packed | Lists) -> Matrix | Packed | Lists:
    """A matrix in the format of the device and dtype that its tensors were moved to."""
    if isinstance(matrix, Tiles | SemiStructured | GroupQuantised):
        return matrix
    device, dtype = matrix.values.device, matrix.values.dtype
    if device.type != "cuda" and not (isinstance(matrix, Lists) and device.type == "cpu" and dtype != lists.DTYPE):
        return matrix
    tensors: dict[str, Any] = {name: one.cpu() for name, one in vars(matrix).items() if isinstance(one, Tensor)}
    moved: Bitmap | NM | Lists = replace(matrix, **tensors)
    packed = lists.bitmap_of(moved) if isinstance(moved, Lists) else moved
    return uploaded(packed, device) if device.type == "cuda" else packed
