"""H2O: the heavy-hitter oracle (Zhang et al. 2023, arXiv 2306.14048).

    S_j = sum of the attention weights that entry j was paid by all queries so far
    kept = the ``heavy`` entries with the largest S among the older ones, and the ``recent`` newest

after the prompt and after every forward since (variant ``real_drop``, FMInference/H2O), per KV head with S averaged
over its query heads; S accumulates in float32 without decay. The budget is a share of the prompt's tokens and then
constant; the paper's heavy_ratio = recent_ratio = 0.1 is ``sparsity=0.8 heavy_share=0.5``. Other variants: ``masked``
(``utils_hh``): the mask made after a step has a column for the coming token, so one recent entry fewer stays;
``global_lmeval`` (``utils_lm_eval``): drops nothing, and the queries of one forward read the entries with the largest
column sums of that forward and a band; it looks at future queries, so it is no causal method and only for the paper's
figures; ``observed`` (kvpress): once after the prompt, the mean weight over the queries that see an entry, no recent
entries protected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsebench.costs.flops import Attention
from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.kv_cache.base import Evictor
from sparsebench.methods.kv_cache.entries import Entries, newest, top
from sparsebench.models.plug import Allowed, Work

SUMS = "h2o"


@method(
    name="h2o",
    version=1,
    paper="Zhang et al. 2023, arXiv 2306.14048",
    target="kv_cache",
    phase="prefill+decode",
    baseline="random_kv",
    taxonomy=Taxonomy(
        object="kv_cache",
        granularity=("token",),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        benefit_realised_on=("memory", "flops"),
        kernel_required="ragged attention that gives its weights",
    ),
)
@dataclass(frozen=True)
class H2O(Evictor):
    """Keeps the entries with the largest accumulated attention and the newest ones."""

    variant: str = option(
        "real_drop", "which published code is followed", choices=("real_drop", "masked", "global_lmeval", "observed")
    )
    heavy_share: float = option(0.5, "share of the budget for heavy hitters, the rest is recent", low=0.0, high=1.0)
    heavy_size: int | None = option(None, "heavy hitters, in place of sparsity", low=0, unit="instead of sparsity")
    recent_size: int | None = option(None, "recent entries, with heavy_size", low=0, unit="tokens")

    @property
    def asked(self) -> float | None:
        return None if self.heavy_size is not None else super().asked

    @property
    def while_decoding(self) -> bool:
        return self.variant in ("real_drop", "masked")

    def check_model(self, model: PreTrainedModel) -> None:
        if (self.heavy_size is None) != (self.recent_size is None):
            given = "heavy_size" if self.recent_size is None else "recent_size"
            raise UserError(f"{self.name(given)}: heavy_size and recent_size go together")
        if self.heavy_size is not None and self.budget is not None:
            raise UserError(f"{self.name('heavy_size')}: goes without {self.name('budget')}")
        if self.heavy_size is not None and self.heavy_size + (self.recent_size or 0) < 1:
            raise UserError(f"{self.name('heavy_size')}: heavy_size + recent_size must be at least 1")

    def kept(self, tokens: Tensor) -> Tensor:
        if self.heavy_size is None or self.recent_size is None:
            return super().kept(tokens)
        return torch.full_like(tokens, self.heavy_size + self.recent_size)

    def sizes(self, count: Tensor) -> tuple[Tensor, Tensor]:
        """(heavy, recent) of budgets ``count`` (B,)."""
        heavy = (count * self.heavy_share).long()
        if self.heavy_size is not None:
            heavy = torch.full_like(count, self.heavy_size)
        recent = count - heavy
        return heavy, (recent - 1).clamp(min=0) if self.variant == "masked" else recent

    def observe(self, now: Entries) -> None:
        if self.variant == "global_lmeval":
            return
        paid = now.grouped(now.attention_sums()).mean(dim=2)
        state = now.layer.state
        state[SUMS] = state[SUMS] + paid if SUMS in state else paid

    def choose(self, now: Entries, count: Tensor) -> Tensor:
        sums = now.layer.state[SUMS]
        if self.variant == "observed":
            return top(sums / (now.lengths[..., None] - now.rank).clamp(min=1), count[:, None], now.valid)
        heavy, recent = self.sizes(count)
        latest = newest(now.valid, recent[:, None])
        return latest | top(sums, heavy[:, None], now.valid & ~latest)

    def compress(self, now: Entries) -> None:
        if self.variant != "global_lmeval":
            super().compress(now)

    def allow(self, now: Entries) -> Allowed | None:
        """global_lmeval: the same heavy entries for all queries of this forward, and a band around each."""
        if self.variant != "global_lmeval" or self.asked == 0:
            return None
        heavy, recent = self.sizes(self.kept(now.prompt))
        paid = now.grouped(now.attention_sums()).mean(dim=2)
        columns = top(paid, heavy[:, None], now.valid)[:, :, None]
        own = now.rank[:, :, -now.call.tokens :, None]  # each query's own entry
        band = now.rank[:, :, None] > own - recent[:, None, None, None]
        return Allowed(now.repeated(columns | band))

    def tally(self, now: Entries, work: Work) -> tuple[float, float]:
        if self.variant != "global_lmeval":
            return super().tally(now, work)
        total = float(now.prompt.sum()) * work.computed.shape[1] * now.call.tokens
        return (0.0, 0.0) if now.prefill else (max(0.0, total - float(work.computed.sum())), total)

    def index_prefill(self, layer: Attention, length: int) -> float:
        return 2.0 * layer.heads * layer.head_dim * layer.pairs(length)  # weights again: fused attention hides them

    def tolerance(self, shortest: int, model: PreTrainedModel) -> float:
        if self.variant == "global_lmeval":  # heavy hitters may stand in the band, by as much as there are
            return 1.0
        return (2 if self.variant == "masked" else 1) / max(1, shortest)
