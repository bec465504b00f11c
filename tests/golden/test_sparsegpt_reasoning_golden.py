"""Lengths and outcomes of released generations (AWQ 4-bit R1-Distill-Llama-8B) through the report's functions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from sparsebench.tasks.reasoning import lengths


@pytest.mark.golden("sparsegpt_reasoning", r"(?P<name>\w+)_len_chars")
def test_means_over_right_and_wrong_answers(case):
    length, correct = case.arrays[case.key], case.arrays[f"{case.name}_correct"]
    found = lengths.lengths(length, correct)
    right = [int(one) for one, good in zip(length, correct, strict=True) if good]
    wrong = [int(one) for one, good in zip(length, correct, strict=True) if not good]
    assert found.n == len(length)
    assert found.accuracy == pytest.approx(len(right) / len(length))
    assert (found.correct, found.wrong) == pytest.approx((np.mean(right), np.mean(wrong)))
    assert found.per_correct == pytest.approx((sum(right) + sum(wrong)) / len(right))
    if case.name == "temporal" and len(length) == 250:  # what the sheet of these vectors gives
        assert found.accuracy == pytest.approx(0.832)
        assert (found.correct, found.wrong) == pytest.approx((7025.2, 30597.5), abs=0.05)


@pytest.mark.golden("sparsegpt_reasoning", r"(?P<name>\w+)_pred")
def test_outcomes_are_those_of_the_letters(case):
    same = case.arrays[case.key] == case.arrays[f"{case.name}_target"]
    assert np.array_equal(same, case.arrays[f"{case.name}_correct"])


@pytest.mark.golden("sparsegpt_reasoning", r"(?P<name>\w+)_len_chars")
def test_longer_answers_are_wrong_more_often(case):
    length, correct = case.arrays[case.key], case.arrays[f"{case.name}_correct"]
    bins = lengths.accuracy_by_length(length, correct)
    assert sum(one.n for one in bins) == len(length)
    assert sum(one.n * one.accuracy for one in bins) == pytest.approx(correct.sum())
    assert all(a.high < b.low for a, b in pairwise(bins))
    assert bins[-1].accuracy < bins[0].accuracy
    rho = lengths.length_correlation(length, correct)
    assert rho == pytest.approx(stats.pearsonr(stats.rankdata(length), stats.rankdata(correct)).statistic)
    assert rho < 0
