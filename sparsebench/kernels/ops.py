"""Products with compressed weights on torch tensors: the C kernels on the CPU, Triton's on the GPU (``gpu``), the torch
reference where neither can.

The C kernels take float32 and bfloat16 (Triton's: float16 too), inputs and weights in one dtype (``GroupQuantised``:
any of the two), without gradients, up to 16 rows of input; more rows are bound by arithmetic, so there the weights are
unpacked into scratch and torch multiplies. Inputs must be contiguous: ValueError says so, because a silent copy would
hide the cost.

Infinity and NaN: pruned entries are multiplied as zeros, so an infinite input gives NaN in every output, as the dense
product of the masked weight does. ``skipping_linear`` never drops a NaN input. What it drops, what a removed group of
``GroupQuantised`` and what a removed entry of ``Lists`` would have been multiplied with, the C kernels do not touch: an
infinity there stays silent, while the reference, which multiplies by zero, gives NaN. The GPU kernels do in all of
this what the C kernels do.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsebench.kernels import gpu, lists, reference
from sparsebench.kernels.build import Library, library
from sparsebench.kernels.formats import NM, Bitmap, ColumnBitmap, ColumnMajor, Columns, GroupQuantised, Matrix
from sparsebench.kernels.gpu.layout import Packed, SemiStructured, Tiles
from sparsebench.kernels.lists import Lists

MOST_ROWS = 16  # of input, for which a kernel multiplies without unpacking
CODES = {torch.float32: 0, torch.bfloat16: 1}  # number formats, as the C side knows them


def dtypes_on(device: str) -> tuple[torch.dtype, ...]:
    """Of weights that kernels here take on a kind of device ("cpu", "cuda" ...); none where there are no kernels."""
    if device == "cpu":
        return tuple(CODES)
    return gpu.DTYPES if device == "cuda" and gpu.problem() is None else ()


def linear(x: Tensor, weight: Matrix | Packed | Lists, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in), plus bias (out): (..., out) in the dtype of x."""
    _check("linear", x, weight.columns, bias, weight.rows)
    if isinstance(weight, Tiles | SemiStructured):
        return _on_gpu(x, weight, bias)
    kernels = _kernels(x, bias, None if isinstance(weight, GroupQuantised) else weight.values.dtype)
    if kernels is None or (isinstance(weight, Lists) and weight.values.dtype != lists.DTYPE):
        return reference.linear(x, weight, bias)
    rows = x.numel() // max(1, weight.columns)
    if isinstance(weight, GroupQuantised):
        return _groups(kernels, x, weight, bias, rows)
    if rows > MOST_ROWS:
        return functional.linear(x, _unpacked(kernels, weight), bias)
    out = x.new_empty(*x.shape[:-1], weight.rows)
    gemm = kernels.calls.sb_lists_gemm if isinstance(weight, Lists) else kernels.calls.sb_bitmap_gemm
    _run(gemm, *_parts(weight), x.data_ptr(), rows, _pointer(bias), out.data_ptr(), kernels.threads())
    return out


