"""Linear layers that do not read the weights of inputs that are zero, or of outputs that are not needed.

One token at a time: several tokens select differently and are multiplied densely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeGuard

from torch import Tensor, nn
from torch.nn import functional as F

from sparsebench.kernels import ops
from sparsebench.kernels.formats import ColumnMajor

Forward = Callable[[Tensor], Tensor]
Needed = Callable[[], Tensor | None]  # asked before a layer runs: which outputs (out, bool), None where all


@contextmanager
def skipping(model: nn.Module, inputs: Iterable[str], outputs: Mapping[str, Needed]) -> Iterator[list[str]]:
    """The block runs with the layers ``inputs`` skipping the inputs that are exactly 0, and ``outputs`` those outputs
    that are not needed; then they are as before. Both by name; the weights are those of now.

    Gives the names of the layers that do: plain ``nn.Linear`` for which there is a kernel. Hooks on a layer stay, as
    what they zero is what is skipped.
    """
    changed: list[tuple[str, nn.Linear]] = []
    made = dict.fromkeys(inputs, _on_columns) | {name: _on_rows(needed) for name, needed in outputs.items()}
    try:
        for name, make in made.items():
            module = model.get_submodule(name)
            if _fits(module, name in outputs):
                # on the instance: replacing the module would lose the hooks, which hold what is skipped
                module.forward = make(module)  # type: ignore[method-assign, assignment]
                changed.append((name, module))
        yield [name for name, _ in changed]
    finally:
        for _, module in changed:
            del module.forward


def _fits(module: nn.Module, by_output: bool) -> TypeGuard[nn.Linear]:
    """A plain ``nn.Linear`` in a dtype that the kernels take; only the CPU has one that skips outputs."""
    if type(module) is not nn.Linear:
        return False
    device = module.weight.device.type
    return module.weight.dtype in ops.dtypes_on(device) and (device == "cpu" or not by_output)


def _on_columns(module: nn.Linear) -> Forward:
    weight, bias = _tensors(module)
    columns = ColumnMajor.from_dense(weight)

    def forward(x: Tensor) -> Tensor:
        if x.numel() == module.in_features:
            return ops.skipping_linear(x.contiguous(), columns, 0.0, bias)
        return F.linear(x, weight, bias)

    return forward


def _on_rows(needed: Needed) -> Callable[[nn.Linear], Forward]:
    def make(module: nn.Linear) -> Forward:
        weight, bias = _tensors(module)

        def forward(x: Tensor) -> Tensor:
            kept = needed()
            if kept is not None and x.numel() == module.in_features:
                return ops.selected_linear(x.contiguous(), weight, kept, bias)
            return F.linear(x, weight, bias)

        return forward

    return make


def _tensors(module: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return module.weight.detach().contiguous(), None if module.bias is None else module.bias.detach()
