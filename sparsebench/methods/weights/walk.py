"""The one walk of the weight family: a stack of methods applied block by block.

In front of each block the statistics that the methods ask for are gathered with the block still
dense; then every linear layer gets its mask from the method of stage ``select``, ``refine`` methods
may change it, the masked weights are set to zero, ``recover`` methods may repair the block, and the
pruned block's outputs feed the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from sparsebench.errors import UserError
from sparsebench.methods.base import Applied, LayerReport, Surroundings
from sparsebench.methods.weights.base import BlockRun, Layer, WeightMethod
from sparsebench.methods.weights.masks import clear
from sparsebench.methods.weights.sharing import Shared
from sparsebench.methods.weights.statistics import Several, Statistic, gathering
from sparsebench.models.blocks import BlockInputs, Blocks, decoder_blocks, kind_of

Named = tuple[str, WeightMethod]


@dataclass
class Stack:
    """Weight methods in their order: one that selects, then those that refine and recover."""

    methods: list[Named]

    @property
    def selector(self) -> Named:
        return next((name, method) for name, method in self.methods if method.stage == "select")

    def of_stage(self, stage: str) -> list[Named]:
        also = stage == "recover"
        return [(name, one) for name, one in self.methods if one.stage == stage or (also and one.also_recovers)]

    @property
    def order(self) -> str:
        """What the statistics of the whole stack see."""
        return self.selector[1].order

    @property
    def statistics(self) -> dict[str, Callable[[], Statistic]]:
        """What to gather, by the method that asks for it."""
        wanted = {name: method.statistic() for name, method in self.methods}
        return {name: make for name, make in wanted.items() if make is not None}

    @property
    def needs_data(self) -> bool:
        return bool(self.statistics) or any(method.wants_inputs for _, method in self.methods)


def scoped_layers(model: nn.Module, method: WeightMethod, seed: int) -> list[list[Layer]]:
    """The linear layers in scope, block by block. UserError when a method that changes weights is left none."""
    prefix, blocks = decoder_blocks(model)
    found = []
    for index, block in enumerate(blocks):
        names = [(f"{prefix}.{index}.{name}", m) for name, m in block.named_modules() if isinstance(m, nn.Linear)]
        layers = [Layer(name, module) for name, module in names if method.in_scope(name)]
        for place, layer in enumerate(layers):
            layer.generator.manual_seed(seed * 1_000_003 + index * 1009 + place)
        found.append(layers)
    if not any(found) and not method.declared["taxonomy"].reference:
        _check_linear(blocks)
        raise UserError(
            f"include={list(method.include)} exclude={list(method.exclude)}: no linear layer is left in scope"
        )
    return found


def _check_linear(blocks: nn.ModuleList) -> None:
    """UserError when the model has no linear layers at all, such as GPT-2, which has its own kind."""
    modules = [one for block in blocks for one in block.modules()]
    if not any(isinstance(one, nn.Linear) for one in modules):
        kinds = {type(one).__name__ for one in modules if [*one.parameters(recurse=False)]}
        raise UserError(f"model: its blocks have no linear layer (torch.nn.Linear), only {', '.join(sorted(kinds))}")


def check(methods: Sequence[Named], model: nn.Module) -> None:
    """UserError when a method's options do not fit the model. Changes nothing."""
    for name, method in methods:
        layers = [layer for block in scoped_layers(model, method, 0) for layer in block]
        method.check(layers)
        method.check_model(model, layers)
        method.check_beside([other for other, _ in methods if other != name])


@dataclass
class _Data:
    """The calibration data on its way through the blocks, and the statistics taken of it."""

    stack: Stack
    blocks: Blocks
    layers: list[list[Layer]]
    around: Surroundings
    shared: Shared
    inputs: BlockInputs | None = None
    known: bool = False  # order none: the statistics of all layers are known, nothing has to run

    def start(self) -> None:
        """Brings the data in front of the first block, where it is needed."""
        if not self.stack.needs_data:
            return
        windows = self.around.calibration()
        self.shared.about(windows)
        names = [layer.name for block in self.layers for layer in block]
        wanted, order = self.stack.statistics, self.stack.order
        self.known = order == "none" and bool(wanted) and self.shared.known(wanted, names) is not None
        if not self.known or self.stack.of_stage("recover"):
            self.inputs = self.shared.inputs(self.blocks, windows)

    def measure_all(self) -> None:
        """All statistics on the dense model; the data is in front of the first block again where a later stage
        needs it."""
        again = bool(self.stack.of_stage("recover"))
        for index in range(len(self.blocks)):
            self._gather(index, self.blocks.bring(index), self.layers[index], advance=not self.known)
        self.inputs = None
        if self.stack.needs_data and again:
            self.inputs = self.shared.inputs(self.blocks, self.around.calibration())

    def measure(self, index: int, block: nn.Module, layers: list[Layer]) -> None:
        """What the layers' inputs are, before they are pruned; under order ``none`` the data passes the dense block."""
        self._gather(index, block, layers, advance=self.stack.order == "none" and not self.known)

    def pass_on(self, index: int, block: nn.Module) -> None:
        """The pruned block's outputs become the next one's inputs."""
        if self.inputs is not None and self.stack.order != "none" and index + 1 < len(self.blocks):
            self.inputs.advance(index, block)

    def _gather(self, index: int, block: nn.Module, layers: list[Layer], advance: bool) -> None:
        """Fills the layers' statistics; with ``advance`` the block's outputs take the place of its inputs."""
        wanted, order = self.stack.statistics, self.stack.order
        dense = order == "none" or (order == "block" and index == 0)
        found = self.shared.known(wanted, [layer.name for layer in layers]) if dense and wanted else None
        if self.inputs is not None and (found is None or advance):
            make = lambda: Several({name: one() for name, one in wanted.items()})  # noqa: E731
            modules = {layer.name: layer.module for layer in layers} if wanted and found is None else {}
            once = kind_of(block) in self.inputs.once
            with gathering(block, modules, make, outputs=advance, once=once) as fresh:
                if advance:
                    self.inputs.advance(index, block)
                elif modules:
                    self.inputs.look(index, block)
            if modules:
                found = _complete(fresh, layers)
                if dense:
                    self.shared.remember(wanted, found)
        for layer in layers if found else []:
            layer.gathered = found[layer.name]  # type: ignore[index]
            layer.statistic = layer.gathered.parts.get(self.stack.selector[0])


