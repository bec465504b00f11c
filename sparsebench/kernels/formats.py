"""Compressed weight matrices: packing, unpacking, and how many bytes they really take.

``Bitmap`` holds any mask, ``NM`` n kept of every m columns, ``GroupQuantised`` whole groups of 4-bit values (GQSA,
Zeng et al. 2024), ``ColumnMajor`` a dense matrix ordered for skipping inputs (TEAL, CATS, R-Sparse), ``ColumnBitmap``
a sparse one; ``lists.Lists`` is for weights of which little is left. The bits say "kept", as a pruning mask does: an
entry that was kept and happens to be zero stays. ``dense`` gives back exactly what was packed. Bits are held in int64
because torch's uint64 can do little; bit j of a word (bit 0 the lowest) is column 64 * block + j.

Rows of ``Bitmap`` and ``NM`` come in groups of four that share one stream of values, in the order (group, block of 64
columns, row in the group, ascending column): the layout that the kernels stream. Files hold plain rows (``container``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsebench.errors import UserError
from sparsebench.kernels.bits import bits_of

ROWS = 4  # rows that share a stream of values
BLOCK = 64  # columns to a mask word
MARK = 16  # mask words to an offset of ``ColumnBitmap``
STRIP = 64  # most mask words of one input that lie together: the sums of so many outputs stay in a core's own cache
_MOST = 2**31 - 1  # what an offset can say
PADDING = 64  # bytes behind the last value, for kernels that read whole vectors


def blocks_of(columns: int) -> int:
    """Mask words per row."""
    return -(-columns // BLOCK)


def popcount(words: Tensor) -> Tensor:
    """Set bits of each int64, as int64, same shape."""
    return torch.from_numpy(np.bitwise_count(words.contiguous().numpy().view(np.uint64)).astype(np.int64))


def padded(values: Tensor) -> Tensor:
    """1-D ``values`` with 64 zero bytes behind them: kernels read whole vectors, and an empty tensor has no address."""
    return torch.nn.functional.pad(values, (0, PADDING // values.element_size()))


def size_of(*tensors: Tensor) -> int:
    """Bytes of the tensors' entries."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _pack(weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mask words (groups, blocks, 4), values in stream order, kept entries per group."""
    words, values = _kept_of(tiled(weight, ROWS), tiled(kept, ROWS))
    words = words.squeeze(-1)
    return words, values, popcount(words).sum((1, 2))


