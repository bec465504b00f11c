"""Ada-SnapKV: SnapKV's votes, with the budget shared among the heads of a layer (Feng et al. 2024, arXiv 2407.11550).

As harmonised by Sparse Frontier (arXiv 2504.17768, 4.5): the votes are the maximum over the window's queries and over
the KV head's query heads, pooled over 21 columns; the last 128 and first 4 entries always stay. Of a layer's K times
budget places each head first takes its best ``max(int(budget * min_head_share), forced)`` entries, then the best pairs
(head, entry) of the whole layer take the rest, so that heads keep different numbers. Achieved sparsity counts entries
over all heads. Window and local window are at most half and a quarter of the budget unless they are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsebench.declare import Taxonomy, method, option
from sparsebench.methods.kv_cache.entries import Entries, newest, oldest, shared_among_heads
from sparsebench.methods.kv_cache.snapkv import SnapKv


@method(
    name="ada_snapkv",
    version=1,
    paper="Feng et al. 2024, arXiv 2407.11550",
    target="kv_cache",
    phase="prefill+decode",
    baseline="random_kv",
    taxonomy=Taxonomy(
        object="kv_cache",
        granularity=("token", "head"),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        allocation="global_threshold",
        benefit_realised_on=("memory", "flops"),
        kernel_required="ragged attention",
    ),
)
@dataclass(frozen=True)
class AdaSnapKv(SnapKv):
    """SnapKV with a layer's budget shared among its heads, by the best votes of all."""

    window_size: int | None = option(
        None, "last queries that vote; 256, at most half of the budget, if not given", low=1, unit="tokens"
    )
    kernel_size: int = option(21, "columns that are pooled together, an odd number", low=1, unit="tokens")
    group_reduce: str = option("max", "how a KV head's query heads vote together", choices=("mean", "max"))
    window_reduce: str = option("max", "how the queries of the window vote together", choices=("mean", "max"))
    local_window: int | None = option(
        None, "last entries that always stay; 128, at most a quarter of the budget, if not given", low=1, unit="tokens"
    )
    prefix_tokens: int = option(4, "first entries that always stay", low=0, unit="tokens")
    min_head_share: float = option(0.2, "share of the budget that every head keeps", low=0.0, high=1.0)

    paper_window: ClassVar[int] = 256

    def local(self, kept: Tensor) -> Tensor:
        """Last entries that stay, for budgets ``kept`` (B,)."""
        if self.local_window is not None:
            return torch.full_like(kept, self.local_window)
        return (kept // 4).clamp(min=1, max=128)

    def forced(self, kept: int) -> int:
        return int(self.local(torch.tensor(kept))) + self.prefix_tokens

    def score(self, now: Entries) -> Tensor:
        kept = self.kept(now.prompt)
        window = self.window(kept)
        votes = self.votes(now.attention(min(int(window.max()), now.call.tokens)), window, now, None)
        forced = oldest(now.valid, self.prefix_tokens) | newest(now.valid, self.local(kept)[:, None])
        return votes.masked_fill(forced, torch.inf)

    def choose(self, now: Entries, count: Tensor) -> Tensor:
        floor = torch.maximum((count.double() * self.min_head_share).long(), self.local(count) + self.prefix_tokens)
        # a prompt shorter than its budget keeps all it has
        room = torch.minimum(count, now.prompt)
        return shared_among_heads(self.score(now), room, torch.minimum(floor, room), now.valid)
