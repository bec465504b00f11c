"""What a method of the KV cache sees of one layer at one call, and the surgery that all methods share.

Shapes as in the attention plug: B rows, H query heads, K KV heads, T new tokens, S columns (cached and new), L tokens
fed so far, D head size. An *entry* is a column that holds a real token: no hole, no padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparsebench.models.plug import Call, PositionLayer
from sparsebench.models.plug.cache import HOLE

PROMPT = "prompt"  # per-entry memory: tokens of the row's prompt, kept with the cache so that copies of it know
_PAIRS_AT_ONCE = 2**26


@dataclass
class Entries:
    """One layer's cache at one call, the new tokens already in it.

    ``learned``: what the method was fitted to; ``shared``: a memory for this forward, the same for all layers;
    ``notes``: sums over all calls, for the record."""

    call: Call
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def layer(self) -> PositionLayer:
        """The cache layer. ValueError without a cache."""
        if self.call.layer is None:
            raise ValueError("a method of the KV cache acts only where there is a cache")
        return self.call.layer

    @property
    def prefill(self) -> bool:
        """Whether these are the first tokens of a sequence."""
        return self.call.phase == "prefill"

    @cached_property
    def valid(self) -> Tensor:
        """(B, K, S) bool: the columns that are entries."""
        where = self.call.key_positions
        real = self.call.real[:, None].expand(-1, where.shape[1], -1)
        return (where != HOLE) & real.gather(2, where.clamp(min=0))

    @cached_property
    def rank(self) -> Tensor:
        """(B, K, S) int64: how many entries stand before each column."""
        return self.valid.long().cumsum(dim=-1) - self.valid.long()

    @cached_property
    def lengths(self) -> Tensor:
        """(B, K) int64: entries."""
        return self.valid.sum(dim=-1)

    @cached_property
    def prompt(self) -> Tensor:
        """(B,) int64: tokens of the prompt, padding left out."""
        known = self.layer.state.get(PROMPT)
        if self.prefill or known is None:
            past = self.call.past or self.call.tokens
            return self.call.real[:, :past].sum(dim=1)
        return known.flatten(1).amax(dim=1)

    def kept(self) -> Tensor:
        """(B, K) int64: entries of the cache as it is now, after whatever was dropped."""
        where = self.layer.positions
        if where is None:
            raise ValueError("nothing was cached yet")
        real = self.call.real[:, None].expand(-1, where.shape[1], -1)
        return ((where != HOLE) & real.gather(2, where.clamp(min=0))).sum(dim=-1)

    def remember_prompt(self) -> None:
        """Writes the prompt's length into the cache, anew after every change of its entries."""
        batch, heads, columns = self.layer.keys.shape[:3]  # type: ignore[union-attr]
        self.layer.state[PROMPT] = self.prompt[:, None, None].expand(batch, heads, columns).contiguous()

    def visible(self, start: int = 0) -> Tensor:
        """(B, K, rows, S) bool: what the queries from ``start`` on see, by true position."""
        seen = self.call.visible(start, self.call.tokens)
        return seen.expand(-1, self.call.key.shape[1], -1, -1)

    @cached_property
    def seen(self) -> Tensor:
        """(B, K, T) int64: entries that each query sees, itself included."""
        return self.visible().sum(dim=-1)

    @cached_property
    def keys(self) -> Tensor:
        """(B, H, S, D) float32: the keys, repeated for the query heads."""
        return self.repeated(self.call.key.float())

    def repeated(self, x: Tensor) -> Tensor:
        """(B, K, ...) -> (B, H, ...)."""
        return x.repeat_interleave(self.call.groups, dim=1) if self.call.groups > 1 else x

    def grouped(self, x: Tensor) -> Tensor:
        """(B, H, ...) -> (B, K, H / K, ...)."""
        groups: Tensor = x.unflatten(1, (-1, self.call.groups))
        return groups

    def attention(self, last: int) -> Tensor:
        """(B, H, last, S) float32: the weights that the last queries pay what they see; padding pays none."""
        return self.weights(self.call.tokens - last, self.call.tokens)

    def attention_sums(self, start: int = 0) -> Tensor:
        """(B, H, S) float32: the weights that all queries from ``start`` on pay each column, in pieces."""
        total = torch.zeros(*self.call.query.shape[:2], self.call.key.shape[2], device=self.call.key.device)
        for first, stop in self._pieces(start):
            total += self.weights(first, stop).sum(dim=2)
        return total

    def _pieces(self, start: int) -> Iterator[tuple[int, int]]:
        batch, heads, tokens = self.call.query.shape[:3]
        size = max(1, _PAIRS_AT_ONCE // max(1, batch * heads * self.call.key.shape[2]))
        for first in range(start, tokens, size):
            yield first, min(first + size, tokens)

    def visible_to(self, query: int) -> Tensor:
        """(B, K, S) bool: what one of the new tokens sees."""
        return self.call.visible(query, query + 1)[:, :, 0].expand(-1, self.call.key.shape[1], -1)

    def weights(self, start: int, stop: int, allowed: Tensor | None = None) -> Tensor:
        """(B, H, stop - start, S) float32: as ``attention``, of some of the queries, over what is ``allowed`` (bool,
        broadcastable) of what they see."""
        logits = self.call.query[:, :, start:stop].float() @ self.keys.transpose(-1, -2) * self.call.scaling
        mask = self.call.visible(start, stop)
        mask = self.repeated(mask) if mask.shape[1] > 1 else mask
        mask = mask if allowed is None else mask & allowed
        return logits.masked_fill(~mask, -torch.inf).softmax(dim=-1).nan_to_num(0.0)

    @cached_property
    def order(self) -> Tensor:
        """(B, K, S) int64: the columns of the entries in order, then the others."""
        return (~self.valid).long().argsort(dim=-1, stable=True)

    def keep(self, mask: Tensor) -> None:
        """Drops every entry where ``mask`` (B, K, S) bool is False."""
        self.layer.keep(mask & self.valid)


def top(scores: Tensor, count: Tensor, among: Tensor) -> Tensor:
    """(..., S) bool: the ``count`` (..., broadcastable, int64) highest scores of each line among the allowed columns;
    of equal ones the first."""
    order = scores.masked_fill(~among, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (places < count[..., None]) & among


def newest(entries: Tensor, count: Tensor | int) -> Tensor:
    """(..., S) bool: the last ``count`` (... or a number) of the columns that ``entries`` (..., S) marks."""
    behind = entries.long().flip(-1).cumsum(-1).flip(-1)  # entries from this column on
    wanted = count[..., None] if isinstance(count, Tensor) else count
    return entries & (behind <= wanted)


def oldest(entries: Tensor, count: Tensor | int) -> Tensor:
    """(..., S) bool: the first ``count`` of the columns that ``entries`` (..., S) marks."""
    wanted = count[..., None] if isinstance(count, Tensor) else count
    return entries & (entries.long().cumsum(-1) <= wanted)


def shared_among_heads(scores: Tensor, count: Tensor, floor: Tensor, among: Tensor) -> Tensor:
    """AdaKV's allocation: every head keeps its best ``floor`` (B,), and what is left of K times ``count`` (B,) goes to
    the best pairs (head, column) of the layer. scores, among: (B, K, S) -> (B, K, S) bool."""
    heads = scores.shape[1]
    safe = top(scores, floor[:, None], among)
    rest = count * heads - safe.sum(dim=(1, 2))
    free = (among & ~safe).flatten(1)
    return safe | top(scores.flatten(1), rest, free).view_as(safe)
