"""Products with compressed weights against float64, over shapes, densities, dtypes, batches and threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsebench.errors import UserError
from sparsebench.kernels import ops
from sparsebench.kernels.formats import BLOCK, NM, STRIP, Bitmap, ColumnBitmap, ColumnMajor, GroupQuantised, popcount
from sparsebench.kernels.lists import Lists, bitmap_of, listed, pays, quickest

AGREE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # of the largest output; bfloat16 outputs are rounded to 2^-9
DTYPES = list(AGREE)
CASES = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
SHAPES = st.tuples(
    st.one_of(st.sampled_from([1, 3, 4, 5]), st.integers(1, 70)),
    st.one_of(st.sampled_from([1, 63, 64, 65, 511, 513]), st.integers(1, 700)),
)
DENSITIES = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


def agree(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    right = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    error = (got.double() - right).abs().max() / right.abs().max().clamp(min=1e-6) if got.numel() else torch.tensor(0)
    assert got.shape == right.shape and got.dtype == x.dtype
    assert float(error) <= AGREE[x.dtype]


def parts(packed: Bitmap) -> list[Tensor]:
    return [one for one in vars(packed).values() if isinstance(one, Tensor)]


def drawn(shape: tuple[int, int], density: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, kept = torch.randn(shape).to(dtype), torch.rand(shape) < density
    return weight * kept, kept


@pytest.mark.parametrize("dtype", DTYPES)
@CASES
@given(SHAPES, DENSITIES, st.integers(1, 20), st.integers(1, 3), st.integers(0, 2**31))
def test_bitmap_times_x(isa, dtype, shape, density, batch, threads, seed) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    weight, kept = drawn(shape, density, dtype)
    packed = Bitmap.from_dense(weight, kept)
    x = torch.randn(batch, shape[1]).to(dtype)
    bias = torch.randn(shape[0]).to(dtype) if batch % 2 else None
    assert torch.equal(packed.dense(), weight) and torch.equal(ops.unpacked(packed), weight)
    agree(ops.linear(x, packed, bias), x, weight, bias)


@CASES
@given(SHAPES, st.one_of(DENSITIES, st.floats(0, 0.2)), st.integers(1, 20), st.integers(1, 3), st.integers(0, 2**31))
def test_lists_times_x(isa, shape, density, batch, threads, seed) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    weight, kept = drawn(shape, density, torch.bfloat16)
    packed = Lists.from_dense(weight, kept)
    x = torch.randn(batch, shape[1]).bfloat16()
    bias = torch.randn(shape[0]).bfloat16() if batch % 2 else None
    assert torch.equal(packed.dense(), weight) and torch.equal(ops.unpacked(packed), weight)
    assert packed.stored.numel() == int(kept.sum())
    agree(ops.linear(x, packed, bias), x, weight, bias)


def test_lists_and_bitmaps_hold_the_same() -> None:
    kept = torch.rand(45, 200) < 0.1
    bitmap = Bitmap.from_dense(torch.randn(45, 200).bfloat16() * (torch.rand(45, 200) < 0.5), kept)
    again = bitmap_of(listed(bitmap))  # zeros that were kept stay
    assert all(torch.equal(a, b) for a, b in zip(parts(bitmap), parts(again), strict=True))
    assert isinstance(quickest(bitmap), Lists) == pays(0.9)
    assert quickest(Bitmap.from_dense(torch.randn(45, 200), kept)).values.dtype == torch.float32  # no lists of these
    assert not isinstance(quickest(Bitmap.from_dense(torch.randn(45, 200).bfloat16())), Lists)


@pytest.mark.parametrize("dtype", DTYPES)
@CASES
@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([(2, 4), (1, 4), (4, 8), (3, 16), (2, 2)]), st.data())
def test_n_of_m_times_x(isa, dtype, rows, width, pattern, data) -> None:
    n, m = pattern
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    order = torch.rand(rows, width, m).argsort(-1)
    kept = (order < data.draw(st.integers(0, n))).view(rows, width * m)
    weight = torch.randn(rows, width * m).to(dtype) * kept
    packed = NM.from_dense(weight, n, m, kept)
    x = torch.randn(data.draw(st.sampled_from([1, 3, 5, 17])), width * m).to(dtype)
    assert torch.equal(packed.dense(), weight)
    assert int(popcount(packed.mask).sum()) == packed.stored.numel() == rows * width * n
    agree(ops.linear(x, packed), x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES)
@CASES
@given(SHAPES, DENSITIES, st.integers(1, 3), st.integers(0, 2**31))
def test_sparse_inputs(isa, dtype, shape, density, threads, seed) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    weight, x = torch.randn(shape).to(dtype), torch.randn(1, shape[1]).to(dtype)
    threshold = float(x.abs().float().quantile(1 - density))
    bias = torch.randn(shape[0]).to(dtype) if seed % 2 else None
    beyond = torch.where(x.abs() <= threshold, 0, x)
    agree(ops.skipping_linear(x, ColumnMajor.from_dense(weight), threshold, bias), beyond, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@CASES
@given(
    st.one_of(SHAPES, st.sampled_from([(BLOCK * STRIP, 5), (BLOCK * STRIP + 1, 3), (2 * BLOCK * STRIP + 70, 2)])),
    DENSITIES,
    DENSITIES,
    st.integers(1, 5),
    st.integers(0, 2**31),
)
def test_sparse_weights_on_sparse_inputs(isa, dtype, shape, density, share, threads, seed) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    weight, kept = drawn(shape, density, dtype)
    packed = ColumnBitmap.from_dense(weight, kept)
    assert torch.equal(packed.dense(), weight) and torch.equal(ops.unpacked(packed), weight)
    assert packed.stored.numel() == int(kept.sum()) == int(popcount(packed.mask).sum())
    for rows in (1, 3):
        x = torch.randn(rows, shape[1]).to(dtype)
        threshold = float(x.abs().float().quantile(1 - share))
        bias = torch.randn(shape[0]).to(dtype) if seed % 2 else None
        beyond = torch.where(x.abs() <= threshold, 0, x)
        agree(ops.skipping_linear(x, packed, threshold, bias), beyond, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@CASES
@given(SHAPES, DENSITIES, st.integers(1, 3), st.integers(0, 2**31))
def test_selected_outputs(isa, dtype, shape, density, threads, seed) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    weight, x, kept = torch.randn(shape).to(dtype), torch.randn(1, shape[1]).to(dtype), torch.rand(shape[0]) < density
    bias = torch.randn(shape[0]).to(dtype) if seed % 2 else None
    left = None if bias is None else torch.where(kept, bias, 0)
    agree(ops.selected_linear(x, weight, kept, bias), x, torch.where(kept[:, None], weight, 0), left)
    agree(ops.dense_gemv(x[0], weight), x[0], weight, None)


@pytest.mark.parametrize("dtype", DTYPES)
@CASES
@given(
    st.integers(1, 40), st.integers(1, 9), st.sampled_from([4, 8, 16, 32, 12]), DENSITIES, st.integers(1, 3), st.data()
)
def test_groups_of_four_bits(isa, dtype, rows, width, group, density, threads, data) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    torch.set_num_threads(threads)
    packed = GroupQuantised.from_dense(torch.randn(rows, width * group), torch.rand(rows, width) < density, group)
    x = torch.randn(data.draw(st.sampled_from([1, 2, 17])), width * group).to(dtype)
    agree(ops.linear(x, packed), x, packed.dense(), None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_threads_change_no_bit(isa, dtype, batch) -> None:
    weight, kept = drawn((301, 1030), 0.4, dtype)
    packed, dense = Bitmap.from_dense(weight, kept), ColumnMajor.from_dense(weight)
    both = ColumnBitmap.from_dense(weight, kept)
    groups = GroupQuantised.from_dense(torch.randn(99, 256), torch.rand(99, 16) < 0.5)
    x = torch.randn(batch, 1030).to(dtype)
    results = []
    few = Bitmap.from_dense(weight, kept & (torch.rand(kept.shape) < 0.1))
    listing = listed(few) if dtype == torch.bfloat16 else few
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        narrow = x[:, :256].contiguous()
        skipped = [ops.skipping_linear(x[:1], one, 0.5) for one in (dense, both)]
        products = [ops.linear(x, one) for one in (packed, few, listing)]
        results.append((*products, *skipped, ops.linear(narrow, groups)))
    if isa != "reference":  # torch promises no such thing
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_kept_zeros_stay(isa) -> None:
    kept = torch.rand(9, 70) < 0.5
    packed = Bitmap.from_dense(torch.zeros(9, 70), kept)
    assert packed.stored.numel() == int(kept.sum()) == int(popcount(packed.mask).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [2, 5, 8, 9, 13, 16])
def test_batches_of_very_sparse_weights(isa, dtype, batch) -> None:
    weight, kept = drawn((139, 1300), 0.02, dtype)
    weight[:, 7] = kept[:, 7] = 0
    packed = Bitmap.from_dense(weight, kept)
    x, bias = torch.randn(batch, 1300).to(dtype), torch.randn(139).to(dtype)
    agree(ops.linear(x, packed, bias), x, weight, bias)
    x[1, 7] = float("inf")
    assert ops.linear(x, packed)[1].isnan().all() and ops.linear(x, packed)[0].isfinite().all()


def test_not_finite(isa) -> None:
    weight, _ = drawn((8, 128), 0.5, torch.float32)
    weight[:, 3] = 0
    x = torch.randn(1, 128)
    x[0, 3] = float("inf")
    assert ops.linear(x, Bitmap.from_dense(weight)).isnan().all()  # infinity times a pruned zero, as when masked
    assert ops.skipping_linear(x, ColumnBitmap.from_dense(weight), 1.0).isnan().all()
    removed = ops.linear(x.bfloat16(), Lists.from_dense(weight.bfloat16()))
    assert isa == "reference" or removed.isfinite().all()  # nothing that was removed is multiplied
    x[0, 3] = float("nan")
    assert ops.skipping_linear(x, ColumnMajor.from_dense(torch.randn(8, 128)), 1.0).isnan().all()  # never dropped
    assert ops.skipping_linear(x, ColumnBitmap.from_dense(weight), 1.0).isnan().all()
    weight = torch.randn(8, 128)
    weight[2, 3] = float("inf")
    x[0, 3] = 0.1
    rows = ops.selected_linear(x, weight, torch.arange(8) != 2)
    assert rows.isfinite().all() and rows[0, 2] == 0  # nor what is in a row that is not needed
    for columns in (ColumnMajor.from_dense(weight), ColumnBitmap.from_dense(weight)):
        got = ops.skipping_linear(x, columns, 1.0)
        assert isa == "reference" or got.isfinite().all()  # the kernel does not read what is behind a dropped input


def test_sizes_are_exact() -> None:
    weight = torch.randn(64, 256).bfloat16()
    half = NM.from_dense(weight, 2, 4, torch.tensor([True, True, False, False]).repeat(64, 64))
    assert half.nbytes == weight.numel() * 2 * 9 // 16
    packed = Bitmap.from_dense(weight, torch.rand(64, 256) < 0.5)
    assert packed.nbytes == weight.numel() // 8 + 2 * packed.stored.numel() + 8 * 17
    both = ColumnBitmap.from_dense(weight, torch.rand(64, 256) < 0.5)
    assert both.nbytes == weight.numel() // 8 + 2 * both.stored.numel() + 4 * 256 + 8  # one strip, one mark per input
    one = Lists.from_dense(weight, torch.arange(256).expand(64, 256) % 64 == 5)  # a step per slice and chunk
    assert one.nbytes == 4 * 4 * (1 + 4) + 64 * 4 * (1 + 2) + 5 * 2 * 8
    groups = GroupQuantised.from_dense(weight, torch.ones(64, 16, dtype=torch.bool))
    assert groups.nbytes == 64 * 16 * (8 + 2 + 2 + 2) + 65 * 4


def test_rounding_to_four_bits() -> None:
    weight = torch.randn(6, 64)
    weight[0, :16] = 0.75  # a constant group
    weight[1, :16] = torch.arange(16) * 0.5 - 2  # on the grid already
    packed = GroupQuantised.from_dense(weight, torch.ones(6, 4, dtype=torch.bool))
    step = packed.scale.float().view(6, 4).repeat_interleave(16, 1)
    error = (packed.dense() - weight).abs()
    assert (error <= step * 1.01).all() and not error[0, :16].any() and not error[1, :16].any()


def test_leading_dimensions_and_no_rows(isa) -> None:
    weight, kept = drawn((10, 40), 0.5, torch.float32)
    packed = Bitmap.from_dense(weight, kept)
    x = torch.randn(2, 3, 40)
    agree(ops.linear(x, packed), x, weight, None)
    assert ops.linear(torch.zeros(0, 40), packed).shape == (0, 10)


def test_gradients_take_the_reference(isa) -> None:
    weight, kept = drawn((10, 40), 0.5, torch.float32)
    x = torch.randn(2, 40, requires_grad=True)
    ops.linear(x, Bitmap.from_dense(weight, kept)).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(2, 40), atol=1e-5)


def test_refusals() -> None:
    packed = Bitmap.from_dense(torch.randn(10, 40))
    with pytest.raises(ValueError, match="contiguous"):
        ops.linear(torch.randn(40, 2).t(), packed)
    with pytest.raises(ValueError, match="40 inputs"):
        ops.linear(torch.randn(2, 41), packed)
    with pytest.raises(ValueError, match="bias"):
        ops.linear(torch.randn(2, 40), packed, torch.randn(9))
    with pytest.raises(ValueError, match="keeps more than 2"):
        NM.from_dense(torch.ones(4, 8), 2, 4)
    with pytest.raises(ValueError, match="lists hold bfloat16, not float32"):
        Lists.from_dense(torch.ones(4, 8))
    with pytest.raises(ValueError, match="must divide"):
        NM.from_dense(torch.ones(4, 6), 2, 4)
    with pytest.raises(UserError, match="group_size=16"):
        GroupQuantised.from_dense(torch.ones(4, 40), torch.ones(4, 2, dtype=torch.bool))