def skipping_linear(x: Tensor, weight: Columns, threshold: float, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in), reading only the weights of inputs with not ``|x| <= threshold``.

    One row of input goes through the kernel; several rows select different inputs and are multiplied densely.
    ``ColumnBitmap`` has kernels on the CPU alone.
    """
    inputs, outputs = weight.columns, weight.rows
    _check("skipping_linear", x, inputs, bias, outputs)
    if isinstance(weight, ColumnBitmap):
        return _strips(x, weight, threshold, bias)
    if x.is_cuda and _one_row(x) and gpu.takes(x, weight.weight, bias):
        from sparsebench.kernels.gpu import columns

        with torch.cuda.device_of(x):
            return columns.linear(x, weight.weight, threshold, bias)
    kernels = _kernels(x, bias, weight.weight.dtype)
    if kernels is None or not _one_row(x):
        return reference.skipping_linear(x, weight, threshold, bias)
    out = x.new_empty(*x.shape[:-1], outputs)
    selected = ctypes.c_int64()
    _run(
        kernels.calls.sb_columns_gemv,
        weight.weight.data_ptr(), CODES[x.dtype], inputs, outputs, x.data_ptr(), threshold, _pointer(bias),
        out.data_ptr(), ctypes.addressof(selected), kernels.threads(),
    )  # fmt: skip
    return out


def unpacked(weight: Bitmap | NM | Lists | ColumnBitmap) -> Tensor:
    """The dense matrix (out, in), by the kernels where there are any; of ``ColumnBitmap`` then a transposed view."""
    kernels = library() if weight.values.dtype in CODES else None
    if kernels is None:
        return weight.dense()
    return _strips_unpacked(kernels, weight) if isinstance(weight, ColumnBitmap) else _unpacked(kernels, weight)


def selected_linear(x: Tensor, weight: Tensor, kept: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) where ``kept`` (out, bool), and 0 elsewhere, where no weight is read.

    One row of input goes through the kernel; several rows are multiplied densely."""
    outputs, inputs = weight.shape
    _check("selected_linear", x, inputs, bias, outputs)
    if kept.shape != (outputs,) or kept.dtype != torch.bool or not kept.is_contiguous():
        raise ValueError(f"selected_linear: kept must be a contiguous vector of {outputs} bools")
    kernels = _kernels(x, bias, weight.dtype)
    if kernels is None or not _one_row(x):
        return reference.selected_linear(x, weight, kept, bias)
    return _rows(kernels, x, weight, kept, bias)


def dense_gemv(x: Tensor, weight: Tensor) -> Tensor:
    """x (in) times weight (out, in): the dense kernel that the sparse ones are compared with. (out)."""
    _check("dense_gemv", x, weight.shape[1], None, weight.shape[0])
    kernels = _kernels(x, None, weight.dtype)
    return functional.linear(x, weight) if kernels is None else _rows(kernels, x, weight, None, None)


def _rows(kernels: Library, x: Tensor, weight: Tensor, kept: Tensor | None, bias: Tensor | None) -> Tensor:
    out = x.new_empty(*x.shape[:-1], len(weight))
    _run(
        kernels.calls.sb_rows_gemv,
        weight.data_ptr(), CODES[x.dtype], *weight.shape, x.data_ptr(), _pointer(kept), _pointer(bias),
        out.data_ptr(), kernels.threads(),
    )  # fmt: skip
    return out


def read(memory: Tensor) -> float:
    """Reads every byte of a contiguous tensor once: what no kernel can be faster than. Returns a sum of them."""
    kernels = library() if memory.device.type == "cpu" else None
    if kernels is None:
        return float(memory.view(torch.float32).sum())
    total = ctypes.c_float()
    size = memory.numel() * memory.element_size()
    _run(kernels.calls.sb_read, memory.data_ptr(), size, ctypes.addressof(total), kernels.threads())
    return total.value


def check_status(name: str, status: int) -> None:
    """MemoryError if a kernel could not get its scratch space."""
    if status:
        raise MemoryError(f"{name}: no memory for scratch space")


