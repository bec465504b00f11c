"""SnapKV: the last queries of the prompt vote for what is kept (Li et al. 2024, arXiv 2404.14469), as in kvpress.

    W = softmax(Q[last w] K^T / sqrt(D)),   votes = pool( mean over the w queries of W[:, before the window] )
    score = mean of the votes over the KV head's query heads;   the window's own w entries always stay

Dropped once, at the end of the prompt; decoded tokens stay. The window is 64 queries (kvpress), at most half of the
budget, unless it is given. With ``local_window`` the harmonised form of Sparse Frontier (arXiv 2504.17768, 4.4) is
followed: votes count over all columns, and the last ``local_window`` and first ``prefix_tokens`` entries always stay.
``group_reduce=per_query_head`` is the released SnapKV, where each query head keeps its own set. It stores keys and
values once per query head; here a KV head stores what any of its query heads keeps, and each reads its own, so the
outputs are the same, ``achieved`` counts sets, and ``kv_stored`` the union. Pooling at the borders divides by the whole
kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from sparsebench.costs.flops import Attention
from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.kv_cache.base import Evictor
from sparsebench.methods.kv_cache.entries import Entries, newest, oldest, top
from sparsebench.models.plug import Allowed, Work
from sparsebench.models.plug.cache import HOLE

DROPPED = "snapkv_dropped"  # per-entry memory: the query heads (of the group) whose set it is not in


@method(
    name="snapkv",
    version=1,
    paper="Li et al. 2024, arXiv 2404.14469",
    target="kv_cache",
    phase="prefill+decode",
    baseline="random_kv",
    taxonomy=Taxonomy(
        object="kv_cache",
        granularity=("token",),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        benefit_realised_on=("memory", "flops"),
        kernel_required="ragged attention",
    ),
)
@dataclass(frozen=True)
class SnapKv(Evictor):
    """Keeps the entries for which the last queries of the prompt vote, and those queries' own."""

    window_size: int | None = option(
        None, "last queries that vote; 64, at most half of the budget, if not given", low=1, unit="tokens"
    )
    kernel_size: int = option(5, "columns that are pooled together, an odd number", low=1, unit="tokens")
    pooling: str = option("avg", "how", choices=("avg", "max"))
    group_reduce: str = option(
        "mean", "how a KV head's query heads vote together, or each alone", choices=("mean", "max", "per_query_head")
    )
    window_reduce: str = option("mean", "how the queries of the window vote together", choices=("mean", "max"))
    local_window: int | None = option(
        None, "last entries that always stay; the window, which is not voted on, if not given", low=1, unit="tokens"
    )
    prefix_tokens: int = option(0, "first entries that always stay", low=0, unit="tokens")

    paper_window: ClassVar[int] = 64

    def window(self, kept: Tensor) -> Tensor:
        """Queries that vote, for budgets ``kept`` (B,)."""
        if self.window_size is not None:
            return torch.full_like(kept, self.window_size)
        return (kept // 2).clamp(min=1, max=self.paper_window)

    def forced(self, kept: int) -> int:
        last = self.local_window or int(self.window(torch.tensor(kept)))
        return max(1, last + self.prefix_tokens)

    def check_model(self, model: PreTrainedModel) -> None:
        if self.kernel_size % 2 == 0:
            raise UserError(f"{self.name('kernel_size')}: must be odd")

    def check_prompt(self, tokens: int) -> None:
        if self.window_size is not None and self.window_size >= tokens:
            raise UserError(f"{self.name('window_size')}: the prompt has {tokens} tokens, the window must be shorter")
        super().check_prompt(tokens)

    def score(self, now: Entries) -> Tensor:
        """As the base says; with ``group_reduce=per_query_head`` (B, H, S)."""
        window = self.window(self.kept(now.prompt))
        latest = newest(now.valid, window[:, None])
        weights = now.attention(min(int(window.max()), now.call.tokens))
        votes = self.votes(weights, window, now, None if self.local_window else latest)
        forced = oldest(now.valid, self.prefix_tokens)
        forced |= latest if self.local_window is None else newest(now.valid, self.local_window)
        return votes.masked_fill(now.repeated(forced) if self.alone else forced, torch.inf)

    @property
    def alone(self) -> bool:
        """Whether every query head keeps its own set."""
        return self.group_reduce == "per_query_head"

    def choose(self, now: Entries, count: Tensor) -> Tensor:
        if not self.alone:
            return super().choose(now, count)
        sets = now.grouped(top(self.score(now), count[:, None], now.repeated(now.valid)))  # (B, K, H / K, S)
        now.layer.state[DROPPED] = ~sets.transpose(2, 3)
        return sets.any(dim=2)

    def allow(self, now: Entries) -> Allowed | None:
        dropped = now.layer.state.get(DROPPED)
        return None if dropped is None else Allowed(~dropped.transpose(2, 3).flatten(1, 2)[:, :, None])

    def tally(self, now: Entries, work: Work) -> tuple[float, float]:
        dropped, where = now.layer.state.get(DROPPED), now.layer.positions
        if not now.prefill or dropped is None or where is None:
            return super().tally(now, work)
        total = float(now.prompt.sum()) * work.computed.shape[1]
        return total - float((~dropped & (where != HOLE)[..., None]).sum()), total

    def votes(self, weights: Tensor, window: Tensor, now: Entries, without: Tensor | None) -> Tensor:
        """Pooled votes (B, K, S) from weights (B, H, w, S), of each row's last ``window`` (B,) queries, not for the
        columns ``without`` (B, K, S)."""
        places = torch.arange(weights.shape[2], device=weights.device)
        asked = places >= weights.shape[2] - window[:, None]  # rows of a batch may have shorter windows
        weights = weights * asked[:, None, :, None]
        votes = weights.amax(dim=2) if self.window_reduce == "max" else weights.sum(dim=2) / window[:, None, None]
        if self.group_reduce != "per_query_head":
            votes = now.grouped(votes)
            votes = votes.amax(dim=2) if self.group_reduce == "max" else votes.mean(dim=2)
        elif without is not None:
            without = now.repeated(without)
        return self.pooled(votes if without is None else votes.masked_fill(without, 0))

    def pooled(self, votes: Tensor) -> Tensor:
        """Neighbouring columns together: (B, K, S) -> the same."""
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        return pool(votes, self.kernel_size, stride=1, padding=self.kernel_size // 2)

    def index_prefill(self, layer: Attention, length: int) -> float:
        kept = self.kept(torch.tensor([length]))
        return 2.0 * layer.heads * layer.head_dim * float(self.window(kept)) * length
