"""The one walk of the weight family: a stack of methods applied block by block.

In front of each block the statistics that the methods ask for are gathered with the block still
dense; then every linear layer gets its mask from the method of stage ``select``, ``refine`` methods
may change it, the masked weights are set to zero, ``recover`` methods may repair the block, and the
pruned block's outputs feed the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsebench.errors import UserError
from sparsebench.methods.base import Applied, LayerReport, Surroundings
from sparsebench.methods.weights.base import BlockRun, Layer, WeightMethod
from sparsebench.methods.weights.statistics import Several, Statistic, gathering
from sparsebench.models.blocks import BlockInputs, capture, decoder_blocks

Named = tuple[str, WeightMethod]


@dataclass
class Stack:
    """Weight methods in their order: one that selects, then those that refine and recover."""

    methods: list[Named]

    @property
    def selector(self) -> Named:
        return next((name, method) for name, method in self.methods if method.stage == "select")

    def of_stage(self, stage: str) -> list[Named]:
        return [(name, method) for name, method in self.methods if method.stage == stage]

    @property
    def statistics(self) -> dict[str, Callable[[], Statistic]]:
        """What to gather, by the method that asks for it."""
        wanted = {name: method.statistic() for name, method in self.methods}
        return {name: make for name, make in wanted.items() if make is not None}

    @property
    def needs_data(self) -> bool:
        return bool(self.statistics) or any(method.wants_inputs for _, method in self.methods)


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


def check(methods: Sequence[Named], model: nn.Module) -> None:
    """UserError when a method's options do not fit the model. Changes nothing."""
    for _, method in methods:
        layers = [layer for block in scoped_layers(model, method, 0) for layer in block]
        method.check(layers)
        method.check_model(model, layers)


@torch.no_grad()
def apply(methods: Sequence[Named], around: Surroundings) -> Applied:
    """Applies a stack of weight methods, in place, in one walk over the blocks."""
    stack = Stack(list(methods))
    selector = stack.selector[1]
    model = around.loaded.model
    blocks = decoder_blocks(model)[1]
    layers = scoped_layers(model, selector, around.seed)
    everything = [layer for block in layers for layer in block]
    inputs = capture(model, blocks, around.calibration()) if stack.needs_data else None
    selector.prepare(everything)
    ahead: dict[str, Tensor] = {}
    if selector.order == "none":
        inputs = _measure_dense(stack, blocks, layers, inputs, around)
        ahead = selector.select_all(everything)
    applied = Applied()
    for _, method in stack.methods:
        applied.acts_on |= method.touches(model, everything)
    for index, block in enumerate(blocks):
        run = BlockRun(block, index, inputs)
        seen = {name: method.observe(run) for name, method in stack.of_stage("recover")}
        for chosen in _groups(selector, layers[index]):
            if inputs is not None and selector.order != "none":
                _measure(stack, index, block, chosen, inputs)
            applied.layers += [_prune(stack, layer, ahead.get(layer.name)) for layer in chosen]
        for name, method in stack.of_stage("recover"):
            for column, value in (method.recover(block, layers[index], seen[name], run) or {}).items():
                applied.notes[column] = applied.notes.get(column, 0) + value
        if inputs is not None and index + 1 < len(blocks):
            inputs.hidden = inputs.run(index, block)
        around.progress(index + 1, len(blocks))
    for _, method in stack.of_stage("recover"):
        applied.notes |= method.finish(everything, around)
    _recount(applied, everything)
    applied.tolerance = selector.tolerance(everything)
    applied.warnings += _warnings(everything)
    for _, method in stack.methods:
        applied.warnings += method.remarks(model, everything)
    return applied


def _groups(selector: WeightMethod, layers: list[Layer]) -> Iterator[list[Layer]]:
    """What is measured and pruned together: the block's layers, or one after the other."""
    if selector.order == "layer":
        yield from ([layer] for layer in layers)
    elif layers:
        yield layers


def _measure_dense(
    stack: Stack, blocks: nn.ModuleList, layers: list[list[Layer]], inputs: BlockInputs | None, around: Surroundings
) -> BlockInputs | None:
    """All statistics on the dense model; returns fresh inputs where a later stage needs them."""
    if inputs is None:
        return None
    for index, block in enumerate(blocks):
        inputs.hidden = _measure(stack, index, block, layers[index], inputs)
    if len(stack.methods) == 1:
        return None
    return capture(around.loaded.model, blocks, around.calibration())


def _measure(stack: Stack, index: int, block: nn.Module, layers: list[Layer], inputs: BlockInputs) -> list[Tensor]:
    """Runs the calibration data through the block, fills the layers' statistics, returns the outputs."""
    wanted = stack.statistics
    if not wanted:
        return inputs.run(index, block)
    with gathering(block, {layer.name: layer.module for layer in layers}, lambda: Several(wanted)) as found:
        outputs = inputs.run(index, block)
    for layer in layers:
        if layer.name not in found:
            raise UserError(f"{layer.name}: calibration data never reached this layer; exclude it or use more data")
        layer.gathered = found[layer.name]
        layer.statistic = layer.gathered.parts.get(stack.selector[0])
    return outputs


def _prune(stack: Stack, layer: Layer, ahead: Tensor | None) -> LayerReport:
    """Selects, refines and sets the pruned entries of one layer to zero."""
    refiners = stack.of_stage("refine")
    name, selector = stack.selector
    layer.dense = layer.weight.clone() if refiners else None
    mask, weight = (ahead, layer.weight) if ahead is not None else selector.solve(layer)
    if refiners:
        layer.score, layer.n_of_m = selector.score(layer), selector.n_of_m
    for other, method in refiners:
        if not method.in_scope(layer.name):
            continue
        layer.statistic = layer.gathered.parts.get(other) if layer.gathered is not None else None
        refined = method.refine(layer, mask)
        if layer.dense is not None and not torch.equal(refined, mask):
            weight = layer.dense
        mask = refined
    if weight is not layer.weight:
        layer.weight.copy_(weight)
    # a -0.0 that is there already stays: no bit changes without need
    layer.weight[~mask & (layer.weight != 0)] = 0
    layer.mask = mask
    layer.statistic = layer.gathered = layer.dense = layer.score = None
    pattern = str(getattr(selector, "pattern", None) or "unstructured")
    return LayerReport(layer.name, name, mask.numel(), 0, 0, selector.asked(layer), pattern)


def _recount(applied: Applied, layers: Sequence[Layer]) -> None:
    """What each mask removed, and the zeros among what it kept, after every stage has run."""
    masks = {layer.name: (layer.mask, layer.weight) for layer in layers}
    for report in applied.layers:
        mask, weight = masks[report.layer]
        if mask is not None:
            report.pruned = int((~mask).sum())
            report.spare = int(((weight == 0) & mask).sum())


def _warnings(layers: Sequence[Layer]) -> list[str]:
    """The layers' warnings, one line for all layers of the same text."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        for text in layer.warnings:
            found.setdefault(text, []).append(layer.name)
    return [
        f"{text}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for text, names in found.items()
    ]
