"""R-Sparse against ranks, thresholds and outputs of the reference layer."""

from __future__ import annotations

import re

import pytest
import torch
from gated_models import gated, mlp_block

from sparsebench.methods.activations.low_rank import LowRankGate, budget, factors
from sparsebench.methods.activations.r_sparse import RSparse, threshold

ALPHA = r"a(?P<alpha>[\d.]+)"
RANK = rf"rank_{ALPHA}"
SHARE = rf"input_target_sparsity_{ALPHA}"
THRESHOLD = rf"thr_{ALPHA}"
OUTPUT = rf"out_(?P<phase>prefill|decode)_{ALPHA}"
FACTORS = r"U|S|V|scale"
INPUTS = r"weight|x|calib|target_sparsity|prefill_ratio"


def block_of(case):
    weight = case["weight"]
    return mlp_block(torch.zeros_like(weight), weight, torch.zeros_like(weight.T))[1]


def rank_of(case):
    level, alpha = float(case["target_sparsity"]), float(case.parts["alpha"])
    return budget(block_of(case).linears["up"], level, alpha, compat=True, least=0).rank


def scores(case, x):
    return x.abs() if float(case.parts["alpha"]) == 1 else x.abs() * case["scale"]


@pytest.mark.golden("r_sparse", RANK)
def test_rank_is_the_reference_rank(case):
    assert rank_of(case) == int(case.golden)


@pytest.mark.golden("r_sparse", THRESHOLD)
def test_threshold_is_the_reference_threshold(case):
    share = 1 - (1 - float(case["target_sparsity"])) * float(case.parts["alpha"])
    assert share == pytest.approx(float(case[f"input_target_sparsity_a{case.parts['alpha']}"]), rel=1e-6)
    found = threshold(scores(case, case["calib"]).flatten().sort().values, share)
    assert found == pytest.approx(float(case.golden), rel=1e-6)


@pytest.mark.golden("r_sparse", OUTPUT)
def test_output_is_the_reference_output(case):
    rank, alpha = rank_of(case), case.parts["alpha"]
    block, scale = block_of(case), None if float(alpha) == 1 else case["scale"]
    left, right = (case["U"] * case["S"])[:, :rank], case["V"][:, :rank]
    gate = LowRankGate(block, "up", float(case[f"thr_a{alpha}"]), scale, left, right)
    method = RSparse(sparse_tail=round(float(case["prefill_ratio"]), 6))  # stored as float32
    if case.parts["phase"] == "prefill":
        found = gated([gate], gate.module, case["x"], method.sparse_tokens)
    else:
        found = gated([gate], gate.module, case["x"][0][:, None], method.sparse_tokens, decode=True)[:, 0]
    torch.testing.assert_close(found, case.golden, atol=1e-4, rtol=0)


@pytest.mark.golden("r_sparse", r"scale", optional=True)
def test_factors_are_the_reference_factors_up_to_signs(case):
    found = factors(case["weight"], torch.float16)
    torch.testing.assert_close(found.scale, case.golden, atol=3e-3, rtol=3e-3)
    torch.testing.assert_close(found.left.abs(), (case["U"] * case["S"]).abs(), atol=3e-3, rtol=3e-3)
    torch.testing.assert_close(found.left @ found.right.T, case["weight"], atol=3e-3, rtol=3e-3)


@pytest.mark.golden("r_sparse", r".*")
def test_no_golden_output_is_left_unread(case):
    assert any(re.fullmatch(kind, case.key) for kind in (RANK, SHARE, THRESHOLD, OUTPUT, FACTORS, INPUTS))
