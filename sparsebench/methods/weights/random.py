"""Random pruning: the floor under every mask-selection method (question 8 of Liu and Wang 2023).

    score S ~ U(0, 1), independent of the weights

The same layer-wise densities as any uniform pruner, no information. Sparsity counts zeros over the
linear layers of the decoder blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsebench.declare import Taxonomy, method
from sparsebench.methods.weights.base import Layer, ScorePruner


@method(
    name="random",
    version=1,
    paper="baseline; Liu and Wang 2023, arXiv 2302.02596",
    target="weights",
    phase="once",
    stage="select",
    uses=("seed",),
    taxonomy=Taxonomy(object="weights", granularity=("unstructured", "n:m"), when_mask_is_found="after_training"),
)
@dataclass(frozen=True)
class Random(ScorePruner):
    """Removes weights at random: the floor for every method that chooses."""

    def score(self, layer: Layer) -> Tensor:
        # drawn on the CPU, so that a seed gives the same mask on every device
        return torch.rand(layer.weight.shape, generator=layer.generator).to(layer.weight.device)
