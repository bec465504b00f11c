"""The GPU kernels against float64, over shapes, densities and dtypes: on a GPU, or in Triton's interpreter.

Not collected by itself: the interpreter must be chosen before Triton is imported, so ``test_gpu_interpreted`` runs this
file in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsebench.errors import UserError
from sparsebench.kernels import build, gpu, ops, reference
from sparsebench.kernels.attention import BlockIndex, Records, block_attention, kv_attention, largest
from sparsebench.kernels.formats import NM, Bitmap, ColumnMajor
from sparsebench.kernels.gpu import launch, weights
from sparsebench.kernels.gpu.layout import Tiles, uploaded
from sparsebench.kernels.swap import swapped

DEVICE = torch.device("cpu" if gpu.interpreted() else "cuda:0")
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # and how far outputs may be off


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter every tensor passes for one on a GPU, so that the dispatch is tested too; nothing may be left
    to the reference."""
    torch.manual_seed(0)
    if gpu.interpreted():
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for name in ("linear", "skipping_linear", "block_attention", "kv_attention"):
        monkeypatch.setattr(reference, name, None)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def agree(got: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == right.shape and got.dtype == dtype
    if got.numel():
        assert float((got.double() - right).abs().max() / right.abs().max().clamp(min=1e-6)) <= DTYPES[dtype]


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("batch", [1, 5, 17])  # each another way
@pytest.mark.parametrize(
    ("rows", "columns", "density"), [(1, 1, 1.0), (17, 65, 0.5), (5, 130, 0.0), (20, 330, 0.7)]
)  # the last sum is cut into parts
def test_bitmap_times_x(dtype, batch, rows, columns, density) -> None:
    kept = torch.rand(rows, columns) < density
    weight = torch.randn(rows, columns).to(dtype) * kept
    x, bias = drawn(batch, columns, dtype=dtype), drawn(rows, dtype=dtype) if rows % 2 else None
    packed = uploaded(Bitmap.from_dense(weight, kept), DEVICE)
    assert torch.equal(packed.dense().cpu(), weight)
    assert batch < 17 or torch.equal(weights.unpacked(packed).cpu(), weight)
    agree(ops.linear(x, packed, bias), product(x, weight.to(DEVICE), bias), dtype)


def test_n_of_m_times_x_and_leading_dimensions(dtype) -> None:
    kept = (torch.rand(24, 32, 4).argsort(-1) < 1).view(24, 128)
    weight = torch.randn(24, 128).to(dtype) * kept
    x = drawn(2, 3, 128, dtype=dtype)
    packed = uploaded(NM.from_dense(weight, 1, 4, kept), DEVICE)
    assert isinstance(packed, Tiles)
    agree(ops.linear(x, packed), product(x, weight.to(DEVICE)), dtype)
    assert ops.linear(x[:0], packed).shape == (0, 3, 24)


def test_a_call_repeats_to_the_bit() -> None:
    packed = Tiles.from_dense(torch.where(torch.rand(20, 330) < 0.5, torch.randn(20, 330), 0).to(DEVICE))
    x = drawn(1, 330, dtype=torch.float32)
    assert launch.splits(2, 2, DEVICE) > 1  # the sum really is cut
    assert torch.equal(ops.linear(x, packed), ops.linear(x, packed))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (140, 65), (30, 530)])