def _on_gpu(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    if isinstance(weight, SemiStructured):
        fits = gpu.takes(x, bias) and (x.dtype, x.device) == (weight.compressed.dtype, weight.compressed.device)
        return functional.linear(x, weight.compressed, bias) if fits else reference.linear(x, weight, bias)
    if not gpu.takes(x, weight.values, bias):
        return reference.linear(x, weight, bias)
    from sparsebench.kernels.gpu import weights

    with torch.cuda.device_of(x):  # Triton starts a kernel on the current device, wherever the tensors are
        return weights.linear(x, weight, bias)


def _unpacked(kernels: Library, weight: Bitmap | NM | Lists) -> Tensor:
    out = torch.empty(weight.rows, weight.columns, dtype=weight.values.dtype)
    unpack = kernels.calls.sb_lists_unpack if isinstance(weight, Lists) else kernels.calls.sb_bitmap_unpack
    _run(unpack, *_parts(weight), out.data_ptr(), kernels.threads())
    return out


def _strips(x: Tensor, weight: ColumnBitmap, threshold: float, bias: Tensor | None) -> Tensor:
    kernels = _kernels(x, bias, weight.values.dtype)
    if kernels is None:
        return reference.skipping_linear(x, weight, threshold, bias)
    if not _one_row(x):
        dense = ColumnMajor(_strips_unpacked(kernels, weight).t())
        return reference.skipping_linear(x, dense, threshold, bias)
    out = x.new_empty(*x.shape[:-1], weight.rows)
    _run(
        kernels.calls.sb_strips_gemv,
        *_columns(weight), x.data_ptr(), threshold, _pointer(bias), out.data_ptr(), kernels.threads(),
    )  # fmt: skip
    return out


def _strips_unpacked(kernels: Library, weight: ColumnBitmap) -> Tensor:
    out = torch.empty(weight.columns, weight.rows, dtype=weight.values.dtype)
    _run(kernels.calls.sb_strips_unpack, *_columns(weight), out.data_ptr(), kernels.threads())
    return out.t()


def _columns(weight: ColumnBitmap) -> tuple[Any, ...]:
    """The leading arguments of the strips' kernels."""
    parts = (weight.mask, weight.values, weight.starts, weight.offsets)
    code = CODES[weight.values.dtype]
    return *(part.data_ptr() for part in parts), code, weight.columns, weight.rows, weight.mask.shape[-1]


def _groups(kernels: Library, x: Tensor, weight: GroupQuantised, bias: Tensor | None, rows: int) -> Tensor:
    if rows > MOST_ROWS:
        return reference.linear(x, weight, bias)
    out = x.new_empty(*x.shape[:-1], weight.rows)
    _run(
        kernels.calls.sb_groups_gemm,
        weight.row_ptr.data_ptr(), weight.column.data_ptr(), weight.column.element_size(), weight.codes.data_ptr(),
        weight.scale.data_ptr(), weight.zero.data_ptr(), weight.group, weight.rows, weight.columns, CODES[x.dtype],
        x.data_ptr(), rows, _pointer(bias), out.data_ptr(), kernels.threads(),
    )  # fmt: skip
    return out


def _parts(weight: Bitmap | NM | Lists) -> tuple[Any, ...]:
    """The leading arguments of the kernels of a bitmap, or of lists."""
    if isinstance(weight, Lists):
        parts = (weight.steps, weight.masks, weight.index, weight.values, weight.starts)
        return *(part.data_ptr() for part in parts), weight.rows, weight.columns
    where = (weight.offsets.data_ptr(), 0) if isinstance(weight, Bitmap) else (None, weight.per_group)
    code = CODES[weight.values.dtype]
    return weight.mask.data_ptr(), weight.values.data_ptr(), *where, code, weight.rows, weight.columns


def _kernels(x: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Library | None:
    """The C kernels if they can take these tensors; ``dtype``: the weight's (None: any)."""
    fits = (
        x.device.type == "cpu"
        and x.dtype in CODES
        and dtype in (None, x.dtype)
        and (bias is None or bias.dtype == x.dtype)
        and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
    )
    return library() if fits else None


def _check(name: str, x: Tensor, inputs: int, bias: Tensor | None, outputs: int) -> None:
    if x.ndim == 0 or x.shape[-1] != inputs:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}, the weight takes {inputs} inputs")
    if not x.is_contiguous():
        raise ValueError(f"{name}: x must be contiguous (its strides are {x.stride()}); call x.contiguous()")
    if bias is not None and (bias.shape != (outputs,) or not bias.is_contiguous()):
        raise ValueError(f"{name}: bias must be a contiguous vector of {outputs}")


def _one_row(x: Tensor) -> bool:
    return x.shape[:-1].numel() == 1


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _run(function: Any, *arguments: Any) -> None:
    check_status(function.__name__, function(*arguments))
