"""Runs a sparse model on sparse kernels: its pruned linear layers are replaced, and put back afterwards.

Quality is measured on the masked model; milliseconds on the swapped one. A layer is replaced if it is a plain
``nn.Linear`` in float32 or bfloat16 on the CPU, neither the output head nor tied to another parameter, and sparse
enough to pay: a dense kernel at memory speed is faster than the bitmap below about 35% zeros.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsebench.errors import UserError
from sparsebench.kernels import build, ops, reference
from sparsebench.kernels.formats import NM, Bitmap

KINDS = ("auto", "reference")
PAYS_FROM = 0.35  # zeros / all, from which a bitmap product beats a dense one at batch 1
_PATTERNS = (4, 8, 16, 32)  # the m of the n:m patterns looked for


@dataclass(frozen=True)
class Replaced:
    """A layer that runs on a sparse kernel. ``bytes``: what its compressed weight takes, ``dense_bytes``: what it
    took; biases are in neither."""

    name: str
    format: str
    density: float
    bytes: int
    dense_bytes: int


@dataclass
class Swap:
    """What was replaced, why the other linear layers were not (name -> reason), and which kernels run."""

    kernel: str
    layers: list[Replaced] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    @property
    def bytes(self) -> int:
        """Bytes of all replaced weights, compressed."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes that the replaced weights took."""
        return sum(layer.dense_bytes for layer in self.layers)


class SparseLinear(nn.Module):
    """A linear layer on a compressed weight. Its tensors are buffers; ``weight`` unpacks them for whoever reads it."""

    mask: Tensor
    values: Tensor
    offsets: Tensor | None
    bias: Tensor | None

    def __init__(self, matrix: Bitmap | NM, bias: Tensor | None, kernel: str = "auto") -> None:
        super().__init__()
        self.in_features, self.out_features = matrix.columns, matrix.rows
        self.register_buffer("mask", matrix.mask)
        self.register_buffer("values", matrix.values)
        self.register_buffer("offsets", matrix.offsets if isinstance(matrix, Bitmap) else None)
        self.register_buffer("bias", bias)
        self._pattern = (matrix.n, matrix.m) if isinstance(matrix, NM) else None
        self._linear = reference.linear if kernel == "reference" else ops.linear
        self._matrix = matrix

    @property
    def matrix(self) -> Bitmap | NM:
        """The weight in its format."""
        return self._matrix

    @property
    def weight(self) -> Tensor:
        """(out, in), unpacked anew."""
        return self._matrix.dense()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return self._linear(x if x.is_contiguous() else x.contiguous(), self._matrix, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """Moves or converts the buffers (``.to``) and takes them up again."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        shape = (self.out_features, self.in_features)
        if self.offsets is None:
            n, m = self._pattern or (1, 1)
            self._matrix = NM(*shape, n, m, self.mask, self.values)
        else:
            self._matrix = Bitmap(*shape, self.mask, self.values, self.offsets)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={_format(self._matrix)}"


@contextmanager
def swapped(model: nn.Module, kind: str = "auto") -> Iterator[Swap]:
    """The block runs with every eligible linear layer of ``model`` on a sparse kernel; then they are put back.

    ``kind``: ``auto`` (the best kernels here) or ``reference`` (torch, on unpacked weights: for checking). The dense
    weights stay in memory meanwhile, to be put back. UserError for another kind, or if no layer is eligible.
    """
    swap = plan(model, kind)
    with installed(model, swap):
        yield swap


def plan(model: nn.Module, kind: str = "auto") -> Swap:
    """Packs the eligible layers without replacing them; ``installed`` does that, as often as wanted."""
    if kind not in KINDS:
        raise UserError(f"kernel={kind}: valid: none, {', '.join(KINDS)}")
    swap = Swap(build.status() if kind == "auto" else "reference")
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        reason = _unfit(module, module is head, uses[id(module.weight)] > 1)
        if reason:
            swap.skipped[name] = reason
            continue
        weight = module.weight.detach()
        matrix = compress(weight)
        bias = None if module.bias is None else module.bias.detach()
        swap.modules[name] = SparseLinear(matrix, bias, kind)
        size = weight.numel() * weight.element_size()
        swap.layers.append(Replaced(name, _format(matrix), matrix.density, matrix.nbytes, size))
    if not swap.layers:
        why = "; ".join(f"{count} {reason}" for reason, count in Counter(swap.skipped.values()).most_common(3))
        raise UserError(f"kernel={kind}: no linear layer to replace ({why or 'the model has none'})")
    return swap


@contextmanager
def installed(model: nn.Module, swap: Swap) -> Iterator[None]:
    """The block runs with the modules of ``swap`` in place of the model's own."""
    dense = {name: model.get_submodule(name) for name in swap.modules}
    try:
        _place(model, swap.modules)
        yield
    finally:
        _place(model, dense)


def compress(weight: Tensor) -> Bitmap | NM:
    """``weight`` (out, in) as n:m if that describes its zeros, else as a bitmap."""
    kept = weight != 0
    density = float(kept.float().mean()) if kept.numel() else 0.0
    for m in _PATTERNS:
        if weight.shape[1] % m or not kept.numel():
            continue
        n = int(kept.reshape(weight.shape[0], -1, m).sum(-1).max())
        if 0 < n < m and n / m - density <= 0.001:  # full groups, but for a few zeros among the kept
            return NM.from_dense(weight, n, m)
    return Bitmap.from_dense(weight)


def _unfit(module: nn.Linear, is_head: bool, shared: bool) -> str | None:
    """Why a layer stays as it is, or None."""
    weight = module.weight
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}"
    if is_head:
        return "the output head"
    if shared:
        return "tied to another parameter"
    if weight.device.type != "cpu":
        return f"on {weight.device.type}"
    if weight.dtype not in ops.CODES:
        return f"in {str(weight.dtype).removeprefix('torch.')}"
    zeros = 1 - float(torch.count_nonzero(weight)) / max(1, weight.numel())
    return None if zeros >= PAYS_FROM else f"less than {PAYS_FROM:.0%} zeros"


def _format(matrix: Any) -> str:
    return f"{matrix.n}:{matrix.m}" if isinstance(matrix, NM) else "bitmap"


def _place(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
