"""Giving a model back the weights that it was loaded with, for the next run in the same process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ROOM = 1 << 29  # bytes of weights that are worth a copy; larger models are loaded again


class Original:
    """A copy of all parameters and buffers of a model, and which modules it was made of."""

    def __init__(self, model: nn.Module) -> None:
        self.copies = {name: tensor.detach().clone() for name, tensor in _tensors(model)}
        self.form = _form(model)

    @classmethod
    def of(cls, model: nn.Module) -> Original | None:
        """None where the model is too large for a second copy."""
        size = sum(tensor.nbytes for _, tensor in _tensors(model))
        return cls(model) if size <= ROOM else None

    @torch.no_grad()
    def restore(self, model: nn.Module) -> bool:
        """Puts the weights back, bit for bit. False, and nothing is done, if more than weights has changed: other
        modules, other attributes, tensors of another shape."""
        if _form(model) != self.form:
            return False
        for name, tensor in _tensors(model):
            tensor.copy_(self.copies[name])
        return True


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _form(model: nn.Module) -> list[tuple[Any, ...]]:
    """What a run may leave behind beside weights: the modules, their attributes and hooks, the tensors' forms."""
    modules = [(name, id(one), frozenset(vars(one)), _hooks(one)) for name, one in model.named_modules()]
    return [*modules, *((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in _tensors(model))]


def _hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)
