"""TOVA: token omission via attention (Oren et al. 2024, arXiv 2401.06104), scored as in kvpress.

    score_j = attention weight of the last query on entry j, averaged over all query heads

One set for all KV heads of a layer; the last entry always stays. ``variant=decode`` (the paper) drops after the prompt
and after every forward since, ``variant=prefill`` (kvpress) once after the prompt. TOVA is SnapKV with a window of one
query, no pooling and the mean over all heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsebench.costs.flops import Attention
from sparsebench.declare import Taxonomy, method, option
from sparsebench.methods.kv_cache.base import Evictor
from sparsebench.methods.kv_cache.entries import Entries, newest


@method(
    name="tova",
    version=1,
    paper="Oren et al. 2024, arXiv 2401.06104",
    target="kv_cache",
    phase="prefill+decode",
    baseline="random_kv",
    taxonomy=Taxonomy(
        object="kv_cache",
        granularity=("token",),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        benefit_realised_on=("memory", "flops"),
        kernel_required="attention that gives the last query's weights",
    ),
)
@dataclass(frozen=True)
class Tova(Evictor):
    """Keeps the entries that the last query attends to most."""

    variant: str = option(
        "decode", "when entries are dropped: once, or after every forward", choices=("prefill", "decode")
    )

    @property
    def while_decoding(self) -> bool:
        return self.variant == "decode"

    def score(self, now: Entries) -> Tensor:
        paid = now.attention(last=1)[:, :, 0].mean(dim=1, keepdim=True).expand(now.valid.shape)
        return paid.masked_fill(newest(now.valid, 1), torch.inf)

    def index_prefill(self, layer: Attention, length: int) -> float:
        return 2.0 * layer.heads * layer.head_dim * length

    def index_decode(self, layer: Attention, length: int) -> float:
        return 0.0  # the weights are those of the step itself
