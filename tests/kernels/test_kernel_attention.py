"""Block-sparse prefill and pruned-cache decode against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsebench.kernels.attention import BlockIndex, Records, block_attention, kv_attention, largest

CASES = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
DENSITIES = st.sampled_from([0.0, 0.3, 0.7, 1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@CASES
@given(
    st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    st.integers(1, 150),
    st.sampled_from([0, 1, 64, 77]),
    st.sampled_from([1, 7, 16, 40, 64, 80, 128]),
    DENSITIES,
    st.booleans(),
    st.integers(0, 2**31),
)
def test_blocks(isa, dtype, heads, queries, before, dim, density, permuted, seed) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1 + seed % 2)
    (h, kv), keys = heads, queries + before
    q = torch.randn(h, queries, dim).to(dtype)
    k, v = torch.randn(kv, keys, dim).to(dtype), torch.randn(kv, keys, dim).to(dtype)
    mask = torch.rand(h, -(-queries // 64), -(-keys // 64)) < density
    positions = None
    if permuted and h == kv:
        positions = torch.stack([torch.randperm(keys) for _ in range(h)]).int()
    got = block_attention(q, k, v, BlockIndex.from_mask(mask, queries, keys), positions=positions)
    at = torch.arange(keys).expand(h, keys) if positions is None else positions
    seen = mask.repeat_interleave(64, 1).repeat_interleave(64, 2)[:, :queries, :keys]
    seen = seen & (at[:, None] <= torch.arange(before, keys)[None, :, None])
    wide_k, wide_v = (x.double().repeat_interleave(h // kv, 0) for x in (k, v))
    weight = (q.double() @ wide_k.mT * dim**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    right = weight.nan_to_num(0) @ wide_v
    assert got.dtype == dtype
    assert float((got.double() - right).abs().max()) <= (2e-5 if dtype == torch.float32 else 4e-2)


def test_larger_blocks_are_blocks_of_64() -> None:
    mask = torch.tensor([[[True, False], [True, True]]])
    index = BlockIndex.from_mask(mask, 200, 200, 128)
    assert [one.tolist() for one in index.lists(0)] == [[0, 1], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_not_finite_reaches_only_those_who_see_it(isa) -> None:
    q, k, v = (torch.randn(1, 130, 16) for _ in range(3))
    k[0, 100] = float("nan")
    out = block_attention(q, k, v, BlockIndex.from_mask(torch.ones(1, 3, 3, dtype=torch.bool), 130, 130))
    assert out[0, :64].isfinite().all() and out[0, 100:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@CASES
@given(
    st.sampled_from([(1, 1), (2, 1), (8, 2), (6, 2), (5, 1), (4, 4)]),
    st.sampled_from([0, 1, 2, 63, 64, 130, 2100]),
    st.sampled_from([0, 1, 33]),
    st.sampled_from([1, 16, 33, 64, 128, 200]),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.integers(0, 2**31),
)
def test_cache(isa, dtype, heads, tokens, recent, dim, density, seed) -> None:
    torch.manual_seed(seed)
    (h, kv), count = heads, int(density * dim)
    q = torch.randn(h, dim).to(dtype)
    k, v = torch.randn(kv, tokens, dim).bfloat16(), torch.randn(kv, tokens, dim).bfloat16()
    kept = largest(k, count), torch.rand(v.shape) < density
    keys, values = Records.from_dense(k, kept[0]), Records.from_dense(v, kept[1])
    assert torch.equal(keys.dense(), k * kept[0]) and torch.equal(values.dense(), v * kept[1])
    window = [torch.randn(kv, recent, dim).bfloat16() for _ in range(2)] if recent else [None, None]
    got = kv_attention(q, keys, values, *window)
    parts = [(x * m).double() for x, m in zip((k, v), kept, strict=True)]
    full_k, full_v = (
        part if extra is None else torch.cat([part, extra.double()], 1)
        for part, extra in zip(parts, window, strict=True)
    )
    if not full_k.shape[1]:
        assert not got.any()
        return
    right = ((q.double().view(kv, -1, dim) @ full_k.mT * dim**-0.5).softmax(-1) @ full_v).view(h, dim)
    exact = isa != "avx512" and dtype == torch.float32
    assert float((got.double() - right).abs().max()) <= (1e-5 if exact else 4e-2)


def test_records_grow_and_are_exactly_as_large_as_said() -> None:
    x = torch.randn(2, 300, 128).bfloat16()
    kept = largest(x, 64)
    records = Records.empty(2, 128, 64)
    for start in range(0, 300, 7):
        records.append(x[:, start : start + 7], kept[:, start : start + 7])
    assert records.tokens == 300 and records.stride == 144 and records.nbytes == 2 * 300 * 144
    assert torch.equal(records.dense(), x * kept)


def test_threads_change_no_bit(isa) -> None:
    k = torch.randn(2, 5000, 64).bfloat16()
    records, q = Records.from_dense(k, largest(k, 32)), torch.randn(8, 64).bfloat16()
    prompt = torch.randn(2, 300, 64).bfloat16()
    index = BlockIndex.from_mask(torch.rand(2, 5, 5) < 0.6, 300, 300)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((kv_attention(q, records, records), block_attention(prompt, prompt, prompt, index)))
    if isa != "reference":
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_refusals() -> None:
    q = torch.randn(1, 64, 16)
    index = BlockIndex.from_mask(torch.ones(1, 1, 1, dtype=torch.bool), 64, 64)
    with pytest.raises(ValueError, match="contiguous"):
        block_attention(torch.randn(1, 16, 64).mT, q, q, index)
    with pytest.raises(ValueError, match="do not fit"):
        block_attention(q, q, q[:, :63], index)
    with pytest.raises(ValueError, match="outside"):
        BlockIndex(1, 64, 64, torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32))
    with pytest.raises(ValueError, match="more than 2"):
        Records.empty(1, 8, 2).append(torch.ones(1, 1, 8), torch.ones(1, 1, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="dim=300"):
        Records.empty(1, 300, 2)
