"""Methods that score the channels of a linear layer's input and keep the largest: TEAL and WINA.

A method says its score (a scale on |x|) and how it reads thresholds off calibration data; masks by threshold or
by count, and the uniform or greedy allocation of the block's sparsity over its projections, are shared.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsebench.declare import option
from sparsebench.methods.activations.allocation import closest, greedy, relative_weights
from sparsebench.methods.activations.base import FittedMethod, Progress, kinds_of
from sparsebench.methods.activations.gating import Gate, only, top_k
from sparsebench.methods.activations.quantiles import Distribution
from sparsebench.methods.activations.sites import SITE_OF, BlockSeen, GatedBlock, Linear, walk


class ScoreGate(Gate):
    """Keeps |x_j| * scale_j > threshold, or the ``count`` largest of each token where one is given."""

    def __init__(
        self, block: GatedBlock, kind: str, scale: Tensor | None, threshold: float, count: int | None = None
    ) -> None:
        super().__init__(block, kind)
        self.scale, self.threshold, self.count = scale, threshold, count

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        score = x.abs() if self.scale is None else x.abs() * self.scale
        if self.count is None:
            keep = score > torch.tensor(self.threshold, dtype=score.dtype)
        else:
            keep = top_k(score, self.count)
        return only(keep, x), keep


@dataclass(frozen=True)
class ScoredInputs(FittedMethod):
    """Base of methods that keep the input channels with the largest score."""

    mask_by: str = option(
        "threshold", "keep what exceeds a fitted threshold, or the largest of each token", choices=("threshold", "topk")
    )
    allocation: str = option(
        "uniform", "one level for all projections, or greedily within each block", choices=("uniform", "greedy")
    )
    base_step: float = option(
        0.05, "sparsity that a projection of q's size gains in a step", above=0.0, high=1.0, only="allocation=greedy"
    )
    last_fraction: float = option(
        0.25, "share of the positions, at the end, whose error counts", above=0.0, high=1.0, only="allocation=greedy"
    )
    projections: tuple[str, ...] = option(
        ("q", "k", "v", "o", "gate", "up", "down"), "the linear layers whose input is gated"
    )

    def scale(self, linear: Linear) -> Tensor | None:
        """What |x| is multiplied with: (in,), or None."""
        return None

    @abstractmethod
    def distributions(self, seen: BlockSeen, kinds: Sequence[str]) -> dict[str, Distribution]:
        """By short name of a projection, of what thresholds are read off."""

    @abstractmethod
    def threshold(self, distribution: Distribution, level: float) -> float:
        """The threshold that drops a share ``level``."""

    def weights(self, block: GatedBlock) -> dict[str, float]:
        """w_p of the greedy allocation, by short name."""
        return relative_weights(block, self.kinds)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.projections)

    def check_model(self, model: nn.Module, blocks: Sequence[GatedBlock]) -> None:
        kinds_of("projections", self.projections, tuple(SITE_OF))

    def shapes(self, blocks: Sequence[GatedBlock]) -> dict[str, tuple[int, ...]]:
        names = [block.linears[kind].name for block in blocks for kind in self.kinds]
        found: dict[str, tuple[int, ...]] = {f"{name}.{what}": () for name in names for what in ("level", "threshold")}
        return found | ({f"{block.name}.error": (2,) for block in blocks} if self.allocation == "greedy" else {})

    def fit(self, model: nn.Module, windows: Tensor, seed: int, progress: Progress) -> dict[str, Tensor]:
        """Level and threshold of every projection; with the greedy allocation also ``<block>.error``: that of the
        block's output on the calibration data, and what one level for all projections would give."""
        found: dict[str, Tensor] = {}
        sites = list(dict.fromkeys(SITE_OF[kind] for kind in self.kinds))
        for seen in walk(model, windows, sites):
            known = self.distributions(seen, self.kinds)
            levels = dict.fromkeys(self.kinds, self.level)
            if self.allocation == "greedy" and self.level > 0:
                levels, errors = self._allocate(seen, known)
                found[f"{seen.block.name}.error"] = errors
            for kind, level in levels.items():
                name = seen.block.linears[kind].name
                found[f"{name}.level"] = torch.tensor(level, dtype=torch.float64)
                found[f"{name}.threshold"] = torch.tensor(self._threshold(known[kind], level))
            progress(seen.block.index + 1, getattr(model.config, "num_hidden_layers", 0))
        return found

    def _threshold(self, distribution: Distribution, level: float) -> float:
        return self.threshold(distribution, level) if level > 0 else 0.0

    def _allocate(self, seen: BlockSeen, known: Mapping[str, Distribution]) -> tuple[dict[str, float], Tensor]:
        scales = {kind: self.scale(seen.block.linears[kind]) for kind in self.kinds}

        def make(kind: str, level: float) -> Gate:
            return ScoreGate(seen.block, kind, scales[kind], self._threshold(known[kind], level))

        rows = greedy(
            seen, make, self.weights(seen.block), self.sparse_tokens,
            base_step=self.base_step, target=self.level, last_fraction=self.last_fraction,
        )  # fmt: skip
        best = closest(rows, self.level)
        return best.levels, torch.tensor([best.error, best.uniform_error])

    def gates(self, blocks: Sequence[GatedBlock], tensors: Mapping[str, Tensor]) -> list[Gate]:
        found: list[Gate] = []
        for block in blocks:
            for kind in self.kinds:
                linear = block.linears[kind]
                threshold = float(tensors[f"{linear.name}.threshold"])
                count = None
                if self.mask_by == "topk":
                    # truncated as in the reference, float errors included
                    count = max(0, int(linear.module.in_features * (1 - float(tensors[f"{linear.name}.level"]))))
                found.append(ScoreGate(block, kind, self.scale(linear), threshold, count))
        return found

    def expected(self, blocks: Sequence[GatedBlock], tensors: Mapping[str, Tensor]) -> dict[str, float]:
        names = [block.linears[kind].name for block in blocks for kind in self.kinds]
        return {name: min(1.0, float(tensors[f"{name}.level"])) for name in names}

    def tolerance(self, blocks: Sequence[GatedBlock]) -> float:
        if self.mask_by == "threshold":
            return 0.03
        step = self.base_step / sum(self.weights(blocks[0]).values()) if self.allocation == "greedy" else 0.0
        return step + max(1 / block.linears[kind].module.in_features for block in blocks for kind in self.kinds)

    def columns(self, gates: Sequence[Gate], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        errors = [value for name, value in tensors.items() if name.endswith(".error")]
        if not errors:
            return {}
        mean = torch.stack(errors).mean(dim=0).tolist()
        return {"allocation_error": mean[0], "allocation_error_uniform": mean[1]}
