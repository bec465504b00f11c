"""PERP's adapters against forward passes, gradients and merges of the reference layers (mask: True = pruned)."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional as F

from sparsebench.methods.weights.adapters import LORA_TYPES

TYPE = "(?P<type>mask_lora|lora_prune)"
FORWARD = rf"(?P<name>.+?)_{TYPE}_forward"
GRADIENT = rf"(?P<name>.+?)_{TYPE}_grad_(?P<factor>[AB])"
MERGED = rf"(?P<name>.+?)_{TYPE}_merged"
SCALE_START = r"(?P<name>.+?)_scale_lora_init_(?P<factor>[AB])"
SCALE_MERGED = r"(?P<name>.+?)_scale_lora_merged"
SCALE_INPUT = r".+_scale_lora_trained_[AB]"
ANY = r".*_(mask_lora|lora_prune|scale_lora)_.*"


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def pruned_weight(case):
    return case[f"{case.name}_weight_dense"] * ~case[f"{case.name}_mask_pruned"]


def fresh(case, lora_type):
    """The adapter as it starts."""
    rank, alpha = case[f"{case.name}_r_alpha"].tolist()
    kept = ~case[f"{case.name}_mask_pruned"]
    return LORA_TYPES[lora_type](pruned_weight(case), kept, rank, alpha, torch.Generator().manual_seed(0))


def trained(case, lora_type, names):
    """The adapter with the file's A and B."""
    adapter = fresh(case, lora_type)
    for factor, parameter in (("A", adapter.A), ("B", adapter.B)):
        assert parameter.shape == case[f"{case.name}_{names}{factor}"].shape
        parameter.data = case[f"{case.name}_{names}{factor}"]
    return adapter


def output(case, adapter):
    bias = case[f"{case.name}_bias"] if f"{case.name}_bias" in case.arrays else None
    return F.linear(case[f"{case.name}_x"], adapter(pruned_weight(case)), bias)


@pytest.mark.golden("perp", FORWARD)
def test_forward_is_the_reference_forward(case):
    close(output(case, trained(case, case.parts["type"], "")).detach(), case.golden)


@pytest.mark.golden("perp", GRADIENT)
def test_gradient_is_the_reference_gradient(case):
    adapter = trained(case, case.parts["type"], "")
    F.mse_loss(output(case, adapter), case[f"{case.name}_target"]).backward()
    close(getattr(adapter, case.parts["factor"]).grad, case.golden)


@pytest.mark.golden("perp", MERGED)
def test_merged_weight_is_the_reference_weight(case):
    merged = trained(case, case.parts["type"], "").merged(pruned_weight(case)).detach()
    close(merged, case.golden)
    assert not merged[case[f"{case.name}_mask_pruned"]].any()


@pytest.mark.golden("perp", SCALE_START, optional=True)
def test_scale_lora_starts_as_the_reference(case):
    adapter = fresh(case, "scale_lora")
    close(getattr(adapter, case.parts["factor"]).detach(), case.golden)
    close(adapter(pruned_weight(case)).detach(), pruned_weight(case))


@pytest.mark.golden("perp", SCALE_MERGED, optional=True)
def test_merged_scale_lora_is_the_reference_weight(case):
    merged = trained(case, "scale_lora", "scale_lora_trained_").merged(pruned_weight(case)).detach()
    close(merged, case.golden)
    assert not merged[case[f"{case.name}_mask_pruned"]].any()


@pytest.mark.golden("perp", ANY)
def test_no_golden_output_is_left_unread(case):
    kinds = (FORWARD, GRADIENT, MERGED, SCALE_START, SCALE_MERGED, SCALE_INPUT)
    assert any(re.fullmatch(kind, case.key) for kind in kinds)
