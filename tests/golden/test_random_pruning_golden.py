"""Layer-wise densities against the keep probabilities of the reference (shapes padded with zeros there)."""

from __future__ import annotations

from functools import partial
from math import prod

import pytest
import torch

from sparsebench.methods.weights import allocation

KEPT = r"(?P<name>net\d+)_(?P<rule>uniform|ER|ERK|uniform_plus)_d(?P<density>[\d.]+)"
OUTPUT = r"net\d+_(?!shapes$|names$).*"
RULES = {
    "uniform": allocation.uniform,
    "ER": allocation.er,
    "ERK": allocation.erk,
    "uniform_plus": partial(allocation.uniform_plus, variant="reference"),
}


@pytest.mark.golden("random_pruning", KEPT)
def test_keep_probabilities_are_those_of_the_reference(case):
    shapes = [tuple(size for size in shape if size) for shape in case[f"{case.name}_shapes"].tolist()]
    density = float(case.parts["density"])
    found = RULES[case.parts["rule"]](shapes, density)
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), case.golden, rtol=0, atol=1e-6)
    if case.parts["rule"] != "uniform_plus":
        total = sum(map(prod, shapes))
        assert sum(p * prod(shape) for p, shape in zip(found, shapes, strict=True)) == pytest.approx(density * total)


@pytest.mark.golden("random_pruning", OUTPUT)
def test_no_golden_density_is_left_unread(case):
    assert case.key.split("_d")[0].removeprefix(f"{case.key.split('_')[0]}_") in RULES
