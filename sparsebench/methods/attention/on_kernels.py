"""Block-shaped selections on the block kernel: what a method chose of one prompt as lists of blocks, or why not.

Quality is measured over exact masks; this is what milliseconds are measured on, and its outputs agree with the masked
ones but for rounding. The kernel takes blocks of a multiple of 64 tokens, keys in their order or permuted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsebench.kernels.attention import BLOCK, LARGEST_DIM, BlockIndex, block_attention
from sparsebench.methods.attention.selections import PerHead, Selection, Tiles

if TYPE_CHECKING:
    from sparsebench.models.plug import Call

Part = tuple[int, int, int, Selection]  # row, first and last + 1 real position, what is computed of it


@dataclass
class KernelUse:
    """What became of the prefills while kernels were on. ``layers``: those that ran on the kernel; ``reasons``: why
    others did not."""

    layers: set[int] = field(default_factory=set)
    reasons: set[str] = field(default_factory=set)

    @property
    def refused(self) -> str:
        """Why not everything ran on the kernel, in words; empty when it did."""
        if self.layers and not self.reasons:
            return ""
        return "; ".join(sorted(self.reasons)) or "several methods act on the same attention"


class Unfit(Exception):
    """The kernel does not take this; the message says why."""


@dataclass(frozen=True)
class Blocks:
    """``mask``: (H or 1, n, n) bool over blocks of ``size`` queries and keys; ``order``: (H or 1, N) int64, the
    position of each key as the blocks have them, None where that is their order."""

    mask: Tensor
    size: int
    order: Tensor | None = None


def blocks_of(selection: Selection) -> Blocks:
    """The selection in blocks. Unfit where it has another shape."""
    if type(selection) is Selection:  # everything
        count = -(-selection.tokens // BLOCK)
        return Blocks(torch.ones(1, count, count, dtype=torch.bool), BLOCK)
    if isinstance(selection, PerHead):
        return _joined(selection)
    if not isinstance(selection, Tiles) or selection.columns is None or selection.dense_from is not None:
        raise Unfit("what is computed is no set of blocks")
    if selection.size % BLOCK:
        raise Unfit(f"blocks of {selection.size} tokens, the kernel takes multiples of {BLOCK}")
    plain = torch.arange(selection.tokens, device=selection.columns.device) // selection.size
    if bool((selection.columns == plain).all()):
        return Blocks(selection.mask, selection.size)
    order = selection.columns.argsort(dim=1, stable=True)
    if not bool((selection.columns.gather(1, order) == plain).all()):
        raise Unfit("its blocks of keys are not of one size")
    return Blocks(selection.mask, selection.size, order)


def _joined(selection: PerHead) -> Blocks:
    """Heads that chose each for itself, all of them blocks of one size and in order."""
    parts = [(where, blocks_of(part)) for where, part in selection.parts]
    sizes = {one.size for _, one in parts}
    if len(sizes) > 1 or any(one.order is not None for _, one in parts):
        raise Unfit("its heads have blocks of several sizes")
    shape = parts[0][1].mask.shape[1:]
    whole = torch.zeros(sum(len(where) for where, _ in parts), *shape, dtype=torch.bool, device=parts[0][0].device)
    for where, one in parts:
        whole[where] = one.mask.to(whole.device).expand(len(where), *shape)
    return Blocks(whole, sizes.pop())


def attend(call: Call, parts: Sequence[Part], use: KernelUse) -> tuple[Tensor, Tensor] | None:
    """The output (B, H, T, D), zeros at padding, and the computed pairs (B, H) int64; None, with the reason noted,
    where the kernel does not take a row's selection."""
    batch, heads, _, dim = call.query.shape
    output = torch.zeros_like(call.query)
    pairs = torch.zeros(batch, heads, dtype=torch.long, device=call.query.device)
    try:
        if dim > LARGEST_DIM:
            raise Unfit(f"heads of {dim} channels, the kernel takes up to {LARGEST_DIM}")
        for row, first, last, selection in parts:
            if first < last:
                output[row, :, first:last] = _row(call, row, first, last, blocks_of(selection))
                pairs[row] = selection.pairs().round().long().to(pairs.device)
    except Unfit as reason:
        use.reasons.add(str(reason))
        return None
    use.layers.add(call.index)
    return output, pairs


def _row(call: Call, row: int, first: int, last: int, chosen: Blocks) -> Tensor:
    """(H, N, D): one prompt."""
    query, key, value = (x[row, :, first:last].contiguous() for x in (call.query, call.key, call.value))
    heads, tokens = query.shape[:2]
    mask = chosen.mask.expand(heads, -1, -1).to(query.device)
    if chosen.order is None:
        index = BlockIndex.from_mask(mask.tril(), tokens, tokens, chosen.size)
        return block_attention(query, key, value, index, call.scaling)
    order = chosen.order.expand(heads, -1).to(query.device)
    where = order[..., None].expand(-1, -1, query.shape[-1])
    key, value = (x.repeat_interleave(call.groups, dim=0).gather(1, where) for x in (key, value))
    index = BlockIndex.from_mask(mask, tokens, tokens, chosen.size)
    return block_attention(query, key, value, index, call.scaling, order.to(torch.int32).contiguous())
