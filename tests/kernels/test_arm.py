"""The C kernels as 64-bit ARM runs them, against float64: cross-compiled, and run by an emulator where there is one.

Debian and Ubuntu have both: ``gcc-aarch64-linux-gnu`` and ``qemu-user``. Elsewhere these tests are skipped; on an ARM
machine the other tests run the kernels themselves.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparsebench.kernels import build, ops, reference
from sparsebench.kernels.attention import BlockIndex, Records, largest
from sparsebench.kernels.formats import NM, Bitmap, ColumnBitmap, GroupQuantised
from sparsebench.kernels.lists import Lists

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
AGREE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # of the largest output
DTYPES = list(AGREE)
Out = Tensor  # given to a call to be written
Run = Callable[..., None]

pytestmark = pytest.mark.skipif(not (COMPILER and EMULATOR), reason="no compiler and emulator of 64-bit ARM")


@pytest.fixture(scope="module", params=["neon", "portable"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Calls a kernel by name: tensors are its arrays (None: NULL), ``out`` is the place of the one that is written."""
    program = tmp_path_factory.mktemp("arm") / "call"
    sources = [*sorted(build.SOURCES.glob("*.c")), Path(__file__).parent / "call_kernel.c"]
    flags = [flag for flag in build._COMMON if flag not in ("-shared", "-fvisibility=hidden")]
    words = [COMPILER, *flags, *build._FLAGS[request.param], "-static", "-fopenmp", f"-I{build.SOURCES}"]
    subprocess.run([*words, *sources, "-o", program, "-lm"], check=True, capture_output=True, timeout=100)

    def call(name: str, *arguments: Tensor | int | None, out: int, number: float = 0.0) -> None:
        message = struct.pack("<32sfq", name.encode(), number, len(arguments))
        for place, one in enumerate(arguments):
            if isinstance(one, Tensor):
                octets = one.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                message += struct.pack("<qq", 2 if place == out else 1, len(octets)) + octets
            else:
                message += struct.pack("<qq", 0, one or 0)
        done = subprocess.run([EMULATOR, program], input=message, check=True, capture_output=True, timeout=100)
        written = arguments[out]
        assert isinstance(written, Tensor)
        given = torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8)
        written.copy_(given.view(written.dtype).view(written.shape))

    return call


def agree(got: Tensor, right: Tensor) -> None:
    assert float((got.double() - right).abs().max()) <= AGREE[got.dtype] * float(right.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "density"), [(1, 0.5), (1, 1.0), (3, 0.0), (7, 0.4), (16, 0.05), (11, 0.05)])
