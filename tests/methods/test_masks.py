"""Properties of the masks: exact counts, stable ties, n:m for any shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebench.methods.weights import masks
from sparsebench.methods.weights.wanda import keep_variant

SIDES = st.integers(1, 24)
LEVELS = st.floats(0.0, 1.0, exclude_max=True)


@st.composite
def score_matrices(draw, rows=SIDES, columns=SIDES):
    """(out, in) scores of a few distinct values, so that ties are common, or of many."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = draw(st.sampled_from([1, 2, 5, 10_000]))
    return torch.randint(0, values, (draw(rows), draw(columns)), generator=generator).float()


def pruned_first(scores, count):
    """Indices of the smallest scores, lower index first among equals, in plain Python."""
    values = scores.tolist()
    return set(sorted(range(len(values)), key=lambda index: (values[index], index))[:count])


def pruned_of(mask):
    return set((~mask).nonzero().flatten().tolist())


@settings(deadline=None, max_examples=80)
@given(score_matrices(), LEVELS)
def test_every_row_loses_its_smallest_with_ties_from_the_left(scores, level):
    mask = masks.keep_rows(scores, level)
    assert mask.dtype == torch.bool and mask.shape == scores.shape
    for row, kept in zip(scores, mask, strict=True):
        assert pruned_of(kept) == pruned_first(row, int(len(row) * level))


@settings(deadline=None, max_examples=80)
@given(score_matrices(), LEVELS)
def test_a_matrix_loses_exactly_the_count(scores, level):
    count = int(scores.numel() * level)
    assert pruned_of(masks.keep_count(scores, count).flatten()) == pruned_first(scores.flatten(), count)


@settings(deadline=None, max_examples=80)
@given(score_matrices(), LEVELS)
def test_the_published_threshold_takes_all_its_ties(scores, level):
    mask = masks.keep_above_threshold(scores, level)
    if level == 0:
        assert bool(mask.all())
        return
    rank = int(scores.numel() * level)
    threshold = sorted(scores.flatten().tolist())[rank]
    assert torch.equal(mask, scores > threshold)
    assert int((~mask).sum()) >= rank + 1


@settings(deadline=None, max_examples=80)
@given(score_matrices(), st.integers(2, 12), st.data())
def test_n_of_m_holds_in_every_whole_group_of_any_shape(scores, m, data):
    n = data.draw(st.integers(1, m - 1))
    mask = masks.keep_n_of_m(scores, n, m)
    whole = scores.shape[1] // m * m
    assert bool(mask[:, whole:].all())
    for row, kept in zip(scores, mask, strict=True):
        for start in range(0, whole, m):
            assert pruned_of(kept[start : start + m]) == pruned_first(row[start : start + m], m - n)


@settings(deadline=None, max_examples=60)
@given(st.lists(score_matrices(), min_size=1, max_size=4), LEVELS)
def test_a_global_ranking_prunes_the_rounded_count_over_all_matrices(matrices, level):
    scores = {f"layer{index}": matrix for index, matrix in enumerate(matrices)}
    found = masks.keep_global(scores, level)
    assert list(found) == list(scores)
    assert all(found[name].shape == scores[name].shape for name in scores)
    together = torch.cat([mask.flatten() for mask in found.values()])
    everything = torch.cat([matrix.flatten() for matrix in matrices])
    assert pruned_of(together) == pruned_first(everything, round(level * everything.numel()))


@pytest.mark.parametrize(("total", "expected"), [(1, 0), (3, 2), (5, 2), (7, 4)])
def test_a_half_rounds_to_even(total, expected):
    found = masks.keep_global({"only": torch.arange(float(total))[None]}, 0.5)
    assert int((~found["only"]).sum()) == expected


def test_counts_are_truncated_as_in_the_reference():
    assert int((~masks.keep_rows(torch.arange(100.0)[None], 0.29)).sum()) == 28  # 0.29 * 100 = 28.999...


@settings(deadline=None, max_examples=60)
@given(score_matrices(columns=st.integers(4, 24)), st.floats(0.01, 0.8))
def test_the_variant_prunes_a_prefix_of_each_row(scores, level):
    for row, kept in zip(scores, keep_variant(scores, level), strict=True):
        assert not bool((~kept).any()) or row[~kept].max() < row[kept].min() if bool(kept.any()) else True


def test_the_variant_prunes_nothing_at_sparsity_0():
    scores = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
    scores[:, 0] = 0
    assert bool(keep_variant(scores, 0.0).all())