@pytest.mark.parametrize("threshold", [-1.0, 0.6, 9.0])
def test_sparse_inputs(dtype, rows, columns, threshold) -> None:
    weight, x = drawn(rows, columns, dtype=dtype), drawn(1, columns, dtype=dtype)
    bias = drawn(rows, dtype=dtype) if rows % 2 else None
    beyond = torch.where(x.abs() <= threshold, 0, x)
    got = ops.skipping_linear(x, ColumnMajor.from_dense(weight), threshold, bias)
    agree(got, product(beyond, weight, bias), dtype)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "before", "dim", "density", "permuted"),
    [
        (1, 1, 70, 0, 16, 1.0, False), (4, 2, 70, 77, 40, 0.5, False), (2, 2, 100, 1, 64, 0.7, True),
        (2, 1, 64, 0, 7, 0.0, False), (3, 1, 1, 64, 128, 0.6, False),
    ],
)  # fmt: skip
def test_blocks(dtype, heads, kv_heads, queries, before, dim, density, permuted) -> None:
    keys = queries + before
    q = drawn(heads, queries, dim, dtype=dtype)
    k, v = (drawn(kv_heads, keys, dim, dtype=dtype) for _ in range(2))
    mask = (torch.rand(heads, -(-queries // 64), -(-keys // 64)) < density).to(DEVICE)
    positions = torch.stack([torch.randperm(keys) for _ in range(heads)]).int().to(DEVICE) if permuted else None
    got = block_attention(q, k, v, BlockIndex.from_mask(mask, queries, keys), positions=positions)
    at = torch.arange(keys, device=DEVICE).expand(heads, keys) if positions is None else positions
    seen = mask.repeat_interleave(64, 1).repeat_interleave(64, 2)[:, :queries, :keys]
    seen = seen & (at[:, None] <= torch.arange(before, keys, device=DEVICE)[None, :, None])
    wide_k, wide_v = (one.double().repeat_interleave(heads // kv_heads, 0) for one in (k, v))
    weight = (q.double() @ wide_k.mT * dim**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    right = weight.nan_to_num(0) @ wide_v
    assert got.dtype == dtype and float((got.double() - right).abs().max()) <= 4 * DTYPES[dtype]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens", "recent", "dim", "density"),
    [
        (4, 1, 130, 0, 128, 0.5), (6, 2, 40, 33, 64, 0.3), (5, 1, 0, 5, 16, 0.5), (2, 1, 2, 0, 200, 1.0),
        (2, 2, 70, 1, 33, 0.5), (2, 2, 0, 0, 64, 0.5), (1, 1, 40, 0, 130, 0.0), (20, 1, 9, 1, 1, 1.0),
    ],
)  # fmt: skip
def test_cache(heads, kv_heads, tokens, recent, dim, density) -> None:
    dtype = torch.bfloat16 if dim % 2 else torch.float32
    q = drawn(heads, dim, dtype=dtype)
    k, v = (drawn(kv_heads, tokens, dim, dtype=torch.bfloat16) for _ in range(2))
    kept = largest(k, int(density * dim)), (torch.rand(v.shape) < density).to(DEVICE)
    records = [Records.from_dense(one, mask) for one, mask in zip((k, v), kept, strict=True)]
    window = [drawn(kv_heads, recent, dim, dtype=torch.bfloat16) for _ in range(2)] if recent else [None, None]
    got = kv_attention(q, records[0], records[1], *window)
    parts = [(one * mask).double() for one, mask in zip((k, v), kept, strict=True)]
    full = [
        part if one is None else torch.cat([part, one.double()], 1) for part, one in zip(parts, window, strict=True)
    ]
    if not tokens + recent:
        assert not got.any()
        return
    weight = (q.double().view(kv_heads, -1, dim) @ full[0].mT * dim**-0.5).softmax(-1)
    assert got.dtype == dtype and float((got.double() - (weight @ full[1]).view(heads, dim)).abs().max()) <= 4e-2


def test_not_finite() -> None:
    weight = torch.randn(8, 128)
    weight[:, 3] = 0
    x = torch.randn(1, 128)
    x[0, 3] = float("inf")
    packed = Tiles.from_dense(weight.to(DEVICE))
    assert ops.linear(x.to(DEVICE), packed).isnan().all()  # infinity times a pruned zero, as when masked
    assert ops.linear(x.to(DEVICE).repeat(2, 1), packed).isnan().all()
    x[0, 3] = float("nan")
    columns = ColumnMajor.from_dense(torch.randn(8, 128).to(DEVICE))
    assert ops.skipping_linear(x.to(DEVICE), columns, 1.0).isnan().all()  # never dropped
    columns.weight[3] = float("inf")
    x[0, 3] = 0.1
    assert ops.skipping_linear(x.to(DEVICE), columns, 1.0).isfinite().all()  # nor read
    q, k, v = (drawn(1, 130, 16, dtype=torch.float32) for _ in range(3))
    k[0, 100] = float("nan")
    out = block_attention(q, k, v, BlockIndex.from_mask(torch.ones(1, 3, 3, dtype=torch.bool), 130, 130))
    assert out[0, :64].isfinite().all() and out[0, 100:].isnan().all()
    keys = k.bfloat16()
    records = Records.from_dense(keys, torch.ones_like(keys, dtype=torch.bool))
    assert kv_attention(q[:, 0], records, records).isnan().all()


def test_gradients_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    weight = drawn(10, 40, dtype=torch.float32)
    x = torch.randn(2, 40, device=DEVICE, requires_grad=True)
    ops.linear(x, Tiles.from_dense(weight)).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(2, 40), atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_swapped_model_agrees(tokens) -> None:
    shape = LlamaConfig(
        vocab_size=31, hidden_size=48, intermediate_size=70, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).eval().to(DEVICE)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= (torch.rand(module.weight.shape) < 0.5).to(DEVICE)
    ids = torch.randint(31, (1, tokens), device=DEVICE)
    with torch.inference_mode():
        right = model(input_ids=ids).logits
        with swapped(model) as swap:
            layer = model.model.layers[0].mlp.up_proj
            assert {one.format for one in swap.layers} == {"bitmap"} and isinstance(layer.matrix, Tiles)
            got = model(input_ids=ids).logits
    assert float((got - right).abs().max() / right.abs().max()) < 1e-5


def test_status() -> None:
    assert build.status("cuda").startswith("triton ") and gpu.problem() is None
    if gpu.interpreted():
        from sparsebench.kernels.gpu.timing import Place

        with pytest.raises(UserError, match="device=cuda: torch sees no GPU"):
            Place.named("cuda")
