"""CATS: contextually-aware thresholding of the gate (Lee et al. 2024, arXiv 2404.08763).

    a = act(gate(x)); a <- a * (|a| > t); y = down(a * up(x))

with one t per layer: the s-quantile of |a| over calibration data, read off a histogram of 999 bins as in the
released code (ScalingIntelligence/CATS): the LEFT edge of the first bin whose cumulated share exceeds s, over a
fixed range up to 1. Rounding down makes the realised sparsity slightly lower; where the quantile lies beyond the
range the threshold saturates, which the record warns of. ``threshold=exact`` takes the quantile itself. All
tokens are gated. Sparsity and achieved are of the gate's entries (rows of up, columns of down); the gate projection
and attention stay dense, so the whole model saves far less: see ``density_linear``. The fine-tuned variants
of the paper are not part of this method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsebench.declare import Taxonomy, method, option
from sparsebench.methods.activations.base import FittedMethod, Progress
from sparsebench.methods.activations.gating import Gate, only
from sparsebench.methods.activations.sites import GatedBlock, walk


class ThresholdGate(Gate):
    """Keeps |a| > threshold of the gate's activations."""

    def __init__(self, block: GatedBlock, threshold: float) -> None:
        super().__init__(block, None)
        self.threshold = threshold

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keep = x.abs() > torch.tensor(self.threshold, dtype=x.dtype)
        return only(keep, x), keep


def bin_edges(bins: int, reach: float) -> Tensor:
    """-inf, ``bins - 1`` edges from -reach to reach, inf: (bins + 1,) float32."""
    ends = torch.tensor([-torch.inf]), torch.tensor([torch.inf])
    return torch.cat([ends[0], torch.linspace(-reach, reach, bins - 1), ends[1]])


def count_bins(values: Tensor, edges: Tensor) -> Tensor:
    """Counts of |values| in right-open bins, the last one closed: (bins,) float64."""
    places = torch.bucketize(values.abs().float().flatten(), edges, right=True) - 1
    return torch.bincount(places.clamp(max=len(edges) - 2), minlength=len(edges) - 1).double()


def left_edge(counts: Tensor, edges: Tensor, level: float) -> float:
    """The left edge of the first bin at which the cumulated share exceeds ``level``."""
    shares = (counts / counts.sum()).float().cumsum(0)
    # right-sided: at a share of exactly ``level`` the next bin is meant
    place = int(torch.searchsorted(shares, torch.tensor(level), right=True))
    return float(edges[min(place, len(edges) - 2)])


@method(
    name="cats",
    version=1,
    paper="Lee et al. 2024, arXiv 2404.08763",
    target="activations",
    phase="prefill",
    uses=("calibration", "seed"),
    baseline="topk",
    taxonomy=Taxonomy(
        object="activations",
        granularity=("unstructured", "row", "column"),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        data_need="calibration",
        benefit_realised_on=("memory", "flops"),
        kernel_required="gathered gated MLP",
    ),
)
@dataclass(frozen=True)
class Cats(FittedMethod):
    """Drops small activations of the MLP's gate by one threshold per layer."""

    threshold: str = option(
        "histogram", "the left edge of a histogram's bin, or the exact quantile", choices=("histogram", "exact")
    )
    bins: int = option(999, "bins of the histogram", low=8, high=1_000_000)
    reach: float = option(1.0, "range of the histogram; what lies beyond falls into one bin", above=0.0)

    def shapes(self, blocks: Sequence[GatedBlock]) -> dict[str, tuple[int, ...]]:
        return {f"{block.name}.threshold": () for block in blocks}

    def fit(self, model: nn.Module, windows: Tensor, seed: int, progress: Progress) -> dict[str, Tensor]:
        found = {}
        edges = bin_edges(self.bins, self.reach)
        for seen in walk(model, windows, ["gate_out"]):
            values = seen.values["gate_out"].abs()
            if self.level == 0:
                threshold = -1.0
            elif self.threshold == "exact":
                ascending = values.float().flatten().sort().values
                threshold = float(ascending[max(0, int(len(ascending) * self.level) - 1)])
            else:
                threshold = left_edge(count_bins(values, edges.to(values.device)).cpu(), edges, self.level)
            found[f"{seen.block.name}.threshold"] = torch.tensor(threshold)
            progress(seen.block.index + 1, getattr(model.config, "num_hidden_layers", 0))
        return found

    def gates(self, blocks: Sequence[GatedBlock], tensors: Mapping[str, Tensor]) -> list[Gate]:
        return [ThresholdGate(block, float(tensors[f"{block.name}.threshold"])) for block in blocks]

    def remarks(self, blocks: Sequence[GatedBlock], tensors: Mapping[str, Tensor]) -> list[str]:
        if self.threshold == "exact":
            return []
        full = [block.name for block in blocks if float(tensors[f"{block.name}.threshold"]) >= self.reach]
        if not full:
            return []
        which = f"{', '.join(full[:3])}{f' and {len(full) - 3} more' if len(full) > 3 else ''}"
        return [f"the threshold saturates at the histogram's range of {self.reach:g} in {which}"]
