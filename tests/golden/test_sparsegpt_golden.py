"""SparseGPT against the reference implementation (True = pruned there): masks, updated weights, Hessians."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from sparsebench.methods.weights.base import Layer
from sparsebench.methods.weights.hessian import Hessian
from sparsebench.methods.weights.sparsegpt import Grid, SparseGPT

MASK = r"(?P<name>.+?)_mask_{setting}"
WEIGHT = r"(?P<name>.+?)_weight_out_{setting}(_w(?P<bits>\d+))?"
HESSIAN = r"(?P<name>.+)_H"
GRID = r"(?P<name>.+)_w(?P<bits>\d+)_(?P<part>scale|zero)"
OUTPUT = r".*_(mask_.*|weight_out_.*|H|scale|zero)"


def hessian_of(case):
    hessian = Hessian()
    for sequence in case[f"{case.name}_inputs"]:
        hessian.add(sequence[None], 1)
    return hessian


def solved(case, **options):
    module = nn.Linear(1, 1, bias=False)
    module.weight = nn.Parameter(case[f"{case.name}_weight"])
    options |= {"blocksize": int(case[f"{case.name}_blocksize"]), "percdamp": float(case[f"{case.name}_percdamp"])}
    return SparseGPT(**case.options, **options).solve(Layer(case.name, module, hessian_of(case)))


@pytest.mark.golden("sparsegpt", MASK)
def test_mask_is_the_reference_mask(case):
    mask, updated = solved(case)
    assert torch.equal(~mask, case.golden)
    assert torch.equal(updated == 0, case.golden)


@pytest.mark.golden("sparsegpt", WEIGHT)
def test_kept_weights_are_updated_as_in_the_reference(case):
    bits = case.parts["bits"]
    _, updated = solved(case, **({"wbits": int(bits)} if bits else {}))
    torch.testing.assert_close(updated, case.golden, rtol=0, atol=1e-5)
    assert torch.equal(updated == 0, case.golden == 0)


@pytest.mark.golden("sparsegpt", HESSIAN, optional=True)
def test_hessian_is_the_reference_hessian(case):
    together = Hessian()
    inputs = case[f"{case.name}_inputs"]
    together.add(inputs, len(inputs))
    for hessian in (hessian_of(case), together):
        found = hessian.value.diag() if case.golden.ndim == 1 else hessian.value
        torch.testing.assert_close(found, case.golden, rtol=1e-4, atol=1e-5)


@pytest.mark.golden("sparsegpt", GRID, optional=True)
def test_grid_is_the_reference_grid(case):
    grid = Grid.of(case[f"{case.name}_weight"], int(case.parts["bits"]))
    torch.testing.assert_close(getattr(grid, case.parts["part"]), case.golden, rtol=1e-6, atol=0)


@pytest.mark.golden("sparsegpt", OUTPUT)
def test_no_golden_output_is_left_unread(case):
    setting = r"(s\d[\d.]*|\d+of\d+)"
    assert any(re.fullmatch(kind.replace("{setting}", setting), case.key) for kind in (MASK, WEIGHT, HESSIAN, GRID))