def test_bitmap(run: Run, dtype: torch.dtype, batch: int, density: float) -> None:
    kept = torch.rand(37, 1093) < density
    weight, x, bias = torch.randn(37, 1093).to(dtype) * kept, torch.randn(batch, 1093).to(dtype), torch.randn(37)
    packed, bias = Bitmap.from_dense(weight, kept), bias.to(dtype)
    y, whole = torch.empty(batch, 37, dtype=dtype), torch.empty(37, 1093, dtype=dtype)
    head = (packed.mask, packed.values, packed.offsets, 0, ops.CODES[dtype], 37, 1093)
    run("sb_bitmap_gemm", *head, x, batch, bias, y, 2, out=10)
    right = functional.linear(x.double(), weight.double(), bias.double())
    assert float((y.double() - right).abs().max()) <= AGREE[dtype] * float(right.abs().max())
    run("sb_bitmap_unpack", *head, whole, 2, out=7)
    assert torch.equal(whole, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_n_of_m(run: Run, dtype: torch.dtype) -> None:
    weight, x = torch.randn(9, 132).to(dtype), torch.randn(1, 132).to(dtype)
    weight *= torch.tensor([1, 0, 1, 0]).repeat(9, 33).to(dtype)
    packed, y = NM.from_dense(weight, 2, 4), torch.empty(1, 9, dtype=dtype)
    head = (packed.mask, packed.values, None, packed.per_group, ops.CODES[dtype], 9, 132)
    run("sb_bitmap_gemm", *head, x, 1, None, y, 1, out=10)
    agree(y, x.double() @ weight.double().t())


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_and_outputs_that_are_skipped(run: Run, dtype: torch.dtype) -> None:
    kept, code = torch.rand(4203, 61) < 0.4, ops.CODES[dtype]
    weight, x = torch.randn(4203, 61).to(dtype), torch.randn(1, 61).to(dtype)
    beyond, y = torch.where(x.abs() <= 0.5, 0, x).double(), torch.empty(1, 4203, dtype=dtype)
    run(
        "sb_columns_gemv", weight.t(), code, 61, 4203, x, None, y, torch.zeros(1, dtype=torch.int64), 2, out=6,
        number=0.5,
    )  # fmt: skip
    agree(y, beyond @ weight.double().t())
    both = ColumnBitmap.from_dense(weight * kept, kept)
    head = (both.mask, both.values, both.starts, both.offsets, code, 61, 4203, both.mask.shape[-1])
    run("sb_strips_gemv", *head, x, None, y, 3, out=10, number=0.5)
    agree(y, beyond @ (weight * kept).double().t())
    whole = torch.empty(61, 4203, dtype=dtype)
    run("sb_strips_unpack", *head, whole, 3, out=8)
    assert torch.equal(whole.t(), weight * kept)
    needed = torch.rand(4203) < 0.5
    run("sb_rows_gemv", weight, code, 4203, 61, x, needed.to(torch.uint8), None, y, 2, out=7)
    agree(y, torch.where(needed, x.double() @ weight.double().t(), 0))


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_lists(run: Run, density: float) -> None:
    kept = torch.rand(37, 1093) < density
    weight, x, bias = (
        torch.randn(37, 1093).bfloat16() * kept,
        torch.randn(6, 1093).bfloat16(),
        torch.randn(37).bfloat16(),
    )
    packed, y, whole = Lists.from_dense(weight, kept), torch.empty(6, 37).bfloat16(), torch.empty(37, 1093).bfloat16()
    head = (packed.steps, packed.masks, packed.index, packed.values, packed.starts, 37, 1093)
    run("sb_lists_gemm", *head, x, 6, bias, y, 2, out=10)
    agree(y, functional.linear(x.double(), weight.double(), bias.double()))
    run("sb_lists_unpack", *head, whole, 2, out=7)
    assert torch.equal(whole, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_four_bits(run: Run, dtype: torch.dtype) -> None:
    packed = GroupQuantised.from_dense(torch.randn(21, 96), torch.rand(21, 6) < 0.5)
    x, y = torch.randn(3, 96).to(dtype), torch.empty(3, 21, dtype=dtype)
    parts = (packed.row_ptr, packed.column, packed.column.element_size(), packed.codes, packed.scale, packed.zero)
    run("sb_groups_gemm", *parts, 16, 21, 96, ops.CODES[dtype], x, 3, None, y, 2, out=13)
    agree(y, x.double() @ packed.dense().double().t())


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(run: Run, dtype: torch.dtype) -> None:
    q = torch.randn(4, 80).to(dtype)
    k, v = torch.randn(2, 2, 300, 80).bfloat16()
    keys, values = (Records.from_dense(one, largest(one, 40)) for one in (k, v))
    y = torch.empty(4, 80, dtype=dtype)
    run(
        "sb_kv_attention", q, ops.CODES[dtype], 4, 2, 80, keys.data, values.data, keys.stride, values.stride,
        keys.capacity, keys.tokens, k[:, :9], v[:, :9], 9, y, 2, out=14, number=80**-0.5,
    )  # fmt: skip
    agree(y, reference.kv_attention(q.float(), keys, values, k[:, :9], v[:, :9], 80**-0.5).double())
    prompt = torch.randn(2, 130, 40).to(dtype)
    index = BlockIndex.from_mask(torch.rand(2, 3, 3) < 0.7, 130, 130)
    y = torch.empty_like(prompt)
    run(
        "sb_blocks_attention", prompt, prompt, prompt, ops.CODES[dtype], 2, 2, 130, 130, 40, 0, index.ptr, index.idx,
        None, y, 2, out=13, number=40**-0.5,
    )  # fmt: skip
    agree(y, reference.block_attention(*(prompt.double(),) * 3, index, 40**-0.5))
