"""The weight family: one walk over the decoder blocks, on which every method is a few lines.

A stack of weight methods runs in one walk. In front of each block the statistics that the methods
ask for are gathered with the block still dense; then every linear layer gets its mask from the
method of stage ``select``, ``refine`` methods may change it, the masked weights are set to zero,
``recover`` methods may repair the block, and the pruned block's outputs feed the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsebench.declare import Declared, option
from sparsebench.errors import UserError
from sparsebench.methods.base import Applied, LayerReport, Surroundings
from sparsebench.methods.weights import masks
from sparsebench.methods.weights.statistics import Statistic, gathering
from sparsebench.models.blocks import BlockInputs, capture, decoder_blocks


@dataclass
class Layer:
    """A linear layer in scope: its full name, module, statistic (None without data), and the run's
    random generator seeded for it."""

    name: str
    module: nn.Linear
    statistic: Any = None
    generator: torch.Generator = field(default_factory=torch.Generator)

    @property
    def weight(self) -> Tensor:
        """(out, in), as stored."""
        return self.module.weight.data


@dataclass(frozen=True)
class WeightMethod(Declared):
    """Base of weight methods. A subclass overrides what its stage does."""

    include: tuple[str, ...] = option((), "only layers whose name fits one of these patterns, such as *q_proj")
    exclude: tuple[str, ...] = option((), "not the layers whose name fits one of these patterns")

    stage: ClassVar[str] = "select"

    def statistic(self) -> Callable[[], Statistic] | None:
        """What to gather of each layer's inputs, or None where no data is needed."""
        return None

    @property
    def order(self) -> str:
        """What the statistics see: ``block`` (earlier blocks pruned, this one dense), ``layer`` (earlier
        layers of the block pruned too) or ``none`` (the dense model everywhere)."""
        return "block"

    def in_scope(self, name: str) -> bool:
        included = not self.include or any(fnmatch(name, pattern) for pattern in self.include)
        return included and not any(fnmatch(name, pattern) for pattern in self.exclude)

    def check(self, layers: Sequence[Layer]) -> None:
        """UserError when an option does not fit these layers; runs before anything is recorded."""

    def prepare(self, layers: Sequence[Layer]) -> None:
        """Sees all layers before the first is pruned (global rankings, allocations)."""

    def select(self, layer: Layer) -> Tensor:
        """The layer's mask: (out, in) bool, True = kept."""
        return torch.ones_like(layer.weight, dtype=torch.bool)

    def refine(self, layer: Layer, mask: Tensor) -> Tensor:
        """Another mask for the layer, with as many kept entries."""
        return mask

    def recover(self, block: nn.Module, layers: Sequence[Layer], inputs: BlockInputs | None) -> None:
        """Repairs the weights of a pruned block; pruned entries stay zero."""

    def asked(self, name: str) -> float | None:
        """The sparsity asked of a layer; None where nothing was."""
        return None

    def tolerance(self, layers: Sequence[Layer]) -> float:
        """How far the achieved sparsity may be from the asked one by the method's own rounding."""
        return 1e-9


@dataclass(frozen=True)
class Pruner(WeightMethod):
    """Base of methods that are asked for a level: ``sparsity``, or an n:m ``pattern``."""

    sparsity: float | None = option(
        None, "zeros / all over the method's scope; the run's sparsity if not given", low=0.0, below=1.0
    )
    pattern: str | None = option(None, "unstructured or n:m with n kept; the run's pattern if not given")
    remainder: str = option(
        "refuse",
        "columns behind the last whole n:m group: refuse the layer, or leave them dense",
        choices=("refuse", "dense"),
    )

    @property
    def level(self) -> float:
        """The sparsity to reach: what n:m implies, what was asked, or a half."""
        if self.n_of_m:
            return 1 - self.n_of_m[0] / self.n_of_m[1]
        return 0.5 if self.sparsity is None else self.sparsity

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(n kept, m), or None when unstructured."""
        if self.pattern in (None, "unstructured"):
            return None
        kept, group = str(self.pattern).split(":")
        return int(kept), int(group)

    def check(self, layers: Sequence[Layer]) -> None:
        if self.n_of_m is None or self.remainder == "dense":
            return
        for layer in layers:
            if layer.weight.shape[1] % self.n_of_m[1]:
                raise UserError(
                    f"pattern={self.pattern}: {self.n_of_m[1]} does not divide the {layer.weight.shape[1]} inputs of "
                    f"{layer.name}; exclude it, or leave the rest dense with remainder=dense"
                )

    def asked(self, name: str) -> float | None:
        return self.level


@dataclass(frozen=True)
class ScorePruner(Pruner):
    """Base of methods that score every weight and prune the smallest of each comparison group."""

    group: str = option("layer", "weights that are compared with each other", choices=("row", "layer", "global"))

    def score(self, layer: Layer) -> Tensor:
        """The saliency of every weight: (out, in) float32."""
        raise UserError(f"{type(self).__name__} declares no score")

    def keep_layer(self, scores: Tensor) -> Tensor:
        """The mask of one matrix under ``group=layer``."""
        return masks.keep_count(scores, int(scores.numel() * self.level))

    @property
    def order(self) -> str:
        return "none" if self.group == "global" else "block"

    def check(self, layers: Sequence[Layer]) -> None:
        super().check(layers)
        if self.n_of_m and self.group == "global":
            raise UserError(f"group=global ranks single weights; it does not go with pattern={self.pattern}")

    def select(self, layer: Layer) -> Tensor:
        scores = self.score(layer)
        if self.n_of_m:
            return masks.keep_n_of_m(scores, *self.n_of_m)
        return masks.keep_rows(scores, self.level) if self.group == "row" else self.keep_layer(scores)

    def select_all(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        """Masks of all layers at once, for ``group=global``."""
        return masks.keep_global({layer.name: self.score(layer) for layer in layers}, self.level)

    def tolerance(self, layers: Sequence[Layer]) -> float:
        if self.n_of_m:
            columns = [layer.weight.shape[1] for layer in layers]
            return 1e-9 + max(self.level * (count % self.n_of_m[1]) / count for count in columns)
        if self.group == "row":
            return max(1 / layer.weight.shape[1] for layer in layers)
        return max(2 / layer.weight.numel() for layer in layers)


@dataclass
class Stack:
    """Weight methods in their order, with the layers each may touch."""

    methods: list[tuple[str, WeightMethod]]

    @property
    def selector(self) -> tuple[str, WeightMethod]:
        return next((name, method) for name, method in self.methods if method.stage == "select")

    def data(self) -> Callable[[], Statistic] | None:
        """The statistic to gather: of the method that asks for one."""
        wanted = [method.statistic() for _, method in self.methods]
        return next((make for make in wanted if make is not None), None)


def scoped_layers(model: nn.Module, method: WeightMethod, seed: int) -> list[list[Layer]]:
    """The linear layers in scope, block by block. UserError when the patterns leave none."""
    prefix, blocks = decoder_blocks(model)
    found = []
    for index, block in enumerate(blocks):
        names = [(f"{prefix}.{index}.{name}", m) for name, m in block.named_modules() if isinstance(m, nn.Linear)]
        layers = [Layer(name, module) for name, module in names if method.in_scope(name)]
        for place, layer in enumerate(layers):
            layer.generator.manual_seed(seed * 1_000_003 + index * 1009 + place)
        found.append(layers)
    if not any(found):
        raise UserError(
            f"include={list(method.include)} exclude={list(method.exclude)}: no linear layer is left in scope"
        )
    return found


def check(methods: Sequence[tuple[str, WeightMethod]], model: nn.Module) -> None:
    """UserError when a method's options do not fit the model. Changes nothing."""
    for _, method in methods:
        method.check([layer for block in scoped_layers(model, method, 0) for layer in block])


