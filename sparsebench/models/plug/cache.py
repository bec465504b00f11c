"""A KV cache whose layers know the true position of every entry they keep, per row and KV head.

Transformers builds its masks from the number of cached entries. Once entries are dropped that number is neither
the position of the next token nor a column's position: tokens that follow would see each other's future. Here the
cache reports the true length, whatever it still holds, and the plug builds masks from the positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

HOLE = -1
"""Position of a column that holds no entry (heads that keep fewer entries than the longest)."""


class PositionLayer(DynamicLayer):
    """One layer's entries. ``keys``, ``values``: (batch, kv_heads, columns, head_dim); ``positions``: (batch, kv_heads,
    columns) int64, the index of each entry's token in the sequence as it was fed (padding included), or ``HOLE``;
    ``seen``: tokens fed in all, the position of the next one; ``state``: what a method remembers per entry, by name,
    each (batch, kv_heads, columns, ...): new entries start at 0, and it follows its entries when they move."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self.positions: Tensor | None = None
        self.seen = 0
        self.state: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (batch, kv_heads, tokens, head_dim) keys and values; returns all columns."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        batch, heads, tokens = key_states.shape[:3]
        new = torch.arange(self.seen, self.seen + tokens, device=key_states.device).expand(batch, heads, tokens)
        self.positions = new if self.positions is None else torch.cat([self.positions, new], dim=-1)
        for name, kept in self.state.items():
            self.state[name] = torch.cat([kept, kept.new_zeros(batch, heads, tokens, *kept.shape[3:])], dim=2)
        self.seen += tokens
        return keys, values

    @property
    def lengths(self) -> Tensor:
        """Entries that are kept: (batch, kv_heads) int64."""
        return (self._where() != HOLE).sum(dim=-1)

    def keep(self, mask: Tensor) -> None:
        """Drops every entry where ``mask`` (batch, kv_heads, columns) bool is False. The others keep their order;
        heads may keep different numbers."""
        mask = mask & (self._where() != HOLE)
        counts = mask.sum(dim=-1, keepdim=True)
        most = int(counts.max())
        columns = torch.argsort(mask.logical_not(), dim=-1, stable=True)[..., :most]
        self.select(torch.where(torch.arange(most, device=mask.device) < counts, columns, HOLE))

    def select(self, columns: Tensor) -> None:
        """Keeps these columns, in this order: (batch, kv_heads, n) int64, ``HOLE`` for none."""
        found = columns.clamp(min=0)
        keys, values = self._entries()
        self.keys, self.values = _take(keys, found), _take(values, found)
        self.state = {name: _take(kept, found) for name, kept in self.state.items()}
        self.positions = torch.where(columns == HOLE, HOLE, _take(self._where(), found))

    def replace(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Puts other entries in place of all columns (merged ones, say); per-entry state starts anew. An entry is
        seen by the tokens after its position."""
        self.keys, self.values, self.positions, self.state = keys, values, positions, {}

    def get_seq_length(self) -> int:
        """Tokens fed, kept or not: positions of new tokens continue from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are asked for over true positions; the plug picks the columns that are kept."""
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens that were fed (what was evicted before stays evicted)."""
        if tokens_to_remove > 0:  # the older convention: the length to keep
            tokens_to_remove = min(0, tokens_to_remove - self.seen)
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self.seen += tokens_to_remove
        self.keep(self._where() < self.seen)

    def reset(self) -> None:
        """Empties the layer."""
        super().reset()
        self.positions, self.seen, self.state = None, 0, {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda kept: kept.index_select(0, beam_idx.to(kept.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda kept: kept.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda kept: kept[indices])

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            keys, values = self._entries()
            self.keys, self.values = change(keys), change(values)
            self.positions = change(self._where())
            self.state = {name: change(kept) for name, kept in self.state.items()}

    def _entries(self) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            raise ValueError("nothing was cached yet")
        return self.keys, self.values

    def _where(self) -> Tensor:
        if self.positions is None:
            raise ValueError("nothing was cached yet")
        return self.positions


class PositionCache(Cache):
    """A cache of ``PositionLayer``. ``position_ids``: (batch, tokens fed) int64, the rotary position of each token
    (with left padding it is not its place in the sequence); None before the first token."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=PositionLayer)
        self.position_ids: Tensor | None = None

    def remember(self, position_ids: Tensor, past: int) -> None:
        """Notes the rotary positions of new tokens (batch or 1, tokens) behind ``past`` ones."""
        known = self.position_ids
        if past and known is not None:
            position_ids = torch.cat([known[:, :past], position_ids.expand(len(known), -1)], dim=1)
        self.position_ids = position_ids


def _take(kept: Tensor, columns: Tensor) -> Tensor:
    """kept: (batch, kv_heads, columns, ...); columns: (batch, kv_heads, n) -> (batch, kv_heads, n, ...)."""
    rest = kept.shape[3:]
    index = columns.view(*columns.shape, *[1] * len(rest)).expand(*columns.shape, *rest)
    return kept.gather(2, index)
