"""What a method sees of one attention layer's call, and what it may say about it.

Shapes: B rows, H query heads, K key-value heads (head h reads KV head h // (H / K)), T new tokens, S columns of keys
(cached and new), L tokens fed so far with the new ones, D head size. Positions are places in the sequence as it was
fed, padding included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from sparsebench.errors import UserError
from sparsebench.models.plug.cache import HOLE, PositionCache, PositionLayer

Rotary = tuple[Tensor, Tensor]  # cos, sin


@dataclass
class Call:
    """One layer's attention, about to be computed.

    ``query``: (B, H, T, D) and ``key``, ``value``: (B, K, S, D), rotated, the new tokens last; ``hidden``: (B, T,
    hidden size), what the projections saw (normed); ``rotary``: cos and sin of the new tokens, each (B or 1, T, rotated
    channels), None for layers without; ``position_ids``: (B or 1, T) their rotary positions, None if the model gives
    none; ``slots``: (B, 1, T, L) bool, which positions each query sees in the dense model; ``key_positions``: (B, K, S)
    int64; ``layer``: the cache layer, already holding the new tokens, None without a cache; ``weights``: (B, H, T, S)
    float32 for ``Handler.after`` if a handler wants them."""

    index: int
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor
    rotary: Rotary | None
    position_ids: Tensor | None
    slots: Tensor
    scaling: float
    cache: PositionCache | None
    rotate_at: Callable[[Tensor], Rotary | None]
    weights: Tensor | None = None

    @property
    def layer(self) -> PositionLayer | None:
        return None if self.cache is None else cast(PositionLayer, self.cache.layers[self.index])

    @property
    def tokens(self) -> int:
        """T: new tokens."""
        return self.query.shape[2]

    @property
    def past(self) -> int:
        """Tokens fed before the new ones, kept or not: the position of the first query."""
        return self.slots.shape[-1] - self.tokens

    @property
    def phase(self) -> str:
        """``prefill``: the first tokens of a sequence; ``decode``: any that follow, one or many."""
        return "decode" if self.past else "prefill"

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[1] // self.key.shape[1]

    @cached_property
    def real(self) -> Tensor:
        """(B, L) bool: the positions that hold a token, not padding."""
        return self.slots[:, 0].any(dim=1)

    @cached_property
    def key_positions(self) -> Tensor:
        layer = self.layer
        if layer is not None and layer.positions is not None:
            return layer.positions
        batch, heads, columns = self.key.shape[:3]
        return torch.arange(columns, device=self.key.device).expand(batch, heads, columns)

    @cached_property
    def in_order(self) -> bool:
        """Whether column s still is position s: nothing was dropped or moved."""
        layer = self.layer
        if layer is None:
            return True
        columns = torch.arange(self.key.shape[2], device=self.key.device)
        return self.key.shape[2] == self.slots.shape[-1] and bool((self.key_positions == columns).all())

    def visible(self, start: int = 0, stop: int | None = None) -> Tensor:
        """(B, 1 or K, rows, S) bool for the queries start .. stop - 1: causal, not padding, by true position."""
        slots = self.slots[:, :, start:stop]
        if self.in_order:
            return slots
        where = self.key_positions
        index = where.clamp(min=0)[:, :, None].expand(-1, -1, slots.shape[2], -1)
        return slots.expand(-1, where.shape[1], -1, -1).gather(3, index) & (where != HOLE)[:, :, None]

    @cached_property
    def key_position_ids(self) -> Tensor:
        """(B, K, S) int64: rotary positions of the columns (0 for holes)."""
        where = self.key_positions.clamp(min=0)
        known = self.position_ids if self.cache is None else self.cache.position_ids
        if known is None:
            return where
        return known.expand(len(where), -1)[:, None].expand(-1, where.shape[1], -1).gather(2, where)

    def unrotated(self) -> tuple[Tensor, Tensor]:
        """Queries (B, H, T, D) and keys (B, K, T, D) of the new tokens as they were before the rotary embedding."""
        new = self.key[:, :, -self.tokens :]
        if self.rotary is None:
            return self.query, new
        check_rotary(self.module)
        cos, sin = (part[:, None] for part in self.rotary)
        return _turn_back(self.query, cos, sin), _turn_back(new, cos, sin)


def _turn_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of x * cos + rotate_half(x) * sin; cos and sin may carry a common factor (YaRN)."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    low, high = turned.chunk(2, dim=-1)
    back = turned * cos + torch.cat([high, -low], dim=-1) * sin
    return torch.cat([back / (cos * cos + sin * sin), rest], dim=-1)


def rotates(module: nn.Module) -> bool:
    """Whether an attention module turns queries and keys by their positions."""
    return not left_out(module) and any("rotary" in name.lower() for name in vars(sys.modules[type(module).__module__]))


def left_out(module: nn.Module) -> bool:
    """Whether this layer has no rotary embedding though others of its model do (SmolLM3): it is told one all the
    same."""
    return not getattr(module, "use_rope", True)


def check_rotary(module: nn.Module) -> None:
    """UserError unless the attention module's rotary embedding turns halves of a head (not neighbours), which is what
    ``Call.unrotated`` undoes."""
    turn = getattr(sys.modules[type(module).__module__], "rotate_half", None)
    if turn is None or turn(torch.arange(4.0)).tolist() != [-2, -3, 0, 1]:
        raise UserError(f"model: the rotary embedding of {type(module).__name__} is not of a kind that can be undone")


@dataclass
class Allowed:
    """Which pairs a method computes, of those the queries see. ``mask``: bool, broadcastable to (B, H, T, S);
    ``bias``: added to the logits, broadcastable alike. A subclass that has its mask in a smaller form (blocks, ranges)
    overrides ``rows`` and need not build it whole."""

    mask: Tensor | None = None
    bias: Tensor | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """The mask of the queries start .. stop - 1: broadcastable to (B, H, stop - start, S)."""
        if self.mask is None:
            raise ValueError("an allowance without a mask must override rows()")
        return self.mask if self.mask.shape[-2] == 1 else self.mask[..., start:stop, :]

    def bias_rows(self, start: int, stop: int) -> Tensor | None:
        """The bias of the queries start .. stop - 1, or None."""
        return self.bias if self.bias is None or self.bias.shape[-2] == 1 else self.bias[..., start:stop, :]

    def by_kernel(self, call: Call) -> tuple[Tensor, Tensor] | None:
        """Where a kernel computes all of this: the output (B, H, T, D) and the computed pairs (B, H) int64. None: the
        plug computes it, exactly, from the mask."""
        return None


@dataclass(frozen=True)
class Work:
    """Query-key pairs of one call. ``computed``: (B, H) int64, what this handler's mask and the cache leave; ``dense``:
    (B,) int64, what the dense model computes per head."""

    computed: Tensor
    dense: Tensor


class Handler:
    """What a method does at each layer's call; every part is optional. Several may be attached: masks are joined by
    and, biases add."""

    wants_weights = False  # attention weights for `after`; the slow way of computing them

    def before(self, call: Call) -> None:
        """May replace ``call.query`` and ``call.key`` (other rotations, say)."""

    def allow(self, call: Call) -> Allowed | None:
        """The pairs to compute; None: all."""
        return None

    def after(self, call: Call, work: Work) -> None:
        """The output is computed: count, and evict, merge or compress entries of ``call.layer``."""
