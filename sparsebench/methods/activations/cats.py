"""CATS: contextually-aware thresholding of the gate (Lee et al. 2024, arXiv 2404.08763).

    a = act(gate(x)); a <- a * (|a| > t); y = down(a * up(x))

with one t per layer: the s-quantile of |a| over calibration data, read off a histogram of 999 bins as in the
released code (ScalingIntelligence/CATS): the LEFT edge of the first bin whose cumulated share exceeds s, over a
fixed range up to 1. Rounding down makes the realised sparsity slightly lower; where the quantile lies beyond the
range the threshold saturates, which the record warns of. ``threshold=exact`` takes the quantile itself. All
tokens are gated. Sparsity and achieved are of the gate's entries (rows of up, columns of down); the gate projection
and attention stay dense, so the whole model saves far less: see ``density_linear``.

``finetune_steps`` above 0 is the paper's tuned variant: thresholds first, then LoRA on q, v, gate, up and down under
them, W + alpha / r * (B A) * (W != 0), by the language-model loss on the calibration sequences; gradients pass
through kept entries alone, and what another method pruned stays so. Thresholds stay too, so that the realised
sparsity may move. Rank, alpha, batch and learning rate are the release's; its dropout of 0.1 on LoRA's input is left
out. The updates act with the gates, merged, and are saved with the thresholds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsebench.declare import Taxonomy, method, option
from sparsebench.methods.activations.base import FittedMethod, Frame, Progress
from sparsebench.methods.activations.gating import Acting, Gate, only
from sparsebench.methods.activations.sites import GatedBlock, Linear, gated_blocks, walk
from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights.adapters import MaskLoRA, masked_lora
from sparsebench.methods.weights.perp import finetune

TUNED = ("q", "v", "gate", "up", "down")  # what the release trains


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
    finetune_steps: int = option(0, "optimiser steps of LoRA under the thresholds (the paper: 1350); 0: none", low=0)
    lora_rank: int = option(64, "rank r of the updates", low=1, only="finetune_steps")
    lora_alpha: float = option(16.0, "updates are scaled by alpha / rank", above=0.0, only="finetune_steps")
    lr: float = option(1e-5, "peak learning rate of AdamW, falling to 0", above=0.0, only="finetune_steps")
    batch_size: int = option(1, "calibration sequences of one forward", low=1, only="finetune_steps")
    grad_accum: int = option(8, "forwards of one optimiser step", low=1, only="finetune_steps")

    def shapes(self, blocks: Sequence[GatedBlock]) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {f"{block.name}.threshold": () for block in blocks}
        if not self.finetune_steps:
            return found
        for linear in _tuned(blocks):
            rows, columns = linear.module.weight.shape
            found |= {f"{linear.name}.A": (self.lora_rank, columns), f"{linear.name}.B": (rows, self.lora_rank)}
        return found | {"finetune.loss": (2,)}

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

    def tune(
        self, model: nn.Module, windows: Tensor, tensors: Mapping[str, Tensor], around: Surroundings
    ) -> dict[str, Tensor]:
        """A (r, in) and B (out, r) of every tuned layer, and ``finetune.loss``: that of the first and the last tenth
        of the steps."""
        if not self.finetune_steps:
            return {}
        blocks = gated_blocks(model)
        draws = torch.Generator().manual_seed(around.seed)
        adapters = {}
        for linear in _tuned(blocks):
            weight = linear.module.weight
            adapters[f"{linear.name}.weight"] = MaskLoRA(weight, weight != 0, self.lora_rank, self.lora_alpha, draws)
        with Acting(self.sparse_tokens, watched=False).on(model, self.gates(blocks, tensors)):
            losses = finetune(
                adapters, around, windows, steps=self.finetune_steps, lr=self.lr, batch_size=self.batch_size,
                grad_accum=self.grad_accum, warmup=0.0,
            )  # fmt: skip
        tenth = max(1, len(losses) // 10)
        found = {"finetune.loss": torch.tensor([sum(losses[:tenth]), sum(losses[-tenth:])]) / tenth}
        for name, adapter in adapters.items():
            layer = name.removesuffix("weight")
            found |= {f"{layer}A": adapter.A.detach().cpu(), f"{layer}B": adapter.B.detach().cpu()}
        return found

    def tuned(self, model: nn.Module, tensors: Mapping[str, Tensor], frame: Frame) -> Frame:
        if not self.finetune_steps:
            return frame

        @contextmanager
        def updated() -> Iterator[None]:
            own = [(linear, linear.module.weight) for linear in _tuned(gated_blocks(model))]
            try:
                for linear, weight in own:
                    down, up = (tensors[f"{linear.name}.{key}"].to(weight.device) for key in ("A", "B"))
                    changed = masked_lora(weight, weight != 0, down, up, self.lora_alpha / self.lora_rank)
                    linear.module.weight = nn.Parameter(changed.to(weight.dtype), requires_grad=False)
                yield
            finally:
                for linear, weight in own:
                    linear.module.weight = weight

        return updated

    def columns(self, gates: Sequence[Gate], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        if not self.finetune_steps:
            return {}
        first, last = tensors["finetune.loss"].tolist()
        return {"finetune_loss_first": first, "finetune_loss_last": last}

    def gates(self, blocks: Sequence[GatedBlock], tensors: Mapping[str, Tensor]) -> list[Gate]:
        return [ThresholdGate(block, float(tensors[f"{block.name}.threshold"])) for block in blocks]

    def remarks(self, blocks: Sequence[GatedBlock], tensors: Mapping[str, Tensor]) -> list[str]:
        narrow = min(min(linear.module.weight.shape) for linear in _tuned(blocks))
        found = []
        if self.finetune_steps and self.lora_rank > narrow:
            found.append(f"lora_rank={self.lora_rank} is larger than a layer has ({narrow}): its update has full rank")
        full = [block.name for block in blocks if float(tensors[f"{block.name}.threshold"]) >= self.reach]
        if full and self.threshold == "histogram":
            which = f"{', '.join(full[:3])}{f' and {len(full) - 3} more' if len(full) > 3 else ''}"
            found.append(f"the threshold saturates at the histogram's range of {self.reach:g} in {which}")
        return found


def _tuned(blocks: Sequence[GatedBlock]) -> list[Linear]:
    """The layers that LoRA trains."""
    return [block.linears[kind] for block in blocks for kind in TUNED]
