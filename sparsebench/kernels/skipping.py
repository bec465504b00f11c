"""Linear layers that do not read the weights of inputs that are zero, one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F

from sparsebench.kernels import ops
from sparsebench.kernels.formats import ColumnMajor


@contextmanager
def skipping(model: nn.Module, names: Iterable[str]) -> Iterator[list[str]]:
    """The block runs with the named linear layers skipping the inputs that are exactly 0; then they are as before.

    Gives the names of the layers that do: plain ``nn.Linear`` in float32 or bfloat16 on the CPU. Hooks on a layer stay,
    as what they zero is what is skipped. Several tokens at once are multiplied densely: they keep different inputs.
    """
    changed: list[tuple[str, nn.Linear]] = []
    for name in names:
        module = model.get_submodule(name)
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype in ops.CODES:
            changed.append((name, module))
    try:
        for _, module in changed:
            # on the instance: replacing the module would lose the hooks, which hold what is skipped
            module.forward = _forward(module)  # type: ignore[method-assign, assignment]
        yield [name for name, _ in changed]
    finally:
        for _, module in changed:
            del module.forward


def _forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    columns = ColumnMajor.from_dense(weight)

    def forward(x: Tensor) -> Tensor:
        if x.numel() == module.in_features:
            return ops.skipping_linear(x.contiguous(), columns, 0.0, bias)
        return F.linear(x, weight, bias)

    return forward