@torch.no_grad()
def apply(methods: Sequence[tuple[str, WeightMethod]], around: Surroundings) -> Applied:
    """Applies a stack of weight methods, in place, in one walk over the blocks."""
    stack = Stack(list(methods))
    name, selector = stack.selector
    model = around.loaded.model
    blocks = decoder_blocks(model)[1]
    layers = scoped_layers(model, selector, around.seed)
    everything = [layer for block in layers for layer in block]
    needs_data = stack.data() is not None
    inputs = capture(model, blocks, around.calibration()) if needs_data else None
    masks_ahead: dict[str, Tensor] = {}
    selector.prepare(everything)
    if selector.order == "none":
        if inputs is not None:
            for index, block in enumerate(blocks):
                inputs.hidden = _measure(stack, index, block, layers[index], inputs)
            inputs = capture(model, blocks, around.calibration()) if len(stack.methods) > 1 else None
        if isinstance(selector, ScorePruner) and selector.group == "global":
            masks_ahead = selector.select_all(everything)
    applied = Applied(tolerance=selector.tolerance(everything))
    applied.acts_on = {f"{layer.name}.weight" for layer in everything}
    for index, block in enumerate(blocks):
        for chosen in _groups(selector, layers[index]):
            if inputs is not None and selector.order != "none":
                _measure(stack, index, block, chosen, inputs)
            for layer in chosen:
                mask = masks_ahead[layer.name] if layer.name in masks_ahead else selector.select(layer)
                for _, method in stack.methods:
                    mask = method.refine(layer, mask)
                applied.layers.append(_zero(name, selector, layer, mask))
                layer.statistic = None
        for _, method in stack.methods:
            method.recover(block, layers[index], inputs)
        if inputs is not None and index + 1 < len(blocks):
            inputs.hidden = inputs.run(index, block)
        around.progress(index + 1, len(blocks))
    return applied


def _groups(selector: WeightMethod, layers: list[Layer]) -> Iterator[list[Layer]]:
    """What is measured and pruned together: the block's layers, or one after the other."""
    if selector.order == "layer":
        yield from ([layer] for layer in layers)
    elif layers:
        yield layers


def _measure(stack: Stack, index: int, block: nn.Module, layers: list[Layer], inputs: BlockInputs) -> list[Tensor]:
    """Runs the calibration data through the block, fills the layers' statistics, returns the outputs."""
    make = stack.data()
    if make is None:
        return inputs.run(index, block)
    with gathering(block, {layer.name: layer.module for layer in layers}, make) as found:
        outputs = inputs.run(index, block)
    for layer in layers:
        if layer.name not in found:
            raise UserError(f"{layer.name}: calibration data never reached this layer; exclude it or use more data")
        layer.statistic = found[layer.name]
    return outputs


def _zero(name: str, selector: WeightMethod, layer: Layer, mask: Tensor) -> LayerReport:
    """Sets the pruned entries to zero and counts."""
    weight = layer.weight
    weight[~mask & (weight != 0)] = 0  # a -0.0 that is there already stays: no bit changes without need
    pattern = str(getattr(selector, "pattern", None) or "unstructured")
    pruned = int((~mask).sum())
    spare = int(((weight == 0) & mask).sum())
    return LayerReport(layer.name, name, weight.numel(), pruned, spare, selector.asked(layer.name), pattern)
