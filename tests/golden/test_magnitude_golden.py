"""Magnitude against masks of the reference implementation (True = pruned there), exactly."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from sparsebench.methods.weights.base import Layer
from sparsebench.methods.weights.magnitude import Magnitude

MASK = r"(?P<name>.+)_mask_{setting}"
ACHIEVED = r"(?P<name>.+)_actual_sparsity_{setting}"
OUTPUT = r".*_(mask|actual_sparsity)_.*"


def pruned(case):
    module = nn.Linear(1, 1)
    module.weight = nn.Parameter(case[f"{case.name}_weight"])
    return ~Magnitude(**case.options).select(Layer(case.name, module))


@pytest.mark.golden("magnitude", MASK)
def test_mask_is_the_reference_mask(case):
    assert torch.equal(pruned(case), case.golden)


@pytest.mark.golden("magnitude", ACHIEVED, optional=True)
def test_achieved_sparsity_includes_the_ties(case):
    assert float(pruned(case).double().mean()) == pytest.approx(float(case.golden), rel=1e-6)


@pytest.mark.golden("magnitude", OUTPUT)
def test_no_golden_output_is_left_unread(case):
    setting = r"(s\d[\d.]*|\d+of\d+)"
    assert any(re.fullmatch(kind.replace("{setting}", setting), case.key) for kind in (MASK, ACHIEVED))
