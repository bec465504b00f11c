"""Exact top-k of MLP activations, after the Top-k Transformer (Li et al. 2022, arXiv 2210.06313, "lazy neuron").

    f(x) = V Top_k(a),   a = act(K^T x)

Top_k keeps the k largest entries of each token's vector, unchanged, and zeroes the rest, in every MLP; k = d_ff is
the model itself. The paper trains with it; here it acts on a model as it is. ``site=gate``: a is the gate's
activation, whose dropped entries spare rows of up and columns of down; ``site=hidden``: a is the product of
gate and up, which spares columns of down alone. The paper's a comes out of a ReLU and is not negative; for other
functions ``rank_by=magnitude`` ranks |a| and ``value`` a itself. Sparsity and achieved are of a's entries; kept
entries that are exactly zero (fewer than k positive ones behind a ReLU) count as dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.activations.base import PromptMethod
from sparsebench.methods.activations.gating import Gate, only, top_k
from sparsebench.methods.activations.sites import GatedBlock


class TopKGate(Gate):
    """Keeps the k largest entries of each token."""

    def __init__(self, block: GatedBlock, kind: str | None, k: int, magnitude: bool) -> None:
        super().__init__(block, kind)
        self.k, self.magnitude = k, magnitude

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keep = top_k(x.abs() if self.magnitude else x, self.k) & (x != 0)
        return only(keep, x), keep


@method(
    name="topk",
    version=1,
    paper="Li et al. 2022, arXiv 2210.06313",
    target="activations",
    phase="prefill",
    taxonomy=Taxonomy(
        object="activations",
        granularity=("unstructured", "row", "column"),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        benefit_realised_on=("memory", "flops"),
        kernel_required="gathered gated MLP",
    ),
)
@dataclass(frozen=True)
class TopK(PromptMethod):
    """Keeps the k largest MLP activations of each token, exactly."""

    k: int | None = option(
        None, "entries kept of each token's vector, in place of sparsity", low=1, unit="instead of sparsity"
    )
    site: str = option(
        "gate", "what is sparse: the gate's activation, or its product with up", choices=("gate", "hidden")
    )
    rank_by: str = option("magnitude", "what is ranked", choices=("magnitude", "value"))

    def kept(self, block: GatedBlock) -> int:
        """k of this block."""
        return block.hidden - int(block.hidden * self.level) if self.k is None else self.k

    def check_model(self, model: nn.Module, blocks: Sequence[GatedBlock]) -> None:
        narrowest = min(block.hidden for block in blocks)
        if self.k is not None and self.k > narrowest:
            raise UserError(f"method.topk.k={self.k}: the MLP has {narrowest} activations; at most that many are kept")

    def gates(self, blocks: Sequence[GatedBlock], tensors: Mapping[str, Tensor]) -> list[Gate]:
        kind = "down" if self.site == "hidden" else None
        return [TopKGate(block, kind, self.kept(block), self.rank_by == "magnitude") for block in blocks]

    def asked_of(self, blocks: Sequence[GatedBlock]) -> float:
        if self.k is None:
            return self.level
        return 1 - self.k * len(blocks) / sum(block.hidden for block in blocks)

    def tolerance(self, blocks: Sequence[GatedBlock]) -> float:
        return max(1 / block.hidden for block in blocks)
