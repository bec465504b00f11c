"""Wanda: pruning by weights and activations (Sun, Liu, Bair, Kolter 2023, arXiv 2306.11695).

    score S_ij = |W_ij| * ||X_j||_2

where X_j is input feature j over the calibration tokens. Weights are compared within an output row
(``group=row``), nothing is updated, and each block is measured dense on what the already pruned
blocks before it produce. Every row loses exactly ``int(in * sparsity)`` weights, so the achieved
sparsity is slightly below the asked one where in * sparsity is not whole; it counts zeros over the
linear layers of the decoder blocks. The released code (locuslab/wanda) is followed throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.weights.base import Layer, ScorePruner
from sparsebench.methods.weights.statistics import InputNorm, Statistic


@method(
    name="wanda",
    version=1,
    paper="Sun et al. 2023, arXiv 2306.11695",
    target="weights",
    phase="once",
    stage="select",
    uses=("calibration", "seed"),
    baseline="magnitude",
    taxonomy=Taxonomy(
        object="weights",
        granularity=("unstructured", "n:m"),
        when_mask_is_found="after_training",
        data_need="calibration",
    ),
)
@dataclass(frozen=True)
class Wanda(ScorePruner):
    """Removes the weights with the smallest |weight| x input norm, within each output row."""

    group: str = option(
        "row", "weights that are compared (layer, global: ablations)", choices=("row", "layer", "global")
    )
    norm: str = option("l2", "norm of the input feature (l1, linf: ablations)", choices=("l1", "l2", "linf"))
    use_variant: bool = option(False, "prune each row up to a share alpha of its summed score (the paper's appendix)")
    sequential: str = option(
        "block",
        "what calibration sees pruned: earlier blocks, earlier layers too, or nothing",
        choices=("block", "layer", "none"),
    )

    def statistic(self) -> Callable[[], Statistic] | None:
        return partial(InputNorm, self.norm)

    @property
    def order(self) -> str:
        return "none" if self.group == "global" else self.sequential

    def check(self, layers: Sequence[Layer]) -> None:
        super().check(layers)
        if self.use_variant and (self.n_of_m or self.group != "row"):
            raise UserError("method.wanda.use_variant=true: needs group=row and pattern=unstructured")

    def score(self, layer: Layer) -> Tensor:
        scale: Tensor = layer.statistic.scale
        return layer.weight.abs().float() * scale[None, :]

    def select(self, layer: Layer) -> Tensor:
        return keep_variant(self.score(layer), self.level_of(layer)) if self.use_variant else super().select(layer)

    def tolerance(self, layers: Sequence[Layer]) -> float:
        # the variant's bisection may stop when its bracket is below 0.001 without reaching the level
        return 0.01 if self.use_variant else super().tolerance(layers)


def keep_variant(scores: Tensor, sparsity: float) -> Tensor:
    """Rows lose their smallest scores while the running sum stays <= alpha * the row's sum; one
    alpha for the matrix by bisection: start 0.4 in [0, 0.8], stop within 0.001 of the sparsity or
    when the bracket is below 0.001."""
    if sparsity == 0:  # the bisection ends at a small alpha, not at 0
        return torch.ones_like(scores, dtype=torch.bool)
    ascending = torch.sort(scores, dim=1, stable=True).values
    running = ascending.cumsum(dim=1)
    total = scores.sum(dim=1, keepdim=True)

    def keep(alpha: float) -> Tensor:
        count = (running <= alpha * total).sum(dim=1, keepdim=True)
        threshold = ascending.gather(1, (count - 1).clamp(min=0))
        return (scores > threshold) | (count == 0)  # the reference fails at count 0: keep such a row

    low, high, alpha = 0.0, 0.8, 0.4
    mask = keep(alpha)
    while abs((current := float((~mask).float().mean())) - sparsity) > 0.001 and high - low >= 0.001:
        if current > sparsity:
            alpha, high = (alpha + low) / 2, alpha
        else:
            alpha, low = (alpha + high) / 2, alpha
        mask = keep(alpha)
    return mask
