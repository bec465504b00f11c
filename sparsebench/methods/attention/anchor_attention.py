"""AnchorAttention (Zhang, Guo, Wu, Zhu, Ding, Zhang 2025, arXiv 2505.23520): stripes near each query's largest logit.

Queries go in groups of G = block_size * step. With s = q k^T / sqrt d (natural logarithms):

    anchor of a row:    the largest s over the first G keys and the keys of its own group, causal
    column c of a group:  kept if, for any of its ``step`` blocks,  mean(q) . k_c / sqrt d + theta >= mean(anchors)

Every row computes the first group, its own group and the kept columns between. The rows behind the last whole group are
dense, and so are prompts below two groups. ``variant=released`` follows the code, which looks for columns in
[block_size, gG - block_size): those of the first group that are kept enter the softmax twice, and the block before a
group is never kept. ``clean`` looks in [G, gG) and counts every key once. Code: block_size 128, step 16, theta 12; here
sizes are less on short prompts. ``sparsity`` searches theta; the first and own groups alone are the least that is
computed. Achieved counts causal pairs; ``stripe_ratio`` is the code's own number, kept stripes over N^2 / (2 G).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsebench.costs.flops import Attention
from sparsebench.declare import Taxonomy, method, option
from sparsebench.methods.attention.base import AttentionMethod, block_of
from sparsebench.methods.attention.selections import Heads, Selection, Tiles


@method(
    name="anchor_attention",
    version=1,
    paper="Zhang et al. 2025, arXiv 2505.23520",
    target="attention",
    phase="prefill",
    baseline="local_sink",
    taxonomy=Taxonomy(
        object="attention",
        granularity=("column",),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        allocation="global_threshold",
        benefit_realised_on=("flops",),
        kernel_required="gathered columns per group of queries",
    ),
)
@dataclass(frozen=True)
class AnchorAttention(AttentionMethod):
    """Computes the columns whose logit comes near the largest of the first and the nearest keys."""

    theta: float | None = option(
        None, "how far below the anchor a logit may lie (natural log), in place of sparsity", low=0.0,
        unit="instead of sparsity",
    )  # fmt: skip
    variant: str = option("clean", "each key once, or as in the released code", choices=("clean", "released"))
    block_size: int | None = option(None, "queries of a block; 128, or less on short prompts", low=1)
    step: int | None = option(None, "blocks of a group; 16, fewer on short prompts so that there are 16 groups", low=1)

    knobs: ClassVar[tuple[str, ...]] = ("theta",)
    sizes: ClassVar[tuple[str, ...]] = ("block_size", "step")

    def leaves_out(self, tokens: int) -> bool:
        block, step = self.group(tokens)
        return tokens // (block * step) > 2  # a group with one between the first and itself

    def native(self, tokens: int) -> float | None:
        return self.theta

    def estimate(self, heads: Heads) -> Any:
        block, step = self.group(heads.tokens)
        return None if heads.tokens < 2 * block * step else margins(heads, block, step, self.variant == "released")

    def span(self, heads: Heads, seen: Any) -> tuple[float, float]:
        finite = seen[seen.isfinite()] if seen is not None else torch.zeros(0)
        return (float(finite.min()) - 1e-3, float(finite.max())) if len(finite) else (0.0, 0.0)

    def build(self, heads: Heads, seen: Any, knob: float) -> Selection:
        if seen is None:
            return Selection(heads.tokens)
        block, step = self.group(heads.tokens)
        found = with_stripes(seen <= knob, block * step)
        found.extra["theta"] = float(knob)
        return found

    def group(self, tokens: int) -> tuple[int, int]:
        """Queries of a block, blocks of a group."""
        block = block_of(self.block_size, 128, tokens)
        return block, self.step or max(1, min(16, tokens // (16 * block)))

    def index_flops(self, tokens: int, layer: Attention, learned: Mapping[str, Tensor]) -> float:
        """Of the blocks' mean queries with the keys before them; the first pass is computed anyway."""
        return 2.0 * layer.heads * layer.head_dim * (tokens / self.group(tokens)[0]) * tokens / 2


@dataclass
class _Stripes(Tiles):
    """Tiles of which some columns (``twice``, (H, groups, N) bool: variant released) enter the softmax twice."""

    twice: Tensor = field(kw_only=True)

    def bias_rows(self, start: int, stop: int) -> Tensor | None:
        if not bool(self.twice.any()):
            return None
        place = torch.arange(start, stop, device=self.twice.device)
        sparse = (place < (self.dense_from or 0))[:, None]
        counted: Tensor = self.twice[:, place // self.size] & sparse
        return counted.float() * log(2)


def with_stripes(stripes: Tensor, size: int) -> Tiles:
    """What is computed when groups of ``size`` queries keep these columns beside the first group and their own:
    stripes (H, groups, N) bool."""
    tokens = stripes.shape[2]
    group = torch.arange(stripes.shape[1], device=stripes.device)[:, None]
    key = torch.arange(tokens, device=stripes.device)
    base = (key < size) | (key // size == group)
    ratio = float(stripes.sum(dim=(1, 2)).double().mean()) / (tokens**2 / size / 2)
    whole = tokens // size * size
    extra = {"stripe_ratio": ratio}
    return _Stripes(tokens, base | stripes, size, dense_from=whole, twice=stripes & base, extra=extra)


def anchors(heads: Heads, size: int) -> Tensor:
    """(H, N) float32: each row's largest logit over the first group and its own, causal."""
    found = []
    query, key = heads.query.float(), heads.keys.float()
    for start in range(0, heads.tokens, size):
        rows, own = query[:, start : start + size], key[:, start : start + size]
        future = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool, device=key.device).triu(1)
        best = (rows @ own.transpose(1, 2)).masked_fill(future, -torch.inf).amax(dim=2)
        if start:
            best = torch.maximum(best, (rows @ key[:, :size].transpose(1, 2)).amax(dim=2))
        found.append(best * heads.scaling)
    return torch.cat(found, dim=1)


def margins(heads: Heads, block: int, step: int, released: bool) -> Tensor:
    """(H, groups, N) float32: the theta from which on a group keeps a column; inf where it is not a candidate."""
    tokens, size = heads.tokens, block * step
    groups = tokens // size
    whole = groups * size
    start = torch.arange(groups, device=heads.query.device)[:, None] * size
    key = torch.arange(tokens, device=heads.query.device)
    query = heads.query[:, :whole].float().unflatten(1, (groups, step, block)).mean(dim=3)
    anchor = anchors(heads, size)[:, :whole].unflatten(1, (groups, step, block)).mean(dim=3)
    logits = query.flatten(1, 2) @ heads.keys.float().transpose(1, 2) * heads.scaling
    lacks: Tensor = (anchor[..., None] - logits.unflatten(1, (groups, step))).amin(dim=2)
    low, high = (block, start - block) if released else (size, start)
    lacks = lacks.masked_fill((key < low) | (key >= high), torch.inf)
    if whole < tokens:  # the rows behind the last whole group are dense
        lacks = torch.cat([lacks, lacks.new_full((len(lacks), 1, tokens), torch.inf)], dim=1)
    return lacks
