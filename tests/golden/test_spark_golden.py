"""The statistical top-k against the operator and the gated MLP of transformers' Gemma 3n."""

from __future__ import annotations

import re

import pytest
import torch
from gated_models import gated, mlp_block

from sparsebench.methods.activations.statistical_topk import StatisticalGate, StatisticalTopK

OPERATOR = r"softthr_out_(?P<index>\d+)"
COUNT = r"nnz_(?P<index>\d+)"
MLP = r"mlp_out"
INPUTS = r"x|sparsity_\d+|mlp_(gate_w|up_w|down_w|in)"


def block_of(case):
    parts = (case["mlp_gate_w"], case["mlp_up_w"], case["mlp_down_w"])
    return mlp_block(*parts, hidden_act="gelu_pytorch_tanh")[1]


def operator(case, index):
    """(output, kept) for the golden scores, whose width need not be that of the golden MLP."""
    gate = StatisticalGate(block_of(case), float(case[f"sparsity_{index}"]), True, False)
    scores = case["x"]
    gate.k = round(scores.shape[-1] * (1 - gate.sparsity))
    return gate(scores)


@pytest.mark.golden("spark", OPERATOR)
def test_operator_is_the_reference_operator(case):
    torch.testing.assert_close(operator(case, case.parts["index"])[0], case.golden, atol=1e-5, rtol=0)


@pytest.mark.golden("spark", COUNT)
def test_survivors_are_as_many_as_in_the_reference(case):
    count = operator(case, case.parts["index"])[1].sum(dim=-1)
    constant = case["x"].std(dim=-1) < 1e-5  # rounding decides there
    assert ((count - case.golden).abs() <= 1)[~constant].all()


@pytest.mark.golden("spark", MLP)
def test_mlp_output_is_the_reference_output(case):
    block = block_of(case)
    gate = StatisticalGate(block, float(case["sparsity_0"]), True, False)
    found = gated([gate], block.module.mlp, case["mlp_in"], StatisticalTopK().sparse_tokens)
    torch.testing.assert_close(found, case.golden, atol=1e-5, rtol=0)


@pytest.mark.golden("spark", r".*")
def test_no_golden_output_is_left_unread(case):
    assert any(re.fullmatch(kind, case.key) for kind in (OPERATOR, COUNT, MLP, INPUTS))
