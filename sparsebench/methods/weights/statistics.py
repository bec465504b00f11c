"""Statistics of the inputs of linear layers, gathered while calibration data runs through a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Statistic(Protocol):
    """What a method wants to know of a layer's inputs."""

    def add(self, inputs: Tensor, sequences: int) -> None:
        """inputs: (..., in), the layer's input of one call; sequences: how many the block was called with
        (some models flatten sequences and tokens before their MLP, so the shape does not tell)."""
        ...


class InputNorm:
    """Running norm of every input feature in float32: (in,).

    l2 is the reference's ``c``: mean over sequences of the SUM over tokens of x^2 (its root scales
    the score); l1 the same with |x|; linf the largest |x|.
    """

    def __init__(self, norm: str = "l2") -> None:
        self.norm, self.sequences = norm, 0
        self.value: Tensor = torch.zeros(())

    def add(self, inputs: Tensor, sequences: int) -> None:
        features = inputs.shape[-1]
        x = inputs.reshape(-1, features).t().float()
        if self.sequences == 0:
            self.value = torch.zeros(features, device=x.device)
        if self.norm == "linf":
            self.value = torch.maximum(self.value, x.abs().amax(dim=1))
            self.sequences += sequences
            return
        self.value = self.value * (self.sequences / (self.sequences + sequences))
        self.sequences += sequences
        total = torch.norm(x, p=2, dim=1) ** 2 if self.norm == "l2" else x.abs().sum(dim=1)
        self.value = self.value + total / self.sequences

    @property
    def scale(self) -> Tensor:
        """What multiplies |weight|: (in,), the root for l2."""
        return self.value.sqrt() if self.norm == "l2" else self.value


class Several:
    """The statistics of all methods of a stack, fed together; ``parts`` by the name of the method."""

    def __init__(self, makers: Mapping[str, Callable[[], Statistic]]) -> None:
        self.parts = {name: make() for name, make in makers.items()}

    def add(self, inputs: Tensor, sequences: int) -> None:
        for part in self.parts.values():
            part.add(inputs, sequences)


@contextmanager
def gathering(block: nn.Module, layers: Mapping[str, nn.Linear], make: Callable[[], Statistic]) -> Any:
    """Attaches a statistic to each of the block's layers, yields {name: statistic}; hooks are always removed.

    Layers that receive the same tensor object in a call (q, k and v; gate and up) share one
    statistic: the first of them adds, the others look at it. Results do not change.
    """
    found: dict[str, Statistic] = {}
    leader: dict[str, str] = {}
    last: list[tuple[Tensor, str]] = []
    sequences = 0

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal sequences
        sequences = args[0].shape[0]

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0]
            if name not in leader:
                same = next((first for tensor, first in last if tensor is inputs), name)
                leader[name] = same
                found[name] = found[same] if same != name else make()
            if leader[name] == name:
                last[:] = [(inputs, name)]
                found[name].add(inputs, sequences)

        return look

    with ExitStack() as stack:
        stack.callback(block.register_forward_pre_hook(enter).remove)
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        yield found
        last.clear()
