"""Statistical top-k of MLP activations (Spark Transformer, You et al. 2025, arXiv 2506.06644).

    theta = mean(x) + std(x) * Phi^-1(1 - k/d);   y = max(x - theta, 0)

on each token's gate scores x in R^d BEFORE the activation function: a linear-time estimate of the k-th largest,
taking the scores to be Gaussian. Survivors are shifted by theta (``soft=true``), as the published operator does in
models that were trained with it (Gemma 3n, whose code this follows: population std, float32); a model that was not
keeps its function better with ``soft=false``, which copies them. Sparsity is 1 - k/d; achieved counts the entries
at or below theta, which differ from d - k where scores are not Gaussian. Against the exact top-k the record has
``topk_count_error`` (mean |survivors - k| / k), ``topk_recall`` (share of the k largest that survive) and
``topk_output_error`` (relative L2 distance of the activations). The paper's split predictor and its sparse
attention need a model that was trained with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.activations.base import PromptMethod
from sparsebench.methods.activations.gating import Acting, Gate, only, top_k
from sparsebench.methods.activations.sites import GatedBlock


def threshold(x: Tensor, sparsity: float, unbiased: bool = False) -> Tensor:
    """theta of each vector in float32. x: (..., d) -> (..., 1)."""
    wide = x.float()
    cut = NormalDist().inv_cdf(sparsity)
    return wide.mean(dim=-1, keepdim=True) + wide.std(dim=-1, keepdim=True, unbiased=unbiased) * cut


class StatisticalGate(Gate):
    """Keeps the gate scores above their estimated k-th largest; sums its distance from the exact top-k."""

    def __init__(self, block: GatedBlock, sparsity: float, soft: bool, unbiased: bool) -> None:
        super().__init__(block, None, after=False)
        self.sparsity, self.soft, self.unbiased = sparsity, soft, unbiased
        self.k = block.hidden - int(block.hidden * sparsity)
        self.sums = torch.zeros(5, dtype=torch.float64)  # tokens, |n - k| / k, recall, squared distance, squared norm

    def install(self, acting: Acting) -> list[Any]:
        self.sums.zero_()
        return super().install(acting)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.sparsity == 0:
            return x, torch.ones_like(x, dtype=torch.bool)
        theta = threshold(x, self.sparsity, self.unbiased).to(x.dtype)
        keep = x > theta
        if self.watched:
            self._compare(x, keep)
        return only(keep, x - theta if self.soft else x), keep

    def _compare(self, x: Tensor, keep: Tensor) -> None:
        count = keep.sum(dim=-1).double()
        exact = top_k(x, self.k)
        full = self.block.activation.forward(x).double()  # not called: this gate stands in front of it
        recall = (keep & exact).sum(dim=-1).double() / self.k
        apart = (full * (keep.double() - exact.double())).square().sum(dim=-1)
        size = (full * exact).square().sum(dim=-1)
        parts = (torch.ones_like(count), (count - self.k).abs() / self.k, recall, apart, size)
        self.sums += torch.stack([part.sum() for part in parts]).cpu()


@method(
    name="statistical_topk",
    version=1,
    paper="You et al. 2025, arXiv 2506.06644",
    target="activations",
    phase="prefill",
    baseline="topk",
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
class StatisticalTopK(PromptMethod):
    """Keeps about k gate scores of each token by a threshold from their mean and standard deviation."""

    soft: bool = option(True, "survivors are shifted by the threshold, as published; false copies them")
    unbiased_std: bool = option(False, "divide by d - 1 instead of d in the standard deviation")
    blocks: int | None = option(
        None, "decoder blocks that are sparse: the first so many, all if null (Gemma 3n: 10, at sparsity 0.95)", low=1
    )

    def check_model(self, model: nn.Module, blocks: Sequence[GatedBlock]) -> None:
        if self.blocks is not None and self.blocks > len(blocks):
            raise UserError(f"method.statistical_topk.blocks={self.blocks}: this model has {len(blocks)} blocks")

    def gates(self, blocks: Sequence[GatedBlock], tensors: Mapping[str, Tensor]) -> list[Gate]:
        return [
            StatisticalGate(block, self.level, self.soft, self.unbiased_std) for block in blocks[: self.blocks]
        ]  # fmt: skip

    def tolerance(self, blocks: Sequence[GatedBlock]) -> float:
        # the paper's own models stay within 30% of k
        return 0.3 * (1 - self.level)

    def columns(self, gates: Sequence[Gate], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        sums = sum((gate.sums for gate in gates if isinstance(gate, StatisticalGate)), torch.zeros(5))
        tokens, count, recall, apart, size = sums.tolist()
        if not tokens:
            return {}
        error = (apart / size) ** 0.5 if size else 0.0
        return {"topk_count_error": count / tokens, "topk_recall": recall / tokens, "topk_output_error": error}