def _complete(found: dict[str, Several], layers: Sequence[Layer]) -> dict[str, Several]:
    """UserError when the data missed a layer."""
    for layer in layers:
        if layer.name not in found:
            raise UserError(f"{layer.name}: calibration data never reached this layer; exclude it or use more data")
    return found


@torch.no_grad()
def apply(methods: Sequence[Named], around: Surroundings) -> Applied:
    """Applies a stack of weight methods, in place, in one walk over the blocks."""
    stack = Stack(list(methods))
    selector, recovering = stack.selector[1], stack.of_stage("recover")
    model, blocks = around.loaded.model, around.loaded.blocks()
    layers = scoped_layers(model, selector, around.seed)
    everything = [layer for block in layers for layer in block]
    shared = Shared(room=0) if around.shared is None else around.shared.setdefault("weights", Shared())
    data = _Data(stack, blocks, layers, around, shared)
    data.start()
    selector.prepare(everything)
    ahead: dict[str, Tensor] = {}
    looks_ahead = stack.order == "none" and bool(recovering or not selector.blockwise)
    if looks_ahead:
        data.measure_all()
        ahead = selector.select_all(everything)
    applied = Applied(notes={"statistics": "dense"} if stack.order == "none" and stack.statistics else {})
    for _, method in stack.methods:
        applied.acts_on |= method.touches(model, everything)
    for index in range(len(blocks)):
        block = blocks.bring(index)
        run = BlockRun(block, index, data.inputs)
        seen = {name: method.observe(run) for name, method in recovering}
        for chosen in _groups(selector, layers[index]):
            if not looks_ahead:
                data.measure(index, block, chosen)
            for together in _same_inputs(chosen):
                applied.layers += _prune(stack, together, ahead)
        for name, method in recovering:
            for column, value in (method.recover(block, layers[index], seen[name], run) or {}).items():
                applied.notes[column] = applied.notes.get(column, 0) + value
        data.pass_on(index, block)
        if not recovering:
            _recount(applied.layers[len(applied.layers) - len(layers[index]) :], layers[index])
            for layer in layers[index]:
                layer.mask = None  # nobody asks again, and together they would be a quarter of a model
        blocks.done(index)
        around.progress(index + 1, len(blocks))
    for _, method in recovering:
        applied.notes |= method.finish(everything, around)
        applied.rewritten |= method.rewrote(applied.notes)
    if recovering:
        _recount(applied.layers, everything)
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


def _same_inputs(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Neighbours that share what was gathered of their inputs; without data every layer by itself."""
    taken = [tuple(layer.gathered.parts.values()) if layer.gathered else (layer,) for layer in layers]
    for _, group in groupby(zip(taken, layers, strict=True), lambda pair: tuple(map(id, pair[0]))):
        yield [layer for _, layer in group]


def _prune(stack: Stack, layers: list[Layer], ahead: Mapping[str, Tensor]) -> list[LayerReport]:
    """Selects, refines and sets the pruned entries of layers with the same inputs to zero. ``ahead``: masks that are
    known already, by layer."""
    refining = bool(stack.of_stage("refine"))
    for layer in layers:
        layer.dense = layer.weight.clone() if refining else None
    if all(layer.name in ahead for layer in layers):
        solved = [(ahead[layer.name], layer.weight) for layer in layers]
    else:
        solved = stack.selector[1].solve_together(layers)
    return [_set(stack, layer, *found) for layer, found in zip(layers, solved, strict=True)]


def _set(stack: Stack, layer: Layer, mask: Tensor, weight: Tensor) -> LayerReport:
    """Refines the mask of one layer, and gives the layer its weight and its zeros."""
    refiners = stack.of_stage("refine")
    name, selector = stack.selector
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
    clear(layer.weight, mask | (layer.weight == 0))
    layer.mask = mask
    layer.statistic = layer.gathered = layer.dense = layer.score = None
    pattern = str(getattr(selector, "pattern", None) or "unstructured")
    return LayerReport(layer.name, name, mask.numel(), 0, 0, selector.asked(layer), pattern, selector.stores_zeros)


def _recount(reports: Sequence[LayerReport], layers: Sequence[Layer]) -> None:
    """What each mask removed, and the zeros among what it kept, once nothing changes them any more."""
    masks = {layer.name: (layer.mask, layer.weight) for layer in layers}
    for report in reports:
        mask, weight = masks[report.layer]
        if mask is not None:
            report.pruned = mask.numel() - int(mask.count_nonzero())
            report.spare = int(((weight == 0) & mask).count_nonzero())


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
