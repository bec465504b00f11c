"""CETT thresholds and PPL-p% sparsity of a gated MLP's neurons (Luo et al. 2024, arXiv 2411.02335, "Sparsing Law").

Neuron i of a token puts ``n_i = W_down[:,i] h_i`` out, ``h = act(gate) * up``; it is weak where |h_i| c_i, with
c_i = ||W_down[:,i]||_2, does not exceed its layer's threshold t, chosen by the mean relative error of the output:

    cett(t) = mean over tokens of || W_down (h * [|h| c <= t]) ||_2 / || W_down h ||_2

A model has one cett for all layers, found by bisection: PPL-p% is the one at which the perplexity on some text is
1 + p times the dense one. Thresholds come from the activations of the dense model; all layers are thresholded at
once when the perplexity is measured. At inference a neuron is dropped iff |h_i| < t / c_i, strictly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebench.methods.activations.gating import Acting, Gate, only
from sparsebench.methods.activations.sites import GatedBlock, gated_blocks

_TOKENS_PER_CALL = 2048  # rows are grouped to about this many tokens; fixed, so that results never depend on memory
_SUBSAMPLE = 65536  # the upper end of the grid is a quantile of about so many magnitudes


@dataclass(frozen=True)
class Search:
    """How thresholds are searched. ``tol``: width of the last interval of the common cett; ``grid``: thresholds that
    a layer chooses from, between its smallest magnitude and their ``hi_quantile``."""

    tol: float = 1e-6
    grid: int = 65536
    hi_quantile: float = 0.99


def bisect(measure: Callable[[float], float], target: float, tol: float) -> float:
    """Where ``measure``, rising over [0, 1], reaches ``target``: the middle of the last interval, at most ``tol``
    wide. On little data it is a step function, and the answer stands at a jump."""
    low, high = 0.0, 1.0
    while high - low > tol:
        middle = (low + high) / 2
        low, high = (middle, high) if measure(middle) < target else (low, middle)
    return (low + high) / 2


def column_norms(down: Tensor) -> Tensor:
    """c of a down projection. down: (out, neurons) -> (neurons,) float32."""
    found: Tensor = down.detach().float().norm(dim=0)
    return found


def cut(threshold: float, norms: Tensor) -> Tensor:
    """t / c of each neuron, below which |h| is dropped: (neurons,). Infinite, so always dropped, where c = 0."""
    return torch.where(norms > 0, threshold / norms, torch.full_like(norms, math.inf))


def relative_error(dropped: Tensor, full: Tensor) -> Tensor:
    """|| W_down dropped || / || W_down h || of each token from the two norms, both (tokens,); 0 where the whole
    output is zero and nothing can be lost."""
    return torch.where(full > 0, dropped / full.clamp(min=torch.finfo(full.dtype).tiny), torch.zeros_like(full))


@dataclass
class Neurons:
    """One layer's activations on some text. ``hidden``: h of the dense model, (tokens, neurons); ``down``: W_down,
    (out, neurons)."""

    hidden: Tensor
    down: Tensor
    search: Search = Search()
    known: dict[int, float] = field(default_factory=dict)  # cett of grid points: neighbouring targets share them

    def __post_init__(self) -> None:
        self.norms = column_norms(self.down)
        self.full = self._norm(self.hidden)

    @cached_property
    def grid(self) -> Tensor:
        """The thresholds to choose from: (grid,) float32, rising."""
        magnitude = self.magnitude.flatten()
        some = magnitude[:: max(len(magnitude) // _SUBSAMPLE, 1)]
        high = torch.quantile(some, self.search.hi_quantile)
        return torch.linspace(float(magnitude.min()), float(high), self.search.grid)

    @property
    def magnitude(self) -> Tensor:
        """|h| c: (tokens, neurons) float32."""
        return self.hidden.float().abs() * self.norms

    def cett(self, threshold: float) -> float:
        """cett(t): mean over tokens of the relative error (not the error of means)."""
        weak = only(self.magnitude <= threshold, self.hidden)
        return float(relative_error(self._norm(weak), self.full).mean())

    def threshold(self, target: float) -> float:
        """The largest threshold of the grid whose cett does not exceed ``target``; the smallest one if all do."""
        left, right = 0, len(self.grid) - 1
        while left < right:
            middle = (left + right) // 2
            if middle not in self.known:
                self.known[middle] = self.cett(float(self.grid[middle]))
            left, right = (left, middle) if self.known[middle] > target else (middle + 1, right)
        return float(self.grid[max(left - 1, 0)])  # left = 0 would wrap around to the largest threshold

    def _norm(self, hidden: Tensor) -> Tensor:
        found: Tensor = F.linear(hidden, self.down).float().norm(dim=-1)
        return found


class WeakNeurons(Gate):
    """Drops the neurons with |h| < threshold / c. What that loses of each token's output is summed in ``lost``.

    |h| is known once gate and up have been computed, so that only columns of down are spared."""

    def __init__(self, block: GatedBlock, threshold: float, *, watch: bool = False) -> None:
        super().__init__(block, "down")
        self.cut = cut(threshold, column_norms(block.linears["down"].module.weight))
        self.watch = watch
        self.lost, self.tokens = 0.0, 0

    def install(self, acting: Acting) -> list[Any]:
        self.lost, self.tokens = 0.0, 0
        return super().install(acting)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keep = ~(x.abs().float() < self.cut)
        if self.watch and self.watched:
            weight = self.block.linears["down"].module.weight
            weak, full = (F.linear(one, weight).float().norm(dim=-1) for one in (only(~keep, x), x))
            self.lost += float(relative_error(weak, full).sum())
            self.tokens += full.numel()
        return only(keep, x), keep


@dataclass(frozen=True)
class Reached:
    """``ratio``: perplexity over the dense one; ``activation``: share of the neurons that are kept, by layer."""

    ratio: float
    activation: list[float]

    @property
    def mean(self) -> float:
        """The activation ratio of the model: the mean over its layers."""
        return sum(self.activation) / len(self.activation)


class Probe:
    """A model on text, (sequences, tokens) int64: its dense activations and loss, and what gates make of them."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, windows: Tensor, search: Search | None = None) -> None:
        self.model, self.windows = model, windows
        self.blocks = gated_blocks(model)
        seen: list[list[Tensor]] = [[] for _ in self.blocks]
        downs = [block.linears["down"].module for block in self.blocks]
        handles = [
            down.register_forward_pre_hook(_keeping(into)) for down, into in zip(downs, seen, strict=True)
        ]  # fmt: skip
        try:
            self.loss = self._loss()
        finally:
            for handle in handles:
                handle.remove()
        self.layers = [
            Neurons(torch.cat(hidden).flatten(0, 1), down.weight.detach(), search or Search())
            for hidden, down in zip(seen, downs, strict=True)
        ]

    def thresholds(self, cett: float) -> list[float]:
        """t of each layer, from the dense activations."""
        return [layer.threshold(cett) for layer in self.layers]

    def gates(self, cett: float) -> list[Gate]:
        """All layers thresholded at one cett."""
        return [WeakNeurons(block, t) for block, t in zip(self.blocks, self.thresholds(cett), strict=True)]

    @torch.no_grad()
    def run(self, gates: Sequence[Gate]) -> Reached:
        """What the text costs, and the neurons it uses, while the gates act on every token."""
        acting = Acting(lambda tokens: tokens)
        with acting.on(self.model, gates):
            loss = self._loss()
        tallies = [acting.tallies[block.linears["down"].name] for block in self.blocks]
        return Reached(math.exp(loss - self.loss), [tally.kept / tally.entries for tally in tallies])

    def _loss(self) -> float:
        device = next(self.model.parameters()).device
        rows = max(1, _TOKENS_PER_CALL // self.windows.shape[1])
        total = 0.0
        for group in self.windows.split(rows):
            ids = group.to(device)
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
            total += float(F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"))
        return total / (self.windows.shape[0] * (self.windows.shape[1] - 1))


def _keeping(into: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        into.append(args[0].detach())

    return hook


def common_cett(probes: Sequence[Probe], p: float, tol: float) -> float:
    """The one cett of PPL-p% sparsity for several models of one run (their last checkpoints, for stability): the
    mean of their perplexity ratios is 1 + p."""
    return bisect(lambda cett: sum(one.run(one.gates(cett)).ratio for one in probes) / len(probes), 1 + p, tol)
