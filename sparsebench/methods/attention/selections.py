"""What one layer computes of one prompt, in the small forms that methods choose it in, and how many pairs that is.

N tokens, H query heads. Nothing here need be causal: what a query may not see is cut off where attention is computed,
and is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass
class Heads:
    """The heads of one layer on one prompt, padding cut off. ``query``: (H, N, d), ``key``, ``value``: (K, N, d),
    rotated; ``before_rotary``: gives both query and key as they were before the rotary embedding; ``learned``: what
    the method learned from calibration data; ``rotates``: whether the layer has a rotary embedding."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    before_rotary: Callable[[], tuple[Tensor, Tensor]]
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    rotates: bool = True

    @property
    def tokens(self) -> int:
        return self.query.shape[1]

    @cached_property
    def keys(self) -> Tensor:
        """(H, N, d): each query head's keys."""
        return self.key.repeat_interleave(self.query.shape[0] // self.key.shape[0], dim=0)

    def last_weights(self, rows: int) -> Tensor:
        """softmax(causal(q[-rows:] k^T scaling)): (H, rows, N) float32."""
        logits = (self.query[:, -rows:].float() @ self.keys.float().transpose(1, 2)) * self.scaling
        return masked_softmax(logits, causal(rows, self.tokens, logits.device))


def causal(rows: int, tokens: int, device: torch.device) -> Tensor:
    """(rows, tokens) bool: what the last ``rows`` of ``tokens`` queries see."""
    return torch.ones(rows, tokens, dtype=torch.bool, device=device).tril(tokens - rows)


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension where ``mask`` is True; rows without an entry are zeros."""
    return logits.masked_fill(~mask, -torch.inf).softmax(dim=-1).nan_to_num(0.0)


@dataclass
class Selection:
    """``tokens``: N; ``reported``: (H,) or (1,) sparsity as the paper reports it, None where that is the element-wise
    one; ``extra``: more numbers for the record, averaged over layers and prompts."""

    tokens: int
    reported: Tensor | None = field(default=None, kw_only=True)
    extra: dict[str, float] = field(default_factory=dict, kw_only=True)

    def rows(self, start: int, stop: int) -> Tensor:
        """(H or 1, stop - start, N) bool: what the queries start .. stop - 1 compute. Here: everything."""
        return torch.ones(1, 1, 1, dtype=torch.bool).expand(1, stop - start, self.tokens)

    def bias_rows(self, start: int, stop: int) -> Tensor | None:
        """Added to the logits of these rows, (H or 1, stop - start, N), or None."""
        return None

    def pairs(self) -> Tensor:
        """Causal pairs per head: (H,) or (1,) float64, on the CPU."""
        return torch.tensor([self.tokens * (self.tokens + 1) / 2], dtype=torch.float64)

    @property
    def density(self) -> float:
        """Causal pairs over the causal triangle, mean over heads."""
        return float(self.pairs().mean()) / (self.tokens * (self.tokens + 1) / 2)


@dataclass
class Tiles(Selection):
    """One choice for every ``size`` consecutive queries. ``mask``: (H or 1, groups of queries, C) bool; ``columns``: (H
    or 1, N) int64, which of the C each key belongs to (None: C is N, one each); the queries from ``dense_from`` on see
    all."""

    mask: Tensor
    size: int
    columns: Tensor | None = None
    dense_from: int | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        place = torch.arange(start, stop, device=self.mask.device)
        chosen = self.mask[:, place // self.size]
        if self.columns is not None:
            heads = max(len(self.mask), len(self.columns))
            index = self.columns[:, None].expand(heads, stop - start, -1)
            chosen = chosen.expand(heads, -1, -1).gather(2, index)
        return chosen if self.dense_from is None else chosen | (place >= self.dense_from)[:, None]

    def pairs(self) -> Tensor:
        until = self.tokens if self.dense_from is None else self.dense_from
        weights = _weights(self.tokens, self.size, until, self.mask.device)
        if self.columns is not None:
            heads, groups, kinds = self.mask.shape
            shape = (max(heads, len(self.columns)), groups, self.tokens)
            gathered = torch.zeros(*shape[:2], kinds, dtype=weights.dtype, device=weights.device)
            weights = gathered.scatter_add(2, self.columns[:, None].expand(shape), weights.expand(shape))
        found = (self.mask * weights).sum(dim=(1, 2)).cpu()
        dense = self.tokens - until
        return found + dense * (until + 1 + self.tokens) / 2


@lru_cache(maxsize=16)
def _weights(tokens: int, size: int, until: int, device: torch.device) -> Tensor:
    """(1, groups, N) float64: how many queries of each group of ``size``, before ``until``, see each key."""
    start = torch.arange(0, tokens, size, device=device)[:, None]
    stop = (start + size).clamp(max=until)
    keys = torch.arange(tokens, device=device)
    return (stop - torch.maximum(start, keys)).clamp(min=0).double()[None]


def blocks(mask: Tensor, size: int, tokens: int, *, reported: Tensor | None = None) -> Tiles:
    """Blocks of ``size`` queries and keys: mask (H, blocks, blocks) bool."""
    columns = torch.arange(tokens, device=mask.device)[None] // size
    return Tiles(tokens, mask, size, columns, reported=reported)


def block_sparsity(mask: Tensor) -> Tensor:
    """1 - chosen / all blocks of the lower block triangle: mask (H, n, n) -> (H,)."""
    count = mask.shape[-1]
    return 1 - mask.tril().sum(dim=(1, 2)).double() / (count * (count + 1) / 2)


@dataclass
class Band(Selection):
    """Sinks and a window: key j for query i where j < ``first`` or i - j <= ``window``; the queries from ``dense_from``
    on see all."""

    first: int
    window: int
    dense_from: int
    device: torch.device

    def rows(self, start: int, stop: int) -> Tensor:
        query = torch.arange(start, stop, device=self.device)[:, None]
        key = torch.arange(self.tokens, device=self.device)
        return ((key < self.first) | (query - key <= self.window) | (query >= self.dense_from))[None]

    def pairs(self) -> Tensor:
        return torch.tensor([float(band_pairs(self.tokens, self.first, self.window, self.dense_from))]).double()


def band_pairs(tokens: int, first: int, window: int, dense_from: int) -> int:
    """Pairs of a ``Band``: query i sees min(i + 1, first + window + 1) keys, all of them from ``dense_from`` on."""
    cut = min(first + window + 1, dense_from)
    sparse = cut * (cut + 1) // 2 + (dense_from - cut) * min(first + window + 1, tokens)
    return sparse + (tokens - dense_from) * (dense_from + 1 + tokens) // 2


@dataclass
class PerHead(Selection):
    """Heads with selections of different kinds: (their indices, what they compute) in any order."""

    parts: Sequence[tuple[Tensor, Selection]]

    def rows(self, start: int, stop: int) -> Tensor:
        return self._gather([(where, part.rows(start, stop)) for where, part in self.parts])

    def pairs(self) -> Tensor:
        return self._gather([(where, part.pairs()) for where, part in self.parts])

    @staticmethod
    def _gather(found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        shape = found[0][1].shape[1:]
        total = sum(len(where) for where, _ in found)
        whole = found[0][1].new_zeros(total, *shape)
        for where, values in found:
            whole[where] = values.expand(len(where), *shape)
        return whole
