"""Magnitude pruning: the weights with the smallest absolute value go (Han et al. 2015).

    score S = |W|

The baseline that every pruning method has to beat: no data, no gradients, no update. ``group=layer``
is the published baseline of the LLM papers (one threshold per matrix, non-strict: ties at the
threshold all go, so slightly more than asked); ``row`` compares within output rows, ``global``
over all layers. Sparsity counts zeros over the linear layers of the decoder blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsebench.declare import Taxonomy, method, option
from sparsebench.methods.weights import masks
from sparsebench.methods.weights.base import Layer, ScorePruner


@method(
    name="magnitude",
    version=1,
    paper="Han et al. 2015, arXiv 1506.02626; layer-wise LLM form as in Sun et al. 2023, arXiv 2306.11695",
    target="weights",
    phase="once",
    stage="select",
    baseline="random",
    taxonomy=Taxonomy(object="weights", granularity=("unstructured", "n:m"), when_mask_is_found="after_training"),
)
@dataclass(frozen=True)
class Magnitude(ScorePruner):
    """Removes the weights with the smallest absolute value."""

    exact_count: bool = option(
        False, "prune exactly int(numel * sparsity) instead of all ties at the threshold", only="group=layer"
    )

    def score(self, layer: Layer) -> Tensor:
        return layer.weight.abs().float()

    def tolerance(self, layers: Sequence[Layer]) -> float:
        # all ties at the threshold go, and in bfloat16 many magnitudes coincide
        published = self.group == "layer" and not self.n_of_m and not self.exact_count
        return 0.01 if published else super().tolerance(layers)

    def keep_layer(self, scores: Tensor, level: float) -> Tensor:
        if self.exact_count:
            return super().keep_layer(scores, level)
        return masks.keep_above_threshold(scores, level)
