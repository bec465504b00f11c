"""Matrix products with sparse weights or inputs, against dense ones and the byte bound.

Two ratios, because they say different things: against torch's dense product (what a user feels) and against a dense
kernel of our own that runs at memory speed (what sparsity buys; there is none on a GPU). At batch 1 a product is bound
by the bytes it reads: ``bound`` is dense bytes / sparse bytes, and a ratio to our own dense kernel beyond it would be a
measuring error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsebench.bench.base import Report, Say, judged, spread, threads
from sparsebench.costs.paired import NOTE, Call, Measured, columns
from sparsebench.declare import Declared, option
from sparsebench.errors import UserError
from sparsebench.kernels import build, lists, ops
from sparsebench.kernels.formats import NM, Bitmap, ColumnBitmap, ColumnMajor, Columns, GroupQuantised
from sparsebench.kernels.gpu.layout import SemiStructured, uploaded
from sparsebench.kernels.gpu.timing import Place

_MOST = 2**30  # weights of a matrix: several copies of it must fit the memory
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Options(Declared):
    """What to measure."""

    shapes: tuple[str, ...] = option(("4096x4096", "11008x4096", "4096x11008"), "weights, outputs x inputs")
    sparsity: tuple[float, ...] = option((0.5, 0.6, 0.7, 0.8, 0.9), "zeros / all", low=0.0, high=0.99)
    formats: tuple[str, ...] = option(
        ("bitmap", "lists", "2:4", "columns", "csr"),
        "kernels; lists: places and values; columns: sparse inputs; both: bitmap and sparse inputs, each; "
        "w4: 4-bit groups; csr: torch's",
        choices=("bitmap", "lists", "2:4", "columns", "both", "w4", "csr"),
    )
    dtype: str = option("bfloat16", "number format", choices=("bfloat16", "float32"))
    batch: int = option(1, "rows of input", low=1, high=64)
    device: str = option("cpu", "where to run; cuda: with Triton", choices=("cpu", "cuda"))
    threads: int = option(1, "threads", low=1, high=1024)
    isa: str = option(
        "auto", "instruction set", choices=("auto", "avx512", "avx512vbmi2", "avx2", "neon", "portable", "reference")
    )
    repeats: int = option(21, "rounds of pairs", low=3, high=10000)
    seed: int = option(0, "of the random weights", low=0)


@dataclass(frozen=True)
class _Case:
    """One thing to time: ``bytes`` it reads, ``call``, and what its result should be."""

    format: str
    sparsity: float | None
    bytes: int
    call: Call
    right: Tensor


def run(options: Options, say: Say) -> Report:
    """The table: one row per shape and kernel."""
    shapes = [_shape(text) for text in options.shapes]
    place = Place.named(options.device)
    if options.device == "cuda" and options.isa != "auto":
        raise UserError(f"isa={options.isa}: instruction sets are the CPU's; with device=cuda leave it at auto")
    for format, what in (("w4", "4-bit groups"), ("both", "bitmaps and sparse inputs at once")):
        if options.device == "cuda" and format in options.formats:
            raise UserError(f"formats={format}: there is no GPU kernel for {what}; with device=cuda leave it out")
    odd = [text for text, (_, inputs) in zip(options.shapes, shapes, strict=True) if inputs % 4]
    if odd and "2:4" in options.formats:
        raise UserError(
            f"shapes={odd[0]}: 2:4 needs a multiple of 4 inputs; give such shapes, or leave 2:4 out of formats"
        )
    isa = build.best_isa() if options.isa == "auto" else options.isa
    with threads(options.threads), build.using(isa), torch.inference_mode():
        rows = [row for shape in shapes for row in _measured(options, shape, place, say)]
        facts: dict[str, Any] = {
            "kernels": build.status(options.device),
            "processor": place.name,
            **spread(options.threads),
            "dtype": options.dtype,
            "batch": options.batch,
            "torch": torch.__version__,
            "rounds": options.repeats,
        }
    notes = [
        "vs_torch, vs_own: base time / kernel time, median over pairs; own: a dense kernel at memory speed.",
        "bound: dense bytes / bytes read; of_bound: vs_own / bound; of_read: bytes per second / those of a plain read.",
        *(["On a GPU there is no own dense kernel: vs_own is empty."] if options.device == "cuda" else []),
        NOTE,
    ]
    return Report(judged(rows, facts), facts, notes)


def _measured(options: Options, shape: tuple[int, int], place: Place, say: Say) -> list[dict[str, Any]]:
    """Rows of one shape."""
    say(f"{shape[0]}x{shape[1]}: packing")
    torch.manual_seed(options.seed)
    dtype = _DTYPES[options.dtype]
    weight = torch.randn(shape).mul_(shape[1] ** -0.5).to(dtype)
    x = torch.randn(options.batch, shape[1]).to(dtype)
    sparse = (case for format in options.formats for case in _cases(format, weight, x, options, place))
    cases = [*_bases(weight, x, place), *sparse]
    for case in cases:
        _check(case)
    named = {_name(case): case.call for case in cases}
    bases = {name: call for name, call in named.items() if name in ("torch", "own")}
    say(f"{shape[0]}x{shape[1]}: timing {len(named)} kernels")
    result = place.measure(bases, {name: call for name, call in named.items() if name not in bases}, options.repeats)
    return [_row(shape, case, cases[0].bytes, result) for case in cases]


def _row(shape: tuple[int, int], case: _Case, dense: int, result: Measured) -> dict[str, Any]:
    name = _name(case)
    seconds = result.time(name)
    row: dict[str, Any] = {
        "shape": f"{shape[0]}x{shape[1]}", "kernel": case.format, "sparsity": case.sparsity, "ms": 1e3 * seconds,
        "gb_per_s": case.bytes / seconds / 1e9,
    }  # fmt: skip
    row |= columns(result, name, ("torch", "own"))
    row["bound"] = dense / case.bytes
    row["of_bound"] = row["vs_own"] / row["bound"] if row["vs_own"] else None
    row["of_read"] = row["gb_per_s"] * result.time("read") / (dense / 1e9)
    row["verdict"] = result.verdict(row["vs_own"] if case.format != "read" else None, row["bound"])
    return row


def _bases(weight: Tensor, x: Tensor, place: Place) -> list[_Case]:
    size = weight.numel() * weight.element_size()
    right = _product(x, weight)
    weight, x = weight.to(place.device), x.to(place.device)
    dense = place.copies(weight, size, Tensor.clone)
    found = [_Case("torch", None, size, lambda i: functional.linear(x, dense[i % len(dense)]), right)]
    if len(x) == 1 and place.device.type == "cpu":
        row = x[0]
        found.append(_Case("own", None, size, lambda i: ops.dense_gemv(row, dense[i % len(dense)]), right))
    packed = _prepacked(weight, x, size, place) if place.device.type == "cpu" else None
    if packed is not None:
        found.append(_Case("onednn", None, size, packed, right))
    return [*found, _Case("read", None, size, lambda i: place.read(dense[i % len(dense)]), torch.empty(0))]


def _prepacked(weight: Tensor, x: Tensor, size: int, place: Place) -> Call | None:
    """oneDNN on a weight in its own layout, what a frozen compiled model runs; None where torch has none."""
    if weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return None
    reorder, linear = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    try:
        ready = [reorder(one, len(x)) for one in place.copies(weight, size, Tensor.clone)]
        linear(x, ready[0], None, "none", [], "")
    except (
        RuntimeError,
        NotImplementedError,
    ):  # this processor or build has no bf16 oneDNN kernel: the column is left out
        return None
    return lambda i: linear(x, ready[i % len(ready)], None, "none", [], "")


def _cases(format: str, weight: Tensor, x: Tensor, options: Options, place: Place) -> list[_Case]:
    if format == "2:4":
        return [_sparse(format, 0.5, weight, x, place)]
    if format == "lists" and (weight.dtype != lists.DTYPE or place.device.type != "cpu"):
        return []  # there are none
    if format not in ("columns", "both"):
        return [_sparse(format, level, weight, x, place) for level in options.sparsity]
    return [_columns(format, level, weight, x, place) for level in options.sparsity if len(x) == 1]


def _sparse(format: str, sparsity: float, weight: Tensor, x: Tensor, place: Place) -> _Case:
    """Weights of one sparsity in one format."""
    if format == "csr":
        masked = torch.where(torch.rand(weight.shape) >= sparsity, weight, 0).float()
        with warnings.catch_warnings():  # "CSR support is in beta state"
            warnings.simplefilter("ignore", UserWarning)
            matrix = masked.to_sparse_csr().to(place.device)
        size = matrix._nnz() * 8 + 8 * len(weight)
        # one copy: it is larger than any cache at these shapes and never the fast path
        column = x.float().t().contiguous().to(place.device)
        return _Case(format, sparsity, size, lambda i: (matrix @ column).t(), _product(x, masked))
    packed, dense = _packed(format, sparsity, weight)
    given, clone = x.to(place.device), _clone
    if place.device.type == "cuda":
        on_cpu, packed = packed, uploaded(packed, place.device)
        if isinstance(packed, SemiStructured):
            clone = partial(_again, on_cpu)
        elif format == "2:4":
            format = "2:4 as bitmap"
    ready = place.copies(packed, packed.nbytes, clone)
    call = lambda i: ops.linear(given, ready[i % len(ready)])  # noqa: E731
    return _Case(format, sparsity, packed.nbytes, call, _product(x, dense))


def _packed(format: str, sparsity: float, weight: Tensor) -> tuple[Any, Tensor]:
    if format == "w4":
        kept = torch.rand(len(weight), weight.shape[1] // 16) >= sparsity
        groups = GroupQuantised.from_dense(weight, kept, 16)
        return groups, groups.dense()
    if format == "2:4":
        order = torch.rand(len(weight), weight.shape[1] // 4, 4).argsort(-1)
        kept = (order < 2).view(weight.shape)
        return NM.from_dense(weight, 2, 4, kept), weight * kept
    kept = torch.rand(weight.shape) >= sparsity
    made: Any = lists.Lists if format == "lists" else Bitmap
    return made.from_dense(weight, kept), weight * kept


def _columns(format: str, sparsity: float, weight: Tensor, x: Tensor, place: Place) -> _Case:
    """Inputs of one sparsity, and weights too if ``both``; the choice of the inputs is timed with the product."""
    count = int(sparsity * x.numel())
    threshold = float(x.abs().float().flatten().sort().values[count - 1]) if count else -1.0
    if format == "both":
        weight = torch.where(torch.rand(weight.shape) >= sparsity, weight, 0)
    made = ColumnBitmap if format == "both" else ColumnMajor
    matrix: Columns = made.from_dense(weight.to(place.device))
    given = x.to(place.device)
    beyond = torch.where(x.abs() <= threshold, 0, x)
    ready = place.copies(matrix, matrix.nbytes, _clone)
    size = int(torch.count_nonzero(beyond)) * matrix.nbytes // x.numel()
    call: Callable[[int], object] = lambda i: ops.skipping_linear(given, ready[i % len(ready)], threshold)  # noqa: E731
    return _Case(format, sparsity, size, call, _product(beyond, weight))


def _clone(packed: Any) -> Any:
    tensors = {name: value.clone() for name, value in vars(packed).items() if isinstance(value, Tensor)}
    return replace(packed, **tensors)


def _again(packed: NM, made: SemiStructured) -> SemiStructured:
    """Another one like ``made``: torch cannot copy its format."""
    return SemiStructured.from_nm(packed, made.compressed.device)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x.float(), weight.float())


def _check(case: _Case) -> None:
    """A wrong kernel is not timed."""
    got = case.call(0)
    if case.right.numel() and isinstance(got, Tensor):
        error = float((got.float().cpu().reshape(case.right.shape) - case.right).abs().max() / case.right.abs().max())
        if not error < 0.01:
            raise RuntimeError(f"{_name(case)}: wrong by {error:.2g} of the largest output; not timed")


def _name(case: _Case) -> str:
    return case.format if case.sparsity is None else f"{case.format} {case.sparsity:g}"


def _shape(text: str) -> tuple[int, int]:
    outputs, _, inputs = text.partition("x")
    if not (outputs.isdigit() and inputs.isdigit() and int(outputs) and int(inputs)):
        raise UserError(f"shapes={text}: must be outputs x inputs, such as 4096x4096")
    if int(outputs) * int(inputs) > _MOST:
        raise UserError(f"shapes={text}: more than {_MOST} weights")
    return int(outputs), int(inputs)
