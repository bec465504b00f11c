"""A checkpoint that is already sparse: its zeros and patterns are counted, nothing is changed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsebench.declare import Taxonomy, method
from sparsebench.methods.weights.base import Layer, WeightMethod


@method(
    name="given",
    version=1,
    paper="any",
    target="weights",
    phase="once",
    stage="select",
    taxonomy=Taxonomy(
        object="weights",
        granularity=("unstructured", "n:m", "none"),
        when_mask_is_found="after_training",
        start="na",
        allocation="na",
    ),
)
@dataclass(frozen=True)
class Given(WeightMethod):
    """Evaluates an already pruned checkpoint as it is."""

    def select(self, layer: Layer) -> Tensor:
        return layer.weight != 0
