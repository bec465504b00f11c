"""Statistics of the inputs of linear layers, gathered while calibration data runs through a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsebench.models.blocks import Enough


class Statistic(Protocol):
    """What a method wants to know of a layer's inputs. Methods read it and never change it: layers with the same
    inputs share one, and so do runs on the same model and data."""

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


class InputMoments:
    """First and second moments of every input feature in float32, each sequence measured by itself,
    so that nothing depends on how sequences are grouped into calls.

    ``sums``: (in,), mean over sequences of the sum over tokens of x; ``squares``: the same of x^2;
    ``variance``: token-weighted mean over sequences of the population variance within a sequence.
    """

    def __init__(self) -> None:
        self.sequences, self.tokens = 0, 0
        self._totals: Tensor = torch.zeros(())

    def add(self, inputs: Tensor, sequences: int) -> None:
        features = inputs.shape[-1]
        x = inputs.reshape(-1, features).float()
        # inputs that were picked token by token (experts) do not divide: they count as one sequence
        x = x.unflatten(0, (sequences, -1)) if len(x) and len(x) % sequences == 0 else x[None]
        if self.sequences == 0:
            self._totals = torch.zeros(3, features, device=x.device)
        self.sequences += sequences
        if x.numel() == 0:
            return
        self.tokens += x.shape[0] * x.shape[1]
        variance = x.var(dim=1, correction=0) * x.shape[1]
        for one in torch.stack([x.sum(dim=1), x.square().sum(dim=1), variance], dim=1):
            self._totals = self._totals + one

    @property
    def sums(self) -> Tensor:
        return self._totals[0] / self.sequences

    @property
    def squares(self) -> Tensor:
        return self._totals[1] / self.sequences

    @property
    def variance(self) -> Tensor:
        return self._totals[2] / max(1, self.tokens)


@dataclass(frozen=True)
class Several:
    """The statistics of all methods of a stack, fed together; ``parts`` by the name of the method."""

    parts: Mapping[str, Statistic]

    def add(self, inputs: Tensor, sequences: int) -> None:
        for part in self.parts.values():
            part.add(inputs, sequences)


@contextmanager
def gathering(
    block: nn.Module,
    layers: Mapping[str, nn.Linear],
    make: Callable[[], Statistic],
    *,
    outputs: bool = True,
    once: bool = False,
) -> Any:
    """Attaches a statistic to each of the block's layers, yields {name: statistic}; hooks are always removed.

    Layers that receive the same tensor object in a call (q, k and v; gate and up) share one
    statistic: the first of them adds, the others look at it. Results do not change.
    Without ``outputs`` a call of the block ends (``Enough``) once all layers were fed: what is behind the last
    one's inputs is not computed. The first call is whole, to see that each layer is called once, unless that is known
    (``once``).
    """
    found: dict[str, Statistic] = {}
    leader: dict[str, str] = {}
    last: list[tuple[Tensor, str]] = []
    sequences, fed, short = 0, list[str](), False

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal sequences, short
        sequences = args[0].shape[0]
        short = not outputs and (once or sorted(fed) == sorted(layers))
        fed.clear()

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
            fed.append(name)
            if short and len(fed) == len(layers):
                raise Enough

        return look

    with ExitStack() as stack:
        stack.callback(block.register_forward_pre_hook(enter).remove)
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        yield found
        last.clear()
