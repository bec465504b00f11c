"""Verticals and slashes: their scores from the last queries, and the tiles that a kernel makes of them.

A vertical is a key column that every query computes; a slash is an offset o = i - j, a diagonal of the map. The kernel
of MInference (Jiang et al. 2024, arXiv 2407.02490; The Sparse Frontier uses the same) computes whole tiles of ``size``
keys for the slashes and single columns for the verticals; both sets are reproduced exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsebench.methods.attention.selections import Heads, Selection, Tiles


@dataclass
class SlashScores:
    """``vertical``: (H, N) by column; ``slash``: (H, N) by offset: sums of the last queries' attention weights."""

    vertical: Tensor
    slash: Tensor


def slash_scores(heads: Heads, rows: int) -> SlashScores:
    """Sums over the weights of the last ``rows`` queries, down each column and along each diagonal."""
    weights = heads.last_weights(rows)
    tokens = heads.tokens
    query = torch.arange(tokens - rows, tokens, device=weights.device)[:, None]
    offset = (query - torch.arange(tokens, device=weights.device)).clamp(min=0)  # acausal weights are 0 anyway
    flat = offset.flatten().expand(len(weights), -1)
    slash = torch.zeros(len(weights), tokens, device=weights.device).scatter_add(1, flat, weights.flatten(1))
    return SlashScores(weights.sum(dim=1), slash)


def room(tokens: int, verticals: int, slashes: int, size: int) -> bool:
    """Whether the first ``verticals`` columns and the nearest ``slashes`` diagonals, in tiles, leave anything out: the
    last query tile's range begins ``slashes`` + ``size`` - 1 keys before its end."""
    end = -(-tokens // size) * size
    return end - size - (slashes - 1) > verticals if slashes else tokens > verticals


def ranks(scores: Tensor, forced: int) -> Tensor:
    """The place of each entry from the best (0) on, per head: (H, N) int64. The first ``forced`` entries come first."""
    scores = scores.clone()
    scores[:, :forced] = torch.inf
    order = scores.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def slash_tiles(verticals: Tensor, slashes: Tensor, size: int) -> Tiles:
    """What the kernel computes of these columns and offsets, each (H, N) bool.

    For the queries s .. e - 1 of a tile, e = s + size, each offset o < e asks for the keys [max(e - o, size) - size,
    max(e - o, size)). Walked from the largest offset on, a range that starts within ``size`` of the end of the one
    before makes that one longer by a full ``size``. Columns inside a range are not counted again, those behind the
    last range are dropped. ``reported``: 1 - (size^2 * tiles + size * single columns) / causal pairs, an upper bound of
    the work that is negative where tiles exceed the triangle.
    """
    heads, tokens = verticals.shape
    tiles = -(-tokens // size)
    ends = (torch.arange(tiles, device=verticals.device) + 1) * size  # last positions + 1 of query tiles
    ends = ends.expand(heads, -1)
    following = _next_left(slashes, size, tiles * size)
    # distances from where the open range ends to the end of the query tile, plus ``size``: indices of ``following``
    chain = [ends + size]
    while True:
        found = following.gather(1, chain[-1])
        if torch.equal(found, chain[-1]):
            break
        chain.append(found)
    left = torch.stack(chain, dim=-1)
    opened = left[..., 1:] < left[..., :-1]
    covered = _cover(ends[..., None] - left[..., 1:], opened, size, tokens)
    stop = ends + size - left[..., -1]
    columns = verticals[:, None] & ~covered & (torch.arange(tokens, device=stop.device) < stop[..., None])
    work = (size * size * opened.sum(dim=(1, 2)) + size * columns.sum(dim=(1, 2))).double()
    return Tiles(tokens, covered | columns, size, reported=1 - work / (tokens * (tokens + 1) / 2))


def _next_left(slashes: Tensor, size: int, most: int) -> Tensor:
    """(H, size + most + 1), by distance u of the end of the open range to the end of the query tile, plus ``size``:
    the same after the next range. With o the largest offset < u that one ends at u - o, or ``size`` further if that is
    less: for every query tile alike. Where there is no such offset, or u <= 0, u itself."""
    distance = torch.arange(-size, most + 1, device=slashes.device)
    offset = _largest_below(slashes)[:, distance.clamp(0, slashes.shape[1])]
    goes = (offset >= 0) & (distance > 0)
    return torch.where(goes, torch.minimum(offset, distance - size), distance) + size


@dataclass
class Lines(Selection):
    """Single columns and single diagonals, without a kernel's tiles: ``columns`` (H, N) bool by key, ``slashes`` (H, N)
    bool by offset."""

    columns: Tensor
    slashes: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        place = torch.arange(self.tokens, device=self.columns.device)
        offset = torch.arange(start, stop, device=place.device)[:, None] - place
        return self.columns[:, None] | (self.slashes[:, offset.clamp(min=0)] & (offset >= 0))


def _largest_below(present: Tensor) -> Tensor:
    """(H, N + 1) int64: at n the largest present index below n, or -1."""
    heads, tokens = present.shape
    found = torch.where(present, torch.arange(tokens, device=present.device), -1).cummax(dim=1).values
    return torch.cat([found.new_full((heads, 1), -1), found], dim=1)


def _cover(starts: Tensor, there: Tensor, size: int, tokens: int) -> Tensor:
    """(H, tiles, N) bool: keys within one of the ranges that are ``there``, each ``size`` keys from its start: both
    (H, tiles, ranges)."""
    width = tokens + 2 * size + 1  # ranges may reach beyond the last key
    edges = torch.zeros(*starts.shape[:2], width, dtype=torch.int8, device=starts.device)
    starts, once = starts.clamp(min=0, max=width - size - 1), there.to(torch.int8)
    edges.scatter_add_(2, starts, once).scatter_add_(2, starts + size, -once)
    return edges.cumsum(dim=2, dtype=torch.int8)[..., :tokens] > 0
