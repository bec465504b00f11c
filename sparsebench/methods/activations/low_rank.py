"""R-Sparse's layer: kept channels through the whole weight, the others through its truncated SVD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsebench.methods.activations.gating import Acting, Gate, only
from sparsebench.methods.activations.sites import GatedBlock, Linear


@dataclass(frozen=True)
class Factors:
    """W = left right^T: ``left`` (out, full rank) with the singular values in it, ``right`` (in, full rank);
    ``scale`` (in,): the norms of W's columns. In the dtype they are used in, rounded to the one they are stored in."""

    left: Tensor
    right: Tensor
    scale: Tensor


def factors(weight: Tensor, store: torch.dtype) -> Factors:
    """The SVD of a weight (out, in) in float64, rounded to ``store``."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    scale = (vh.T * s).norm(dim=1)
    u, s, v, scale = (one.to(store).to(weight.dtype) for one in (u, s, vh.T, scale))
    return Factors(u * s, v.contiguous(), scale)


@dataclass(frozen=True)
class Budget:
    """How one layer spends its share of weights: ``channels`` of the input on average, ``rank`` for the rest."""

    channels: int
    rank: int
    capped: bool  # the formula gave a rank larger than the layer has


def budget(linear: Linear, level: float, alpha: float, *, compat: bool, least: int) -> Budget:
    """c = max(int(in (1 - s) alpha), 1) channels and the rank that the other weights buy, at least ``least``; alpha
    = 1 buys none. ``compat``: the release counts k and v as if they were as large as q."""
    outputs, inputs = linear.module.weight.shape
    if compat and linear.kind in ("k", "v"):
        outputs = inputs
    channels = max(int(inputs * (1 - level) * alpha), 1)
    if alpha == 1:
        return Budget(channels, 0, False)
    rank = max(int((inputs * outputs * (1 - level) - channels * outputs) / (inputs + outputs)), least)
    most = min(linear.module.weight.shape)
    return Budget(channels, min(rank, most), rank > most)


class LowRankGate(Gate):
    """y = W (x m) + U_r S_r V_r^T (x (1 - m)), m = score > threshold; no m for ``threshold=None`` (low rank alone).

    The score is |x|, times ``scale`` where one is given."""

    def __init__(
        self, block: GatedBlock, kind: str, threshold: float | None, scale: Tensor | None, left: Tensor, right: Tensor
    ) -> None:
        super().__init__(block, kind)
        self.threshold, self.scale, self.left, self.right = threshold, scale, left, right
        self.dropped: list[Tensor] = []

    @property
    def rank(self) -> int:
        return self.right.shape[1]

    @property
    def extra(self) -> int:
        return self.rank * (self.left.shape[0] + self.right.shape[0])

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        score = x.abs() if self.scale is None else x.abs() * self.scale
        if self.threshold is None:
            keep = torch.zeros_like(x, dtype=torch.bool)
        else:
            keep = score > torch.tensor(self.threshold, dtype=score.dtype)
        self.dropped[:] = [only(~keep, x)]
        return only(keep, x), keep

    def install(self, acting: Acting) -> list[Any]:
        def complete(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not self.dropped:
                return output
            rest = self.dropped.pop()
            added = (rest @ self.right) @ self.left.T
            first = output.shape[1] - rest.shape[1]
            return output + added if first == 0 else torch.cat([output[:, :first], output[:, first:] + added], dim=1)

        handles = super().install(acting)
        return [*handles, self.module.register_forward_hook(complete)] if self.rank else handles
