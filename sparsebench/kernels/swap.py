"""Runs a sparse model on sparse kernels: its pruned linear layers are replaced, and put back afterwards.

Quality is measured on the masked model; milliseconds on the swapped one. A layer is replaced if it is a plain
``nn.Linear`` in float32 or bfloat16 (on a GPU with Triton: or float16), neither the output head nor tied to another
parameter, and sparse enough to pay: a dense kernel at memory speed is faster than the bitmap below about 35% zeros.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsebench.errors import UserError
from sparsebench.kernels import build, gpu, ops, reference
from sparsebench.kernels.formats import NM, Bitmap, GroupQuantised, Matrix
from sparsebench.kernels.gpu.layout import Packed, SemiStructured, resident, uploaded
from sparsebench.kernels.lists import Lists, quickest
from sparsebench.kernels.stored import stored_form

KINDS = ("auto", "reference")
PAYS_FROM = 0.35  # zeros / all, from which a bitmap product beats a dense one at batch 1
_PATTERNS = (4, 8, 16, 32)  # the m of the n:m patterns looked for
_SPARE = 0.001  # zeros / all among the kept of an n:m pattern
_LOOK = 16  # rows that are looked at first


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

    bias: Tensor | None

    def __init__(self, matrix: Matrix | Packed | Lists, bias: Tensor | None, kernel: str = "auto") -> None:
        super().__init__()
        self.in_features, self.out_features = matrix.columns, matrix.rows
        self._parts: list[str] = []
        self._hold(matrix)
        self.register_buffer("bias", bias)
        self._linear = reference.linear if kernel == "reference" else ops.linear

    @property
    def matrix(self) -> Matrix | Packed | Lists:
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
        """Moves or converts the buffers (``.to``) and takes them up again, in the format of their device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if isinstance(self._matrix, GroupQuantised):  # part of the format, whatever the model's dtype
            for name in ("scale", "zero"):
                setattr(self, name, getattr(self, name).half())
        self._hold(resident(replace(self._matrix, **{name: getattr(self, name) for name in self._parts})))
        return self

    def _hold(self, matrix: Matrix | Packed | Lists) -> None:
        """Makes the tensors of ``matrix`` the module's buffers."""
        for name in self._parts:
            delattr(self, name)
        self._parts = [name for name, part in vars(matrix).items() if isinstance(part, Tensor)]
        for name in self._parts:
            self.register_buffer(name, getattr(matrix, name))
        self._matrix = matrix

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={format_of(self._matrix)}"


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
    """Packs the eligible layers without replacing them; ``installed`` does that, as often as wanted. UserError for
    another kind, or if no layer is eligible."""
    if kind not in KINDS:
        raise UserError(f"kernel={kind}: valid: none, {', '.join(KINDS)}")
    swap = packed(model, kind)
    if not swap.layers:
        why = "; ".join(f"{count} {reason}" for reason, count in Counter(swap.skipped.values()).most_common(3))
        raise UserError(f"kernel={kind}: no linear layer to replace ({why or 'the model has none'})")
    return swap


def packed(model: nn.Module, kind: str = "auto", leave: Collection[str] = ()) -> Swap:
    """``plan`` of the layers not named in ``leave``, which may be none."""
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    swap = Swap(build.status(device) if kind == "auto" else "reference")
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name in leave:
            continue
        form = stored_form(module, module.weight)
        groups = None if form is None else form.matrix  # what a method quantised runs as it is
        reason = _unfit(module, module is head, uses[id(module.weight)] > 1, groups is None)
        if reason:
            swap.skipped[name] = reason
            continue
        weight = module.weight.detach()
        small = compress(weight) if groups is None else groups
        matrix: Matrix | Packed | Lists = quickest(small) if kind == "auto" else small
        if weight.is_cuda and isinstance(small, Bitmap | NM):
            matrix = uploaded(small, weight.device)
        bias = None if module.bias is None else module.bias.detach()
        swap.modules[name] = SparseLinear(matrix, bias, kind)
        size = weight.numel() * weight.element_size()
        swap.layers.append(Replaced(name, format_of(matrix), matrix.density, matrix.nbytes, size))
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


def compress(weight: Tensor, kept: Tensor | None = None) -> Bitmap | NM:
    """``weight`` (out, in) as n:m if that describes its zeros, else as a bitmap; ``kept``: as in ``Bitmap``."""
    kept = weight != 0 if kept is None else kept
    density = int(torch.count_nonzero(kept)) / max(1, kept.numel())
    for m in _PATTERNS:
        if weight.shape[1] % m or not kept.numel():
            continue
        if _most(kept[:_LOOK], m) / m - density > _SPARE:  # enough for most matrices that have no pattern
            continue
        n = _most(kept, m)
        if 0 < n < m and n / m - density <= _SPARE:  # full groups, but for a few zeros among the kept
            return NM.from_dense(weight, n, m, kept)
    return Bitmap.from_dense(weight, kept)


def _most(kept: Tensor, m: int) -> int:
    """The most that a group of ``m`` columns keeps."""
    return int(kept.reshape(kept.shape[0], -1, m).sum(-1, dtype=torch.uint8).max())


def _unfit(module: nn.Linear, is_head: bool, shared: bool, zeros_must_pay: bool) -> str | None:
    """Why a layer stays as it is, or None."""
    weight = module.weight
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}"
    if is_head:
        return "the output head"
    if shared:
        return "tied to another parameter"
    device = weight.device.type
    taken = ops.dtypes_on(device)
    if not taken:
        return f"on {device}" + (f" ({gpu.problem()})" if device == "cuda" else "")
    if device == "cuda" and not zeros_must_pay:
        return "in 4-bit groups, for which there is no GPU kernel"
    if weight.dtype not in taken:
        return f"in {str(weight.dtype).removeprefix('torch.')}"
    return None if pays(weight) or not zeros_must_pay else f"less than {PAYS_FROM:.0%} zeros"


def pays(weight: Tensor) -> bool:
    """Whether a bitmap of a weight is faster than the weight."""
    return 1 - float(torch.count_nonzero(weight)) / max(1, weight.numel()) >= PAYS_FROM


def format_of(matrix: Matrix | Packed | Lists) -> str:
    """``bitmap``, ``lists``, ``2:4`` and the like, or ``4-bit groups``."""
    if isinstance(matrix, Lists):
        return "lists"
    if isinstance(matrix, GroupQuantised):
        return "4-bit groups"
    if isinstance(matrix, SemiStructured):
        return "2:4"
    return f"{matrix.n}:{matrix.m}" if isinstance(matrix, NM) else "bitmap"


def _place(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
