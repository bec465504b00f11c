"""Essential sparsity against masks of the reference pruners (True = pruned there, NofM counts pruned)."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from sparsebench.methods.weights.base import Layer
from sparsebench.methods.weights.essential_sparsity import EssentialSparsity

GLOBAL = r"(?P<name>global)_mask_{setting}"
LAYERWISE = r"(?P<name>layerwise)_mask_{setting}"
N_OF_M = r"nm_mask_{setting}"
PER_LAYER = r"(?P<name>global)_layer_sparsity_{setting}"
DENSITY = r"erk_density_{setting}"
OUTPUT = r".*_(mask|layer_sparsity|density)_.*"


def layers_of(case, name):
    """The matrices that the file holds flattened, one behind the other."""
    shapes = case[f"{name}_shapes"].tolist()
    parts = case[f"{name}_weights"].split([rows * columns for rows, columns in shapes])
    layers = []
    for index, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
        module = nn.Linear(1, 1, bias=False)
        module.weight = nn.Parameter(part.view(*shape))
        layers.append(Layer(f"{name}.{index}", module))
    return layers


def pruned(case, name, **options):
    """What goes of each layer, True = pruned, as the walk asks for it."""
    method = EssentialSparsity(**case.options, **options)
    layers = layers_of(case, name)
    method.check(layers)
    method.prepare(layers)
    ahead = method.select_all(layers)
    return [~(ahead[layer.name] if ahead else method.select(layer)) for layer in layers]


@pytest.mark.golden("essential_sparsity", GLOBAL)
def test_global_mask_is_the_reference_mask(case):
    found = torch.cat([mask.flatten() for mask in pruned(case, "global")])
    assert torch.equal(found, case.golden)
    assert int(found.sum()) == round(case.options["sparsity"] * found.numel())


@pytest.mark.golden("essential_sparsity", PER_LAYER, optional=True)
def test_layers_lose_what_the_ranking_gives(case):
    found = [float(mask.double().mean()) for mask in pruned(case, "global")]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), case.golden, rtol=1e-6, atol=0)


@pytest.mark.golden("essential_sparsity", LAYERWISE, optional=True)
def test_layerwise_mask_is_the_reference_mask(case):
    found = pruned(case, "layerwise", variant="layer")
    assert torch.equal(torch.cat([mask.flatten() for mask in found]), case.golden)


@pytest.mark.golden("essential_sparsity", N_OF_M, optional=True)
def test_n_of_m_mask_is_the_reference_mask(case):
    assert torch.equal(torch.cat([mask.flatten() for mask in pruned(case, "layerwise")]), case.golden)


@pytest.mark.golden("essential_sparsity", DENSITY, optional=True)
def test_erk_densities_are_those_of_the_reference(case):
    layers = layers_of(case, "layerwise")
    levels = EssentialSparsity(**case.options, variant="erk_random").levels(layers)
    found = torch.tensor([1 - levels[layer.name] for layer in layers], dtype=torch.float64)
    torch.testing.assert_close(found, case.golden, rtol=1e-6, atol=0)


@pytest.mark.golden("essential_sparsity", OUTPUT)
def test_no_golden_output_is_left_unread(case):
    setting = r"(s\d[\d.]*|\d+of\d+)"
    kinds = (GLOBAL, LAYERWISE, N_OF_M, PER_LAYER, DENSITY)
    assert any(re.fullmatch(kind.replace("{setting}", setting), case.key) for kind in kinds)
