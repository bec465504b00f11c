"""Adapters: small trainable stand-ins for frozen tensors, and how to train and merge them.

A model is never taken apart for them: ``Adapted`` calls it with the adapted tensors in the place of
its own (``torch.func.functional_call``), so that when training ends there is nothing to remove. With W
the pruned weight (out, in), M its mask (True = kept), A (r, in), B (out, r), s = alpha / r:

    Own        the tensor itself, in float32 (biases, gains and offsets of norms)
    LoRA       W + s B A             cannot be merged into a sparse W without filling its zeros
    LoRAPrune  W + s B A             merges as W + M * (s B A): the model changes at the merge
    MaskLoRA   W + s M * (B A)       merges as it is
    ScaleLoRA  W * (B A)             merges as it is; A = B = 1 / sqrt(r) make it start at W
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Adapter(nn.Module):
    """Base: ``forward`` maps the frozen tensor to what the model computes with, in float32."""

    def merged(self, tensor: Tensor) -> Tensor:
        """What the tensor becomes when training is over, in float32."""
        result: Tensor = self(tensor)
        return result


class Own(Adapter):
    """Trains the whole tensor, from a float32 copy."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(tensor.detach().float().clone())

    def forward(self, tensor: Tensor) -> Tensor:
        return self.value


class LoRA(Adapter):
    """Adds a product of rank ``rank`` (Hu et al. 2021): A Kaiming-uniform, B zero, so it starts at W.

    weight: (out, in); mask: (out, in) bool, True = kept; ``generator`` draws A, on the CPU."""

    mask: Tensor

    def __init__(self, weight: Tensor, mask: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.register_buffer("mask", mask)
        self.scaling = alpha / rank
        down, up = self.start(rank, rows, columns, generator)
        self.A, self.B = nn.Parameter(down.to(weight.device)), nn.Parameter(up.to(weight.device))

    @staticmethod
    def start(rank: int, rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The first A (rank, columns) and B (rows, rank)."""
        down = nn.init.kaiming_uniform_(torch.empty(rank, columns), a=math.sqrt(5), generator=generator)
        return down, torch.zeros(rows, rank)

    def forward(self, weight: Tensor) -> Tensor:
        return weight.float() + self.scaling * (self.B @ self.A)


class LoRAPrune(LoRA):
    """Trains as LoRA and loses at the merge what would fill a pruned entry."""

    def merged(self, weight: Tensor) -> Tensor:
        return weight.float() + self.mask * (self.scaling * (self.B @ self.A))


def masked_lora(weight: Tensor, mask: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """A weight (out, in) with the update of MaskLoRA, float32; down: A (rank, in), up: B (out, rank)."""
    return weight.float() + scaling * (mask * (up @ down))


class MaskLoRA(LoRA):
    """LoRA that never touches a pruned entry, in training as in the merge."""

    def forward(self, weight: Tensor) -> Tensor:
        return masked_lora(weight, self.mask, self.A, self.B, self.scaling)


class ScaleLoRA(LoRA):
    """Scales every kept entry; without alpha."""

    @staticmethod
    def start(rank: int, rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.full((rank, columns), 1 / math.sqrt(rank)), torch.full((rows, rank), 1 / math.sqrt(rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.float() * (self.B @ self.A)


LORA_TYPES: dict[str, type[LoRA]] = {"mask_lora": MaskLoRA, "scale_lora": ScaleLoRA, "lora_prune": LoRAPrune}


class Adapted(nn.Module):
    """A module called with adapted tensors. Its parameters are the adapters' alone.

    ``adapters``: by the name of the parameter of ``module`` that each stands in for."""

    def __init__(self, module: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        super().__init__()
        self.names = list(adapters)
        self.adapters = nn.ModuleList(adapters.values())
        self._module = (module,)  # in a tuple: its own parameters are not ours

    @property
    def module(self) -> nn.Module:
        return self._module[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        changed = {}
        for name, adapter in zip(self.names, self.adapters, strict=True):
            tensor = self.module.get_parameter(name)
            changed[name] = adapter(tensor).to(tensor.dtype)
        return functional_call(self.module, changed, args, kwargs)

    def train(self, mode: bool = True) -> Adapted:
        self.module.train(mode)
        return super().train(mode)

    @torch.no_grad()
    def merge(self) -> None:
        """Writes the merged tensors into the module; they are made in float32 and cast once."""
        for name, adapter in zip(self.names, self.adapters, strict=True):
            tensor = self.module.get_parameter(name)
            tensor.copy_(adapter.merged(tensor))  # type: ignore[operator]


@contextmanager
def adapting(module: nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[Adapted]:
    """The module with adapters and everything else frozen, gradients on. Afterwards its flags
    ``requires_grad`` and ``training`` are as they were, whatever happened."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    modes = [(one, one.training) for one in module.modules()]
    try:
        module.requires_grad_(False)
        with torch.enable_grad():
            yield Adapted(module, adapters)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for one, mode in modes:
            one.training = mode
