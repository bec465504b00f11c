"""Pruning as the papers' sheets write it down, layer by layer: what ``bench prune`` compares with.

Every linear layer has its own statistic, Hessian and factor; scores are sorted whole; SparseGPT updates column by
column. Rows go through a block in the groups that the project's own walk uses, so that statistics add up in the same
order and masks can be compared entry by entry; nothing else is taken from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsebench.models.blocks import Blocks, capture

BLOCKSIZE, PERCDAMP = 128, 0.01


@dataclass(frozen=True)
class Level:
    """A sparsity, or n kept of m."""

    sparsity: float = 0.5
    n_of_m: tuple[int, int] | None = None

    @property
    def pattern(self) -> str | None:
        """n:m, as methods take it; None when unstructured."""
        return f"{self.n_of_m[0]}:{self.n_of_m[1]}" if self.n_of_m else None


@torch.no_grad()
def prune(model: PreTrainedModel, method: str, level: Level, windows: Tensor, dense: bool = False) -> None:
    """Prunes the model in place. windows: (sequences, tokens) int64; ``dense``: calibration sees the dense model."""
    if method == "magnitude":
        for block in Blocks(model).modules:
            for _, linear in _linears(block):
                linear.weight.mul_(magnitude(linear.weight, level))
        return
    make, solve = (_Norm, wanda) if method == "wanda" else (_Hessian, sparsegpt)
    for block, taken in _walk(model, windows, make, dense):
        for name, linear in _linears(block):
            solve(linear, taken[name], level)


def _linears(block: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, one) for name, one in block.named_modules() if isinstance(one, nn.Linear)]


def _walk(
    model: PreTrainedModel, windows: Tensor, make: Callable[[int], Any], dense: bool
) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Each block with what was taken of its layers' inputs; it is pruned before the next one is asked for."""
    blocks = Blocks(model)
    inputs = capture(blocks, windows)
    for index, block in enumerate(blocks.modules):
        taken = {name: make(linear.in_features) for name, linear in _linears(block)}
        hooks = [linear.register_forward_pre_hook(partial(_feed, taken[name])) for name, linear in _linears(block)]
        outputs = inputs.run(index, block)
        for hook in hooks:
            hook.remove()
        yield block, taken
        if index + 1 < len(blocks):
            inputs.hidden = outputs if dense else inputs.run(index, block)


def _feed(statistic: Any, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    statistic.add(args[0])


class _Norm:
    """Mean over sequences of the sum over tokens of x^2: (in,)."""

    def __init__(self, features: int) -> None:
        self.value, self.count = torch.zeros(features), 0

    def add(self, inputs: Tensor) -> None:
        x = inputs.reshape(-1, inputs.shape[-1]).t().float()
        self.value *= self.count / (self.count + len(inputs))
        self.count += len(inputs)
        self.value += torch.norm(x, p=2, dim=1) ** 2 / self.count


class _Hessian:
    """(2 / sequences) sum x x^T: (in, in)."""

    def __init__(self, features: int) -> None:
        self.value, self.count = torch.zeros(features, features), 0

    def add(self, inputs: Tensor) -> None:
        x = inputs.reshape(-1, inputs.shape[-1]).t().float()
        self.value *= self.count / (self.count + len(inputs))
        self.count += len(inputs)
        x = x * (2 / self.count) ** 0.5
        self.value += x @ x.t()

    def factor(self) -> Tensor:
        """The upper Cholesky factor of the damped inverse. Inputs must not be dead."""
        damped = self.value + PERCDAMP * self.value.diag().mean() * torch.eye(len(self.value))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return upper


def magnitude(weight: Tensor, level: Level) -> Tensor:
    """The mask, True = kept: (out, in) bool."""
    score = weight.abs().float()
    if level.n_of_m:
        return _n_of_m(score, *level.n_of_m)
    mask: Tensor = score > torch.sort(score.flatten()).values[int(score.numel() * level.sparsity)]
    return mask


def wanda(linear: nn.Linear, norm: _Norm, level: Level) -> None:
    score = linear.weight.abs().float() * norm.value.sqrt()
    if level.n_of_m:
        mask = _n_of_m(score, *level.n_of_m)
    else:
        pruned = torch.sort(score, dim=1, stable=True).indices[:, : int(score.shape[1] * level.sparsity)]
        mask = torch.ones_like(score, dtype=torch.bool).scatter_(1, pruned, False)
    linear.weight[~mask] = 0


def _n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    mask = torch.ones_like(score, dtype=torch.bool)
    for start in range(0, score.shape[1] - m + 1, m):
        order = torch.sort(score[:, start : start + m], dim=1, stable=True).indices[:, : m - n]
        mask.scatter_(1, start + order, False)
    return mask


def sparsegpt(linear: nn.Linear, hessian: _Hessian, level: Level) -> None:
    weight, upper = linear.weight.float().clone(), hessian.factor()
    columns = weight.shape[1]
    for start in range(0, columns, BLOCKSIZE):
        end = min(start + BLOCKSIZE, columns)
        block, inner = weight[:, start:end].clone(), upper[start:end, start:end]
        diagonal, errors = inner.diag(), torch.zeros_like(block)
        pruned = torch.zeros_like(block, dtype=torch.bool)
        if level.n_of_m is None:
            score = block**2 / diagonal**2
            pruned = score <= torch.sort(score.flatten()).values[int(score.numel() * level.sparsity)]
        for j in range(end - start):
            if level.n_of_m and j % level.n_of_m[1] == 0:
                group = slice(j, j + level.n_of_m[1])
                pruned[:, group] = ~_n_of_m(block[:, group] ** 2 / diagonal[group] ** 2, *level.n_of_m)
            column = block[:, j].clone()
            kept = column.masked_fill(pruned[:, j], 0)
            errors[:, j] = (column - kept) / diagonal[j]
            block[:, j:] -= errors[:, j : j + 1] @ inner[j : j + 1, j:]
            block[:, j] = kept
        weight[:, start:end] = block
        weight[:, end:] -= errors @ upper[start:end, end:]
    linear.weight.copy_(weight)
