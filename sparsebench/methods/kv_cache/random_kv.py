"""Keeps random entries of the prompt: the naive baseline of every method that drops entries.

Each position draws one number per layer and KV head; the largest are kept. All rows of a batch share the draws, so that
a result does not depend on the batch. Tokens that are decoded stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsebench.declare import Taxonomy, method, option
from sparsebench.methods.base import Surroundings
from sparsebench.methods.kv_cache.base import Evictor
from sparsebench.methods.kv_cache.entries import Entries, newest, oldest


@method(
    name="random_kv",
    version=1,
    paper="none (baseline)",
    target="kv_cache",
    phase="prefill+decode",
    uses=("seed",),
    taxonomy=Taxonomy(
        object="kv_cache",
        granularity=("token",),
        when_mask_is_found="at_inference",
        mask_dynamics="static",
        benefit_realised_on=("memory", "flops"),
        kernel_required="ragged attention",
    ),
)
@dataclass(frozen=True)
class RandomKv(Evictor):
    """Keeps random prompt entries of each head, with or without the first and last ones."""

    n_sink: int = option(0, "first entries that always stay", low=0, unit="tokens")
    recent: int = option(0, "last entries that always stay", low=0, unit="tokens")

    def forced(self, kept: int) -> int:
        return max(1, self.n_sink + self.recent)

    def fit(self, around: Surroundings) -> dict[str, Tensor]:
        return {"seed": torch.tensor(around.seed)}

    def score(self, now: Entries) -> Tensor:
        generator = torch.Generator().manual_seed(int(now.learned["seed"]) * 1009 + now.call.index)
        heads, length = now.valid.shape[1], now.call.slots.shape[-1]
        drawn = torch.rand(length, heads, generator=generator).T.to(now.valid.device)
        scores = drawn.expand(len(now.valid), -1, -1).gather(2, now.rank)  # by place in the text, not in the batch
        forced = oldest(now.valid, self.n_sink) | newest(now.valid, self.recent)
        return scores.masked_fill(forced, torch.inf)
