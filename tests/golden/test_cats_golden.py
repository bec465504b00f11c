"""CATS against the histogram, thresholds, masks and outputs of the reference implementation."""

from __future__ import annotations

import re

import pytest
import torch
from gated_models import gated, mlp_block

from sparsebench.methods.activations.cats import Cats, ThresholdGate, bin_edges, count_bins, left_edge

COUNTS = r"hist_counts"
EDGES = r"hist_edges"
THRESHOLD = r"thr_s(?P<level>[\d.]+)"
MASK = r"mask_s(?P<level>[\d.]+)"
OUTPUT = r"out_s(?P<level>[\d.]+)"
ACTIVATION = r"sparsesilu_s(?P<level>[\d.]+)"
INPUTS = r"(gate|up|down)_w|calib|x"


def block_of(case):
    return mlp_block(case["gate_w"], case["up_w"], case["down_w"])[1]


def edges_of(case):
    return bin_edges(len(case["hist_counts"]), Cats().reach)


def activations(case, x):
    block = block_of(case)
    with torch.no_grad():
        return block.activation(block.linears["gate"].module(x))


@pytest.mark.golden("cats", EDGES, optional=True)
def test_edges_are_the_reference_edges(case):
    torch.testing.assert_close(edges_of(case), case.golden, atol=1e-6, rtol=0)


@pytest.mark.golden("cats", COUNTS, optional=True)
def test_counts_are_the_reference_counts(case):
    counts = sum(count_bins(activations(case, batch), edges_of(case)) for batch in case["calib"])
    assert (counts - case.golden).abs().sum() <= 4  # values within rounding of an edge move
    assert counts.sum() == case.golden.sum()


@pytest.mark.golden("cats", THRESHOLD)
def test_threshold_is_the_reference_threshold(case):
    found = left_edge(case["hist_counts"].double(), edges_of(case), float(case.parts["level"]))
    assert found == pytest.approx(float(case.golden), abs=1e-6)
    counts = count_bins(activations(case, case["calib"]), edges_of(case))
    assert left_edge(counts, edges_of(case), float(case.parts["level"])) == pytest.approx(float(case.golden), abs=1e-6)


@pytest.mark.golden("cats", MASK)
def test_mask_is_the_reference_mask(case):
    threshold = float(case[f"thr_s{case.parts['level']}"])
    values = activations(case, case["x"])
    keep = ThresholdGate(block_of(case), threshold)(values)[1]
    away = (values.abs() - threshold).abs() >= 1e-6
    assert torch.equal(keep[away], case.golden[away])


@pytest.mark.golden("cats", ACTIVATION, optional=True)
def test_activation_is_the_reference_activation(case):
    threshold = float(case[f"thr_s{case.parts['level']}"])
    found = ThresholdGate(block_of(case), threshold)(activations(case, case["x"]))[0]
    torch.testing.assert_close(found, case.golden, atol=1e-5, rtol=0)


@pytest.mark.golden("cats", OUTPUT)
def test_mlp_output_is_the_reference_output(case):
    block = block_of(case)
    gate = ThresholdGate(block, float(case[f"thr_s{case.parts['level']}"]))
    found = gated([gate], block.module.mlp, case["x"], Cats().sparse_tokens)
    torch.testing.assert_close(found, case.golden, atol=1e-5, rtol=0)


@pytest.mark.golden("cats", r".*")
def test_no_golden_output_is_left_unread(case):
    kinds = (COUNTS, EDGES, THRESHOLD, MASK, OUTPUT, ACTIVATION, INPUTS)
    assert any(re.fullmatch(kind, case.key) for kind in kinds)
