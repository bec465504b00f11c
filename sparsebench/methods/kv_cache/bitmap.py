"""Mustafar's bitmap format for pruned keys and values (Joo et al. 2025, arXiv 2505.22913; dhjoo98/mustafar).

Tiles of 64 elements. Tiles of keys run along tokens (one channel, 64 tokens in a row), tiles of values along channels
(one token, 64 channels), in the order of the released kernels. Of a tile are stored: a 64-bit bitmap, its most
significant bit the first element; the place of its values, in units of 4 bytes (two halves); and its nonzero values in
order, padded with zeros to a multiple of 8, so that every tile begins 16-byte aligned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 64
ALIGN = 8  # values


@dataclass(frozen=True)
class PackedCache:
    """Keys or values (heads, tokens, D) in the format; ``heads`` may be rows x KV heads.

    ``bitmap``: (heads, tiles) int64; ``offsets``: (heads, tiles + 1) int32; ``values``: all heads in a row;
    ``lengths``: (heads,) int64, values of each; ``shape``: (heads, tokens, D); ``along``: ``tokens`` or
    ``channels``."""

    bitmap: Tensor
    offsets: Tensor
    values: Tensor
    lengths: Tensor
    shape: tuple[int, int, int]
    along: str

    @property
    def nbytes(self) -> int:
        """Bytes of bitmaps, offsets (one per tile) and values."""
        return self.bitmap.numel() * (8 + 4) + self.values.numel() * self.values.element_size()

    def unpack(self) -> Tensor:
        """(heads, tokens, D), as it was packed."""
        tiles = torch.zeros(*self.bitmap.shape, TILE, dtype=self.values.dtype, device=self.values.device)
        kept = (self.bitmap[..., None] >> _places(self.bitmap)) & 1 == 1
        rank = kept.long().cumsum(dim=-1) - 1
        starts = torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)[:-1]])
        where = starts[:, None, None] + 2 * self.offsets[:, :-1, None].long() + rank
        tiles[kept] = self.values[where[kept]]
        return _untiled(tiles, self.shape, self.along)


def pack(x: Tensor, along: str) -> PackedCache:
    """``x``: (heads, tokens, D), pruned entries exactly 0; ``along``: ``tokens`` (for keys; tokens a multiple of 64) or
    ``channels`` (for values; both a multiple of 64). ValueError for other shapes."""
    heads, tokens, size = x.shape
    if tokens % TILE or (along == "channels" and size % TILE):
        raise ValueError(f"{tuple(x.shape)} does not fill whole tiles of {TILE} along {along}")
    tiles = _tiled(x, along)
    kept = tiles != 0
    bitmap = (kept.long() << _places(kept[..., 0])).sum(dim=-1)
    padded = aligned(kept.sum(dim=-1))
    offsets = torch.nn.functional.pad((padded // 2).cumsum(dim=-1), (1, 0)).int()
    lengths = padded.sum(dim=-1)
    values = torch.zeros(int(lengths.sum()), dtype=x.dtype, device=x.device)
    packed = PackedCache(bitmap, offsets, values, lengths, (heads, tokens, size), along)
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)[:-1]])
    where = starts[:, None, None] + 2 * offsets[:, :-1, None].long() + kept.long().cumsum(dim=-1) - 1
    values[where[kept]] = tiles[kept]
    return packed


def aligned(count: Tensor) -> Tensor:
    """Values of a tile with its padding."""
    return -(-count // ALIGN) * ALIGN


def tile_bytes(x: Tensor, along: str, among: Tensor) -> Tensor:
    """Bytes that the format takes per head for ``x`` (heads, tokens, D), whose last tiles are filled up with zeros;
    only tiles with an element ``among`` (heads, tokens) bool: (heads,) int64."""
    tokens, size = x.shape[1:]
    pad = torch.nn.functional.pad(x, (0, -size % TILE if along == "channels" else 0, 0, -tokens % TILE))
    inside = torch.nn.functional.pad(among, (0, -tokens % TILE))[..., None].expand(pad.shape)
    count = aligned(((_tiled(pad, along) != 0) & _tiled(inside, along)).sum(dim=-1))
    used = _tiled(inside, along).any(dim=-1)
    return ((8 + 4) * used + count * x.element_size()).sum(dim=-1)


def _places(like: Tensor) -> Tensor:
    """Shifts of the elements of a tile: the first is the most significant bit."""
    return torch.arange(TILE - 1, -1, -1, device=like.device)


def _tiled(x: Tensor, along: str) -> Tensor:
    """(heads, tokens, D) -> (heads, tiles, 64)."""
    blocks: Tensor = x.unflatten(1, (-1, TILE))  # (heads, blocks, 64 tokens, D)
    if along == "tokens":
        return blocks.transpose(2, 3).flatten(1, 2)
    tiles: Tensor = blocks.unflatten(3, (-1, TILE))
    return tiles.transpose(2, 3).flatten(1, 3)


def _untiled(tiles: Tensor, shape: tuple[int, int, int], along: str) -> Tensor:
    heads, tokens, size = shape
    blocks = tokens // TILE
    if along == "tokens":
        return tiles.view(heads, blocks, size, TILE).transpose(2, 3).reshape(shape)
    return tiles.view(heads, blocks, size // TILE, TILE, TILE).transpose(2, 3).reshape(shape)
