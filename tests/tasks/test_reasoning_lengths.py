"""Lengths of answers and accuracy over them, on input whose answer is known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsebench.tasks.reasoning import lengths

LENGTHS, CORRECT = [4, 8, 2, 6, 10], [1, 0, 1, 1, 0]


def test_means_by_outcome() -> None:
    found = lengths.lengths(LENGTHS, CORRECT)
    assert (found.accuracy, found.mean, found.correct, found.wrong, found.per_correct) == (0.6, 6, 4, 9, 10)
    never = lengths.lengths([3, 5], [0, 0])
    assert (never.correct, never.wrong, never.per_correct) == (None, 4, None)
    assert lengths.lengths([3, 5], [1, 1]).wrong is None
    with pytest.raises(ValueError, match="one length and one outcome"):
        lengths.lengths([], [])


def test_accuracy_by_length() -> None:
    bins = lengths.accuracy_by_length(LENGTHS, CORRECT, bins=2)
    assert [(one.low, one.high, one.n, one.accuracy) for one in bins] == [(2, 6, 3, 1.0), (8, 10, 2, 0.0)]
    equal = lengths.accuracy_by_length([7, 7, 7, 7, 9], [1, 0, 1, 0, 0], bins=5)
    assert [(one.n, one.accuracy) for one in equal] == [(4, 0.5), (1, 0.0)]
    with pytest.raises(ValueError, match="bins=1"):
        lengths.accuracy_by_length(LENGTHS, CORRECT, bins=1)


@given(st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=60), st.integers(2, 7))
def test_bins_part_all_answers_and_no_equal_lengths(answers: list[tuple[int, bool]], bins: int) -> None:
    length, correct = zip(*answers, strict=True)
    found = lengths.accuracy_by_length(length, correct, bins)
    assert len(found) <= bins and sum(one.n for one in found) == len(answers)
    assert sum(one.n * one.accuracy for one in found) == pytest.approx(sum(correct))
    assert all(a.high < b.low for a, b in pairwise(found))


def test_correlation() -> None:
    assert lengths.length_correlation(LENGTHS, CORRECT) == pytest.approx(-np.sqrt(3) / 2)
    assert lengths.length_correlation([5, 5, 5], [1, 0, 1]) is None
    assert lengths.length_correlation([1, 2, 3], [1, 1, 1]) is None
