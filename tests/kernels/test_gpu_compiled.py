"""The GPU kernels compile for real GPUs, which the interpreter cannot tell; and nothing needs a GPU to be imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from commands import Command

from sparsebench.kernels import build, gpu, ops
from sparsebench.kernels.formats import NM, Bitmap
from sparsebench.kernels.gpu.layout import SemiStructured, Tiles, refusal, uploaded
from sparsebench.kernels.swap import SparseLinear

CPU = torch.device("cpu")
triton_there = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
W = {"x": "*bf16", "mask": "*i64", "within": "*i16", "starts": "*i64", "values": "*bf16", "bias": "*bf16"}
ATTENTION = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "out": "*bf16", "ptr": "*i32", "idx": "*i32", "scale": "fp32"}
CACHE = {
    "q": "*bf16", "key_words": "*i64", "key_values": "*bf16", "value_words": "*i64", "value_values": "*bf16",
    "recent_keys": "*bf16", "recent_values": "*bf16", "totals": "*fp32", "mosts": "*fp32", "masses": "*fp32",
}  # fmt: skip
KERNELS = {
    "weights.gemv": (W | {"out": "*bf16"}, {"STEP": 4, "ADD_BIAS": True}),
    "weights.gemm": (W | {"out": "*fp32"}, {"TILES": 2, "ADD_BIAS": False, "WIDEN": False}),
    "weights.unpack": (W | {"out": "*bf16"}, {}),
    "columns.skipping": (
        {"x": "*bf16", "weight": "*bf16", "bias": "*bf16", "out": "*bf16", "threshold": "fp32"},
        {"OUTPUTS": 128, "INPUTS": 16, "ADD_BIAS": True},
    ),
    "blocks.attend": (ATTENTION | {"positions": "*i32"}, {"DIM": 64, "PERMUTED": True, "WIDEN": False}),
    "records.attend": (
        CACHE | {"scale": "fp32"}, {"TOKENS": 32, "WORDS": 1, "DIM": 64, "GROUP": 16, "WIDEN": False}
    ),
    "records.merge": (CACHE | {"out": "*bf16"}, {"PARTS": 8, "DIM": 64}),
    "launch.add_parts": ({"parts": "*fp32", "bias": "*bf16", "out": "*bf16"}, {"HAS_BIAS": True, "BLOCK": 256}),
}  # fmt: skip


@triton_there
@pytest.mark.skipif(gpu.interpreted(), reason="Triton interprets")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("capability", [80, 90])  # an A100, an H100
def test_compiles_for_real_gpus(capability: int, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module, _, function = name.partition(".")
    kernel = getattr(importlib.import_module(f"sparsebench.kernels.gpu.{module}"), function)
    types, constants = KERNELS[name]
    signature = {one: "constexpr" if one in constants else types.get(one, "i32") for one in kernel.arg_names}
    made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"]
    counts = name in ("weights.gemv", "weights.gemm", "records.attend")
    assert not counts or "popc.b32" in made.asm["ptx"]  # the count of bits is one instruction, as `counting` says
    assert made.metadata.shared < 99 * 1024  # what every card has that the kernels are for


@pytest.mark.parametrize(("rows", "columns", "density"), [(1, 1, 1.0), (17, 65, 0.5), (40, 300, 0.0), (16, 64, 0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiles_hold_what_was_packed(rows, columns, density, dtype) -> None:
    kept = torch.rand(rows, columns) < density
    weight = torch.randn(rows, columns).to(dtype) * kept
    weight[0, 0] = 0
    kept[0, 0] = True  # a kept zero stays
    tiles = uploaded(Bitmap.from_dense(weight, kept), CPU)
    assert isinstance(tiles, Tiles) and torch.equal(tiles.dense(), weight)
    assert tiles.stored.numel() == int(kept.sum()) and tiles.density == int(kept.sum()) / weight.numel()


def test_tiles_are_exactly_as_large_as_said() -> None:
    tiles = Tiles.from_dense(torch.randn(64, 256).bfloat16(), torch.rand(64, 256) < 0.5)
    assert tiles.nbytes == 64 * 256 // 8 + 2 * tiles.stored.numel() + 2 * 64 * 4 + 8 * 4 * 4
    with pytest.raises(ValueError, match="a matrix and its mask"):
        Tiles.from_dense(torch.ones(4), torch.ones(4))


def test_without_a_gpu_tiles_take_the_reference_and_convert() -> None:
    weight = torch.randn(9, 70) * (torch.rand(9, 70) < 0.5)
    layer = SparseLinear(Tiles.from_dense(weight), torch.ones(9))
    x = torch.randn(3, 70)
    assert torch.allclose(layer(x), x @ weight.t() + 1, atol=1e-5) and torch.equal(layer.weight, weight)
    half = layer.to(torch.bfloat16)
    assert half.matrix.values.dtype == torch.bfloat16 and half.matrix.mask.dtype == torch.int64
    assert sorted(name for name, _ in half.named_buffers()) == ["bias", "mask", "starts", "values", "within"]


def test_torch_two_of_four_is_refused_in_one_line() -> None:
    def packed(rows: int, columns: int, dtype: torch.dtype, n: int = 2, m: int = 4) -> NM:
        return NM.from_dense(torch.zeros(rows, columns, dtype=dtype), n, m)

    assert refusal(packed(32, 64, torch.bfloat16), CPU) == "needs an NVIDIA GPU, not cpu"
    assert refusal(packed(32, 64, torch.float32), CPU) == "takes float16 and bfloat16, not float32"
    assert refusal(packed(31, 64, torch.float16), CPU) == "needs a multiple of 32 outputs and 64 inputs, not 31 x 64"
    assert refusal(packed(32, 64, torch.float16, 1), CPU) == "the pattern is 1:4"
    with pytest.raises(ValueError, match="2:4 in torch's format: needs an NVIDIA GPU"):
        SemiStructured.from_nm(packed(32, 64, torch.bfloat16), CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("benchmark", ["kernels", "attention"])
def test_no_gpu_is_told(benchmark: str, command: Command) -> None:
    answer = command("bench", benchmark, "device=cuda")
    assert answer.code == 2 and answer.err == "sparsebench: device=cuda: torch sees no GPU here; valid: cpu\n"
    assert build.status("cuda").startswith("reference (no ") and ops.dtypes_on("cuda") == ()
    assert ops.dtypes_on("mps") == () and torch.bfloat16 in ops.dtypes_on("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_two_of_four_on_a_gpu() -> None:
    kept = (torch.rand(64, 32, 4).argsort(-1) < 2).view(64, 128)
    weight = (torch.randn(64, 128) * kept).bfloat16()
    packed = uploaded(NM.from_dense(weight, 2, 4, kept), torch.device("cuda:0"))
    x = torch.randn(2, 5, 128, device="cuda").bfloat16()
    right = torch.nn.functional.linear(x.float(), weight.cuda().float())
    assert isinstance(packed, SemiStructured) and torch.equal(packed.dense().cpu(), weight)
    assert float((ops.linear(x, packed).float() - right).abs().max() / right.abs().max()) < 8e-3
