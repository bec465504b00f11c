"""Linear layers that do not read the weights of inputs that are zero, or of outputs that are not needed.

One token at a time: several tokens select differently and are multiplied densely. A weight that is sparse itself
becomes a bitmap, so that of the inputs that count only the kept weights are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeGuard

from torch import Tensor, nn
from torch.nn import functional as F

from sparsebench.kernels import ops
from sparsebench.kernels.formats import ColumnBitmap, ColumnMajor
from sparsebench.kernels.swap import Replaced, pays

Forward = Callable[[Tensor], Tensor]
Needed = Callable[[], Tensor | None]  # asked before a layer runs: which outputs (out, bool), None where all


@dataclass(frozen=True)
class _Made:
    """How a layer runs, and what its weight is held in: format, kept / all, bytes."""

    forward: Forward
    format: str
    density: float
    bytes: int


@contextmanager
def skipping(model: nn.Module, inputs: Iterable[str], outputs: Mapping[str, Needed]) -> Iterator[list[Replaced]]:
    """The block runs with the layers ``inputs`` skipping the inputs that are exactly 0, and ``outputs`` those outputs
    that are not needed; then they are as before. Both by name; the weights are those of now.

    Gives the layers that do, and in which format: plain ``nn.Linear`` for which there is a kernel. Hooks on a layer
    stay, as what they zero is what is skipped.
    """
    changed: list[nn.Linear] = []
    layers: list[Replaced] = []
    makers = dict.fromkeys(inputs, _on_columns) | {name: _on_rows(needed) for name, needed in outputs.items()}
    try:
        for name, make in makers.items():
            module = model.get_submodule(name)
            if _fits(module, name in outputs):
                # on the instance: replacing the module would lose the hooks, which hold what is skipped
                made = make(module)
                module.forward = made.forward  # type: ignore[method-assign, assignment]
                changed.append(module)
                dense = module.weight.numel() * module.weight.element_size()
                layers.append(Replaced(name, made.format, made.density, made.bytes, dense))
        yield layers
    finally:
        for module in changed:
            del module.forward


def _fits(module: nn.Module, by_output: bool) -> TypeGuard[nn.Linear]:
    """A plain ``nn.Linear`` in a dtype that the kernels take; only the CPU has one that skips outputs."""
    if type(module) is not nn.Linear:
        return False
    device = module.weight.device.type
    return module.weight.dtype in ops.dtypes_on(device) and (device == "cpu" or not by_output)


def _on_columns(module: nn.Linear) -> _Made:
    weight, bias = _tensors(module)
    if weight.device.type == "cpu" and pays(weight):
        return _on_bitmap(module.in_features, ColumnBitmap.from_dense(weight), bias)
    columns = ColumnMajor.from_dense(weight)

    def forward(x: Tensor) -> Tensor:
        if x.numel() == module.in_features:
            return ops.skipping_linear(x.contiguous(), columns, 0.0, bias)
        return F.linear(x, weight, bias)

    return _Made(forward, "columns", 1.0, columns.nbytes)


def _on_bitmap(inputs: int, columns: ColumnBitmap, bias: Tensor | None) -> _Made:
    def forward(x: Tensor) -> Tensor:
        if x.numel() == inputs:
            return ops.skipping_linear(x.contiguous(), columns, 0.0, bias)
        return F.linear(x, ops.unpacked(columns), bias)

    return _Made(forward, "bitmap of columns", columns.density, columns.nbytes)


def _on_rows(needed: Needed) -> Callable[[nn.Linear], _Made]:
    def make(module: nn.Linear) -> _Made:
        weight, bias = _tensors(module)

        def forward(x: Tensor) -> Tensor:
            kept = needed()
            if kept is not None and x.numel() == module.in_features:
                return ops.selected_linear(x.contiguous(), weight, kept, bias)
            return F.linear(x, weight, bias)

        return _Made(forward, "rows", 1.0, weight.numel() * weight.element_size())

    return make


def _tensors(module: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return module.weight.detach().contiguous(), None if module.bias is None else module.bias.detach()
