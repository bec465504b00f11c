"""Quantiles of activations, as the releases of TEAL and WINA read them off histograms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distribution:
    """Sorted ``values`` (bins,) float32 with cumulative ``counts`` (bins,) float64."""

    values: Tensor
    counts: Tensor

    def quantile(self, q: float) -> float:
        """The value below which a share ``q`` lies: between neighbouring values by their counts."""
        wanted = q * float(self.counts[-1])
        index = int((self.counts < wanted).sum())
        if index == 0:
            return float(self.values[0])
        if index >= len(self.counts):
            return float(self.values[-1])
        before, after = float(self.counts[index - 1]), float(self.counts[index])
        low, high = float(self.values[index - 1]), float(self.values[index])
        return low + (wanted - before) / (after - before) * (high - low)


def histogram(values: Tensor, bins: int, outlier: float) -> Distribution:
    """TEAL: ``bins`` bins, of which the outer two hold a share ``outlier`` each, the rest equally wide.

    values: any shape. The returned values are the bins' centres."""
    flat = values.float().flatten().sort().values
    tail = int(outlier * len(flat))
    low, high = flat[tail], flat[max(0, len(flat) - max(1, tail))]
    edges = torch.cat([flat[:1], torch.linspace(float(low), float(high), bins - 1, device=flat.device), flat[-1:]])
    # right-open bins, the last one closed, as torch.histogram has them; counted on the sorted values
    below = torch.searchsorted(flat, edges[1:-1].contiguous(), side="left")
    counts = torch.cat([below, below.new_tensor([len(flat)])]).double()
    return Distribution((edges[:-1] + edges[1:]) / 2, counts)


def exact(values: Tensor) -> Distribution:
    """WINA: the distinct values in half precision, each with its count. values: any shape, not negative."""
    half = values.float().clamp(max=torch.finfo(torch.float16).max).to(torch.float16)  # outliers would overflow
    distinct, counts = half.flatten().unique(return_counts=True)
    return Distribution(distinct.float(), counts.cumsum(0).double())
