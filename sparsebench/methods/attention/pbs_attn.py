"""PBS-Attn (Wang et al. 2025, arXiv 2510.21270): block-sparse attention over keys that were sorted within segments.

Attention does not change when keys and values are permuted together. With segments of ``segment_size`` tokens:

1. importance s = mean over the last block of queries of softmax(q k^T / sqrt d) over all complete segments (no mask);
   each complete segment is sorted by it, heavy keys first, so that they share blocks;
2. blocks of queries and of sorted keys are pooled by mean (zero padded); in each row the blocks of earlier segments are
   taken by decreasing softmax(q_p k_p^T / sqrt d) until their mass reaches ``threshold``; a row that never reaches it
   (in floating point) takes none;
3. the block that holds the first token and all blocks of the own segment are added.

A query computes a key of a chosen block if the key's original position is not after it. ``threshold=1`` takes every
block. ``sparsity`` searches the threshold. Achieved counts causal pairs; ``sparsity_reported`` counts blocks of the
lower block triangle. Paper: blocks of 128, segments of 256; here less on short prompts, and segments of up to 4 blocks.
``query_pool`` and ``key_pool`` pool by the maximum instead, ``permutation=random`` sorts by a draw that is the same for
every prompt. Not here: the antidiagonal selector (PBS-Attn+).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsebench.costs.flops import Attention
from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.attention.base import AttentionMethod, block_of
from sparsebench.methods.attention.block_sparse import pooled
from sparsebench.methods.attention.selections import Heads, Selection, Tiles, block_sparsity, masked_softmax


@method(
    name="pbs_attn",
    version=1,
    paper="Wang et al. 2025, arXiv 2510.21270",
    target="attention",
    phase="prefill",
    baseline="local_sink",
    taxonomy=Taxonomy(
        object="attention",
        granularity=("block",),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        benefit_realised_on=("flops",),
        kernel_required="block lists over permuted keys",
    ),
)
@dataclass(frozen=True)
class PbsAttn(AttentionMethod):
    """Sorts keys by importance inside segments, so that few blocks hold the heavy ones."""

    threshold: float | None = option(
        None, "attention mass to hold, in place of sparsity", above=0.0, high=1.0, unit="instead of sparsity"
    )
    block_size: int | None = option(None, "tokens of a block; 128, or less on short prompts", low=1)
    segment_size: int | None = option(None, "tokens of a segment; 256, at most 4 blocks", low=1)
    permutation: str = option(
        "importance", "how keys are ordered in a segment", choices=("importance", "none", "random")
    )
    query_pool: str = option("mean", "how a block's queries are pooled", choices=("mean", "max"))
    key_pool: str = option("mean", "how a block's keys are pooled", choices=("mean", "max"))
    share_permutation: bool = option(False, "one order for the query heads of a KV head")
    force_first: bool = option(True, "always compute the block that holds the first token")

    knobs: ClassVar[tuple[str, ...]] = ("threshold",)
    sizes: ClassVar[tuple[str, ...]] = ("block_size", "segment_size")

    def check_model(self, model: Any) -> None:
        if self.block_size and self.segment_size and self.segment_size % self.block_size:
            raise UserError(f"{self.name('segment_size')}: must be a multiple of block_size={self.block_size}")

    def check_tokens(self, tokens: int) -> None:
        block, segment = self.blocks_of(tokens)
        if segment % block:
            raise UserError(
                f"{self.name('segment_size')}: must be a multiple of the block size ({block} for a prompt of {tokens} "
                "tokens; block_size= changes that)"
            )

    def leaves_out(self, tokens: int) -> bool:
        block, segment = self.blocks_of(tokens)
        before = (tokens - 1) // segment * segment // block  # blocks before the last segment
        return before > 1  # a row takes one at least, the first where it is forced may be that one

    def blocks_of(self, tokens: int) -> tuple[int, int]:
        """Tokens of a block and of a segment."""
        block = block_of(self.block_size, 128, tokens)
        return block, self.segment_size or max(block, min(256 // block, 4) * block)

    def native(self, tokens: int) -> float | None:
        return self.threshold

    def estimate(self, heads: Heads) -> Any:
        block, segment = self.blocks_of(heads.tokens)
        if heads.tokens <= segment:
            return None
        order = key_order(heads, block, segment, self.permutation, self.share_permutation)
        return _Sorted(order, block_scores(heads, order, block, segment, (self.query_pool, self.key_pool)))

    def span(self, heads: Heads, seen: Any) -> tuple[float, float]:
        return 1e-6, 1.0

    def build(self, heads: Heads, seen: Any, knob: float) -> Selection:
        if seen is None:
            return Selection(heads.tokens)
        block, segment = self.blocks_of(heads.tokens)
        mask = taken(seen.scores, knob) if knob < 1 else torch.ones_like(seen.scores, dtype=torch.bool)
        where = torch.arange(heads.tokens, device=mask.device).expand_as(seen.order)
        place = torch.empty_like(seen.order).scatter_(1, seen.order, where)
        if self.force_first:
            first = place[:, 0] // block
            mask[torch.arange(len(mask)), :, first] = True
        mask |= own_segment(mask.shape[-1], segment // block, mask.device)
        extra = {"threshold": float(knob)}
        reported = block_sparsity(mask)
        return Tiles(heads.tokens, mask, block, place // block, reported=reported, extra=extra)

    def index_flops(self, tokens: int, layer: Attention, learned: Mapping[str, Tensor]) -> float:
        block = self.blocks_of(tokens)[0]
        return 2.0 * layer.heads * layer.head_dim * (block * tokens + (tokens / block) ** 2 / 2)


@dataclass(frozen=True)
class _Sorted:
    """``order``: (H, N) original positions of the permuted keys; ``scores``: (H, blocks, blocks)."""

    order: Tensor
    scores: Tensor


def key_order(heads: Heads, block: int, segment: int, permutation: str, shared: bool) -> Tensor:
    """(H, N) int64: the original position of each permuted key."""
    tokens, count = heads.tokens, len(heads.query)
    plain = torch.arange(tokens, device=heads.query.device).expand(count, tokens)
    whole = tokens // segment
    if permutation == "none" or whole * segment == segment == tokens:
        return plain
    if permutation == "random":
        draw = torch.rand(count, whole * segment, generator=torch.Generator().manual_seed(heads.layer))
        importance = draw.to(heads.query.device)
    else:
        logits = heads.query[:, -block:].float() @ heads.keys[:, : whole * segment].float().transpose(1, 2)
        importance = (logits * heads.scaling).softmax(dim=-1).mean(dim=1)
    if shared:
        groups = count // len(heads.key)
        importance = importance.unflatten(0, (-1, groups)).mean(dim=1).repeat_interleave(groups, dim=0)
    inside = importance.unflatten(1, (whole, segment)).argsort(dim=2, descending=True, stable=True)
    starts = torch.arange(whole, device=inside.device)[:, None] * segment
    return torch.cat([(inside + starts).flatten(1), plain[:, whole * segment :]], dim=1)


def block_scores(
    heads: Heads, order: Tensor, block: int, segment: int, pools: tuple[str, str] = ("mean", "mean")
) -> Tensor:
    """(H, blocks, blocks) float32: each row's softmax over the blocks of earlier segments, zeros without any.
    ``pools``: of queries and keys; padding counts as zeros for both."""
    padding = -heads.tokens % block
    keys = heads.keys.float().gather(1, order[..., None].expand_as(heads.keys))
    query, key = (
        pooled(vectors, block, padding) if how == "mean" else largest(vectors, block, padding)
        for vectors, how in zip((heads.query.float(), keys), pools, strict=True)
    )
    logits = query @ key.transpose(1, 2) * heads.scaling
    place = torch.arange(logits.shape[1], device=logits.device) // (segment // block)
    return masked_softmax(logits, place[:, None] > place)


def largest(vectors: Tensor, block: int, padding: int) -> Tensor:
    """The largest entry of each channel in each block, behind ``padding`` zeros: (H, N, d) -> (H, blocks, d)."""
    blocks: Tensor = F.pad(vectors, (0, 0, 0, padding)).unflatten(1, (-1, block))
    return blocks.amax(dim=2)


def taken(scores: Tensor, threshold: float) -> Tensor:
    """(H, blocks, blocks) bool: each row's best blocks, through the one at which their mass reaches ``threshold``; none
    in a row that never does."""
    ordered = scores.sort(dim=-1, descending=True, stable=True)
    reaches = ordered.values.cumsum(dim=-1) >= threshold
    before = reaches.cumsum(dim=-1) - reaches.int() == 0  # up to and with the first that reaches it
    kept = before & reaches.any(dim=-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, ordered.indices, kept)


def own_segment(count: int, blocks: int, device: torch.device) -> Tensor:
    """(count, count) bool: blocks of the same segment of so many blocks."""
    place = torch.arange(count, device=device) // blocks
    return place[:, None] == place