def _unpack(mask: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    groups, blocks, _ = mask.shape
    return untiled(_laid_out(mask, values, (groups, blocks, ROWS, BLOCK)), rows, columns)


def tiled(matrix: Tensor, height: int) -> Tensor:
    """(rows, columns) -> (groups of ``height`` rows, blocks, height, 64), filled up with zeros."""
    rows, columns = matrix.shape
    groups, blocks = -(-rows // height), blocks_of(columns)
    whole = torch.nn.functional.pad(matrix, (0, blocks * BLOCK - columns, 0, groups * height - rows))
    return whole.view(groups, height, blocks, BLOCK).transpose(1, 2).contiguous()


def untiled(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Undoes ``tiled``."""
    groups, blocks, height, _ = tiles.shape
    return tiles.transpose(1, 2).reshape(groups * height, blocks * BLOCK)[:rows, :columns].contiguous()


def _kept_of(ordered: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Mask words (..., n / 64) and values (kept,) of contiguous tensors (..., n), in their order."""
    words = torch.from_numpy(np.packbits(bits.numpy(), axis=-1, bitorder="little").view(np.int64))
    # numpy selects by a mask in a tenth of torch's time; the bits are moved as whole numbers
    return words, torch.from_numpy(whole_numbers(ordered)[bits.numpy()]).view(ordered.dtype)


def _laid_out(mask: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undoes ``_kept_of``: a tensor of ``shape``, whose entries are the bits of ``mask`` in their order."""
    octets = mask.contiguous().numpy().view(np.uint8).reshape(*shape[:-1], shape[-1] // 8)
    bits = np.unpackbits(octets, axis=-1, bitorder="little").view(bool)
    full = torch.zeros(shape, dtype=values.dtype)
    whole_numbers(full)[bits] = whole_numbers(values)
    return full


def whole_numbers(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The bits of a contiguous tensor, sharing its memory: numpy has no bfloat16."""
    found: np.ndarray[Any, Any] = bits_of(tensor).numpy()
    return found


def checked(weight: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """A matrix on the CPU and its mask."""
    if weight.ndim != 2:
        raise ValueError(f"a matrix (out, in) is needed, not {tuple(weight.shape)}")
    weight = weight.detach().cpu()
    kept = weight != 0 if kept is None else kept.detach().cpu().bool()
    if kept.shape != weight.shape:
        raise ValueError(f"the mask's shape {tuple(kept.shape)} is not the weight's {tuple(weight.shape)}")
    return weight, kept


def mask_of(matrix: Any) -> Tensor:
    """What a matrix whose ``values`` are what it ``stored`` keeps: (rows, columns) bool."""
    kept: Tensor = replace(matrix, values=padded(torch.ones_like(matrix.stored))).dense() != 0
    return kept


@dataclass(frozen=True)
class Bitmap:
    """A matrix (``rows``, ``columns``) of any mask. ``mask``: int64 (groups, blocks, 4); ``values``: 1-D, kept entries
    in stream order, then 64 spare bytes; ``offsets``: int64 (groups + 1), where each group's values start."""

    rows: int
    columns: int
    mask: Tensor
    values: Tensor
    offsets: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, kept: Tensor | None = None) -> Bitmap:
        """Packs ``weight`` (out, in); ``kept``: (out, in) bool, what is nonzero if not given."""
        weight, kept = checked(weight, kept)
        mask, values, counts = _pack(weight, kept)
        offsets = torch.zeros(len(counts) + 1, dtype=torch.int64)
        offsets[1:] = counts.cumsum(0)
        return cls(weight.shape[0], weight.shape[1], mask, padded(values), offsets)

    def dense(self) -> Tensor:
        """(rows, columns), zeros where nothing was kept."""
        return _unpack(self.mask, self.stored, self.rows, self.columns)

    @property
    def stored(self) -> Tensor:
        """The values without the spare bytes, a view."""
        return self.values[: int(self.offsets[-1])]

    @property
    def nbytes(self) -> int:
        """Bytes of mask, values and offsets, without the spare ones."""
        return size_of(self.mask, self.stored, self.offsets)

    @property
    def density(self) -> float:
        """Kept entries / all."""
        return self.stored.numel() / max(1, self.rows * self.columns)


@dataclass(frozen=True)
class NM:
    """A matrix (``rows``, ``columns``) with exactly ``n`` kept of each ``m`` consecutive columns of a row; ``mask``
    and ``values`` as in ``Bitmap``, no offsets. One bit per entry: for 2:4 the size of the usual two bits per kept
    value."""

    rows: int
    columns: int
    n: int
    m: int
    mask: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, n: int, m: int, kept: Tensor | None = None) -> NM:
        """Packs ``weight`` (out, in). Groups with fewer than ``n`` kept are filled with their first zeros.

        ValueError where ``m`` does not divide 64 and the columns, or a group keeps more than ``n``.
        """
        weight, kept = checked(weight, kept)
        rows, columns = weight.shape
        if not 0 < n <= m or BLOCK % m or columns % m:
            raise ValueError(f"{n}:{m} of {columns} columns: m must divide {BLOCK} and the columns, n be 1 to m")
        groups = kept.view(rows, columns // m, m)
        if int(groups.sum(-1).max() if groups.numel() else 0) > n:
            raise ValueError(f"{n}:{m}: a group keeps more than {n}")
        # a stable sort puts the kept first and the first of the others behind them
        filled = torch.zeros_like(groups)
        filled.scatter_(-1, groups.int().argsort(dim=-1, descending=True, stable=True)[..., :n], True)
        filled = filled.view(rows, columns)
        mask, values, _ = _pack(weight.masked_fill(~kept, 0), filled)
        return cls(rows, columns, n, m, mask, padded(values))

    def dense(self) -> Tensor:
        """(rows, columns)."""
        return _unpack(self.mask, self.stored, self.rows, self.columns)

    @property
    def stored(self) -> Tensor:
        """The values without the spare bytes, a view."""
        return self.values[: self.rows * self.columns * self.n // self.m]

    @property
    def per_group(self) -> int:
        """Values of four rows."""
        return ROWS * self.columns * self.n // self.m

    @property
    def nbytes(self) -> int:
        """Bytes of mask and values."""
        return size_of(self.mask, self.stored)

    @property
    def density(self) -> float:
        """Stored entries / all."""
        return self.n / self.m


@dataclass(frozen=True)
class ColumnMajor:
    """A dense matrix stored so that the weights of one input are contiguous. ``weight``: (in, out). No smaller."""

    weight: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor) -> ColumnMajor:
        """``weight``: (out, in)."""
        return cls(weight.detach().t().contiguous())

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.weight.shape[1]

    @property
    def columns(self) -> int:
        """Inputs."""
        return self.weight.shape[0]

    def dense(self) -> Tensor:
        """(out, in), a view."""
        return self.weight.t()

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return size_of(self.weight)


@dataclass(frozen=True)
class ColumnBitmap:
    """A matrix (``rows``, ``columns``) of any mask for inputs of which some are skipped: what is kept of one input's
    weights lies together.

    The outputs are cut into equal strips of at most 64 * ``STRIP``. ``mask``: int64 (strips, columns, words), bit j of
    word w is output 64 * (strip * words + w) + j; ``values``: 1-D, kept entries in the order (strip, input, ascending
    output), then 64 spare bytes; ``starts``: int64 (strips), where a strip's values begin; ``offsets``: int32 (strips,
    columns, words / ``MARK`` rounded up), where those of every ``MARK``-th word of an input do in its strip.
    """

    rows: int
    columns: int
    mask: Tensor
    values: Tensor
    starts: Tensor
    offsets: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, kept: Tensor | None = None) -> ColumnBitmap:
        """Packs ``weight`` (out, in); ``kept``: (out, in) bool, what is nonzero if not given."""
        weight, kept = checked(weight, kept)
        rows, columns = weight.shape
        blocks = max(1, blocks_of(rows))
        strips = -(-blocks // STRIP)
        words = -(-blocks // strips)
        bits, ordered = (_in_strips(one, strips, words) for one in (kept, weight))
        mask, values = _kept_of(ordered, bits)
        counts = popcount(mask)
        whole = counts.sum((1, 2))
        if int(whole.max()) > _MOST:
            raise ValueError(f"a strip of {BLOCK * words} outputs keeps more than {_MOST} entries")
        offsets = (counts.flatten(1).cumsum(1) - counts.flatten(1)).view_as(counts)[..., ::MARK]
        return cls(rows, columns, mask, padded(values), whole.cumsum(0) - whole, offsets.int().contiguous())

    def dense(self) -> Tensor:
        """(rows, columns), zeros where nothing was kept."""
        strips, columns, words = self.mask.shape
        full = _laid_out(self.mask, self.stored, (strips, columns, words * BLOCK))
        return full.transpose(1, 2).reshape(strips * words * BLOCK, columns)[: self.rows].contiguous()

    @property
    def stored(self) -> Tensor:
        """The values without the spare bytes, a view."""
        return self.values[: self.values.numel() - PADDING // self.values.element_size()]

    @property
    def nbytes(self) -> int:
        """Bytes of mask, values and offsets, without the spare ones."""
        return size_of(self.mask, self.stored, self.starts, self.offsets)

    @property
    def density(self) -> float:
        """Kept entries / all."""
        return self.stored.numel() / max(1, self.rows * self.columns)


def _in_strips(matrix: Tensor, strips: int, words: int) -> Tensor:
    """(out, in) -> (strips, in, 64 * words), with outputs of zero behind the last."""
    rows, columns = matrix.shape
    whole = torch.nn.functional.pad(matrix, (0, 0, 0, strips * words * BLOCK - rows))
    return whole.view(strips, words * BLOCK, columns).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class GroupQuantised:
    """Kept groups of ``group`` consecutive columns of a row, 4 bits a value (GQSA, block-sparse rows).

    ``row_ptr``: int32 (rows + 1); ``column``: int16 or int32 (kept), the group's place in its row, ascending;
    ``codes``: uint8 (kept, group / 2), two values a byte, the first in the low half; ``scale``, ``zero``: float16
    (kept). A value is ``scale * (code - zero)``; ``zero`` may be fractional, as end-to-end tuning leaves it.
    """

    rows: int
    columns: int
    group: int
    row_ptr: Tensor
    column: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, kept: Tensor, group: int = 16) -> GroupQuantised:
        """Rounds the kept groups of ``weight`` (out, in) to 16 levels between each group's least and greatest value.

        ``kept``: (out, in / group) bool. A constant group is exact up to float16. UserError where ``group`` is odd or
        does not divide the columns.
        """
        weight = weight.detach().cpu().float()
        rows, columns = weight.shape
        if group % 2 or group < 2 or columns % group:
            raise UserError(f"group_size={group}: must be even and divide the layer's {columns} inputs")
        if kept.shape != (rows, columns // group):
            raise ValueError(f"kept: {tuple(kept.shape)} is not (rows, groups) = {(rows, columns // group)}")
        kept = kept.cpu().bool()
        chosen = weight.view(rows, columns // group, group)[kept]
        low, high = chosen.amin(-1), chosen.amax(-1)
        scale = (high - low) / 15
        constant = scale == 0
        scale = torch.where(constant, torch.where(low == 0, 1.0, low.abs()), scale).half()
        zero = torch.where(constant, (low < 0).float(), (-low / scale.float()).round()).half()
        codes = (chosen / scale.float()[:, None] + zero.float()[:, None]).round().clamp(0, 15).to(torch.uint8)
        row_ptr = torch.zeros(rows + 1, dtype=torch.int32)
        row_ptr[1:] = kept.sum(1).cumsum(0)
        place = torch.int16 if columns // group <= 2**15 else torch.int32
        packed = codes[:, 0::2] | codes[:, 1::2] << 4
        return cls(rows, columns, group, row_ptr, kept.nonzero()[:, 1].to(place), packed, scale, zero)

    def dense(self) -> Tensor:
        """(rows, columns) float32."""
        codes = torch.stack([self.codes & 15, self.codes >> 4], dim=-1).view(-1, self.group)
        values = self.scale.float()[:, None] * (codes.float() - self.zero.float()[:, None])
        device = values.device
        out = torch.zeros(self.rows, self.columns // self.group, self.group, device=device)
        row = torch.repeat_interleave(torch.arange(self.rows, device=device), self.row_ptr.diff().long())
        out[row, self.column.long()] = values
        return out.view(self.rows, self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return size_of(self.row_ptr, self.column, self.codes, self.scale, self.zero)

    @property
    def density(self) -> float:
        """Kept groups / all."""
        return self.scale.numel() * self.group / max(1, self.rows * self.columns)


Matrix = Bitmap | NM | GroupQuantised
Columns = ColumnMajor | ColumnBitmap
