"""No sparsity: the reference that every method is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from sparsebench.declare import Taxonomy, method
from sparsebench.methods.weights.base import Layer, WeightMethod


@method(
    name="dense",
    version=1,
    paper="reference",
    target="weights",
    phase="once",
    stage="select",
    taxonomy=Taxonomy(
        object="none",
        granularity=("none",),
        when_mask_is_found="na",
        start="na",
        mask_dynamics="na",
        allocation="na",
        benefit_realised_on=("none",),
        kernel_required="none",
        inference_cost_claim="none",
    ),
)
@dataclass(frozen=True)
class Dense(WeightMethod):
    """The model as it is: the reference of every comparison."""

    def asked(self, layer: Layer) -> float | None:
        return 0.0
