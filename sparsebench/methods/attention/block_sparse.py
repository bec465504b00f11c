"""Block-sparse attention by mean pooling, as harmonised by The Sparse Frontier (Nawrot et al. 2025, arXiv 2504.17768).

    P = mean_c(q) mean_c(k)^T over chunks of ``chunk_size`` tokens, neither scaled nor normalised

Each row of chunks computes its ``top_chunks`` best chunks; the diagonal, the one left of it and the first column are
forced. As in the code, a prompt is padded by chunk - N mod chunk zeros, a whole chunk where N is a multiple. For a
target the number of chunks is the one whose paper's sparsity is nearest to it:

    sparsity_reported = 1 - (t(t + 1)/2 + (n - t) t) / (n(n + 1)/2),   n = ceil(N / chunk)

Achieved counts causal pairs and so differs a little on the diagonal chunks. Paper: chunks of 16 tokens.
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
from sparsebench.methods.attention.base import AttentionMethod, block_of
from sparsebench.methods.attention.selections import Heads, Selection, blocks

_FEWEST = 3  # the forced ones: first column, diagonal, and the chunk left of it


@method(
    name="block_sparse",
    version=1,
    paper="Nawrot et al. 2025, arXiv 2504.17768",
    target="attention",
    phase="prefill",
    baseline="local_sink",
    taxonomy=Taxonomy(
        object="attention",
        granularity=("block",),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        benefit_realised_on=("flops",),
        kernel_required="block lists",
    ),
)
@dataclass(frozen=True)
class BlockSparse(AttentionMethod):
    """Computes the chunks of keys whose mean is nearest to the mean of a chunk of queries."""

    top_chunks: int | None = option(None, "chunks per row, in place of sparsity", low=3, unit="instead of sparsity")
    chunk_size: int | None = option(None, "tokens of a chunk; 16, or less on short prompts", low=1)

    knobs: ClassVar[tuple[str, ...]] = ("top_chunks",)
    sizes: ClassVar[tuple[str, ...]] = ("chunk_size",)

    def leaves_out(self, tokens: int) -> bool:
        return -(-tokens // block_of(self.chunk_size, 16, tokens)) > _FEWEST

    def native(self, tokens: int) -> float | None:
        if self.top_chunks is not None:
            return self.top_chunks
        return chunks_for(self.asked or 0.0, -(-tokens // block_of(self.chunk_size, 16, tokens)))

    def build(self, heads: Heads, seen: Any, knob: float) -> Selection:
        size = block_of(self.chunk_size, 16, heads.tokens)
        kept = int(knob)
        mask = nearest_chunks(heads, size, kept)
        count = -(-heads.tokens // size)
        reported = torch.tensor([formula(kept, count)], dtype=torch.float64)
        found = blocks(mask[:, :count, :count], size, heads.tokens, reported=reported)
        found.extra["top_chunks"] = float(kept)
        return found

    def index_flops(self, tokens: int, layer: Attention, learned: Mapping[str, Tensor]) -> float:
        chunks = tokens / block_of(self.chunk_size, 16, tokens)
        return 2.0 * layer.heads * layer.head_dim * chunks**2 / 2


def pooled(vectors: Tensor, size: int, padding: int) -> Tensor:
    """Means over chunks of ``size``, behind ``padding`` zeros: (H, N, d) -> (H, chunks, d)."""
    return F.pad(vectors, (0, 0, 0, padding)).view(len(vectors), -1, size, vectors.shape[-1]).mean(dim=2)


def nearest_chunks(heads: Heads, size: int, kept: int) -> Tensor:
    """(H, chunks, chunks) bool, the padded chunk included: each row's best ``kept`` chunks, without its future."""
    padding = size - heads.tokens % size
    query, key = pooled(heads.query, size, padding), pooled(heads.keys, size, padding)
    scores = query @ key.transpose(1, 2)
    count = scores.shape[1]
    seen = torch.ones(count, count, dtype=torch.bool, device=scores.device).tril()
    forced = seen & ~seen.tril(-2)
    forced[:, 0] = True
    scores = scores.masked_fill(forced, torch.inf).masked_fill(~seen, -torch.inf)
    best = scores.topk(min(kept, count), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(2, best, True) & seen


def formula(kept: int, count: int) -> float:
    """The paper's sparsity of ``kept`` of ``count`` chunks."""
    kept = min(kept, count)
    return 1 - (kept * (kept + 1) / 2 + (count - kept) * kept) / (count * (count + 1) / 2)


def chunks_for(sparsity: float, count: int) -> int:
    """The number of chunks, from 3 on, whose formula is nearest to a sparsity."""
    return min(range(_FEWEST, max(_FEWEST, count) + 1), key=lambda kept: abs(formula(kept, count) - sparsity))
