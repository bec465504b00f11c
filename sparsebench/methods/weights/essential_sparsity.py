"""Essential sparsity: one-shot magnitude pruning of a pre-trained model (Jaiswal et al. 2023, arXiv 2306.03805).

    variant=global       |w| of all matrices in one ranking, exactly round(s * N) smallest go
    variant=layer        the same within each matrix
    variant=random       exactly round(s * N) positions drawn uniformly over all matrices
    variant=erk_random   each weight kept with the ERK density of its layer: s is met in expectation only
    pattern=n:m          the m - n smallest |w| of every m inputs

The level at which quality starts to fall sharply is the essential sparsity. Sparsity counts zeros over
the linear layers of the decoder blocks; rounding is half to even, ties go to the lower index. The
released pruners (VITA-Group/essential_sparsity) are followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.weights import masks
from sparsebench.methods.weights.base import Layer, Pruner


@method(
    name="essential_sparsity",
    version=1,
    paper="Jaiswal et al. 2023, arXiv 2306.03805",
    target="weights",
    phase="once",
    stage="select",
    uses=("seed",),
    baseline="random",
    taxonomy=Taxonomy(
        object="weights",
        granularity=("unstructured", "n:m"),
        when_mask_is_found="after_training",
        allocation="global_threshold",
    ),
)
@dataclass(frozen=True)
class EssentialSparsity(Pruner):
    """Removes the smallest weights of the whole model at once, to find where quality starts to fall."""

    variant: str = option(
        "global",
        "what goes: the smallest of all or of each matrix, or the paper's random masks",
        choices=("global", "layer", "random", "erk_random"),
    )

    @property
    def order(self) -> str:
        return "none"

    @property
    def blockwise(self) -> bool:
        return bool(self.n_of_m) or self.variant in ("layer", "erk_random")

    @property
    def rule(self) -> str:
        return "erk" if self.variant == "erk_random" and self.allocation == "uniform" else self.allocation

    def check(self, layers: Sequence[Layer]) -> None:
        if self.n_of_m and self.variant in ("random", "erk_random"):
            raise UserError(f"method.essential_sparsity.variant={self.variant}: needs pattern=unstructured")
        if self.allocation != "uniform" and self.variant in ("global", "random"):
            raise UserError(f"allocation={self.allocation}: variant={self.variant} finds each layer's level itself")
        super().check(layers)

    def score(self, layer: Layer) -> Tensor:
        """What is ranked: (out, in) float32."""
        if self.variant in ("random", "erk_random"):
            # drawn on the CPU, so that a seed gives the same mask on every device
            return torch.rand(layer.weight.shape, generator=layer.generator).to(layer.weight.device)
        return layer.weight.abs().float()

    def select_all(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        if self.n_of_m or self.variant in ("layer", "erk_random"):
            return {}
        return masks.keep_global({layer.name: self.score(layer) for layer in layers}, self.level)

    def select(self, layer: Layer) -> Tensor:
        scores = self.score(layer)
        if self.n_of_m:
            return masks.keep_n_of_m(scores, *self.n_of_m)
        if self.variant == "erk_random":
            return scores >= self.level_of(layer)
        return masks.keep_count(scores, round(scores.numel() * self.level_of(layer)))

    def tolerance(self, layers: Sequence[Layer]) -> float:
        total = sum(layer.weight.numel() for layer in layers)
        if self.n_of_m:
            return super().tolerance(layers)
        if self.variant == "erk_random":  # five standard deviations of the drawn count
            levels = [(self.level_of(layer), layer.weight.numel()) for layer in layers]
            return 1e-9 + 5 * sqrt(sum(level * (1 - level) * size for level, size in levels)) / total
        roundings = 1 if self.variant in ("global", "random") else len(layers)
        return 1e-9 + roundings / 2 / total
