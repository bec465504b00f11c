"""WINA against masks, outputs, thresholds and the transform of the reference implementation."""

from __future__ import annotations

import re

import pytest
import torch
from gated_models import gated, llama, mlp_block
from torch import nn

from sparsebench.methods.activations.quantiles import exact
from sparsebench.methods.activations.rotation import Rotation
from sparsebench.methods.activations.scored import ScoreGate
from sparsebench.methods.activations.sites import gated_blocks
from sparsebench.methods.activations.wina import Wina

MASK = r"(?P<mode>wina|teal)_gate_mask_s(?P<level>[\d.]+)"
OUTPUT = r"(?P<mode>wina|teal)_mlp_out_(?P<decode>decode_)?s(?P<level>[\d.]+)"
QUANTILE = r"icdf_s(?P<level>[\d.]+)"
NORMS = r"tr_(?P<kind>k|gate)_colnorm_(?P<layer>\d+)"
INPUTS = r"(gate|up|down)_w|x_(prefill|decode)|calib|tr_(k_w|gate_w|in_ln|post_ln)_\d+"


def gates(case):
    _, block = mlp_block(case["gate_w"], case["up_w"], case["down_w"])
    norm_on = "code" if case.parts["mode"] == "wina" else "none"
    method = Wina(sparsity=float(case.parts["level"]), norm_on=norm_on, projections=("gate", "up", "down"))
    levels = {f"{block.linears[kind].name}.level": torch.tensor(method.level) for kind in method.kinds}
    thresholds = {name.replace(".level", ".threshold"): torch.tensor(0.0) for name in levels}
    levels = {name: level.double().fill_(method.level) for name, level in levels.items()}
    return method, block, method.gates([block], levels | thresholds)


@pytest.mark.golden("wina", MASK)
def test_mask_is_the_reference_mask(case):
    method, _, (gate, *_) = gates(case)
    assert isinstance(gate, ScoreGate)
    x = case["x_prefill"]
    first = x.shape[1] - method.sparse_tokens(x.shape[1])
    keep = gate(x[:, first:])[1]
    assert torch.equal(keep, case.golden[:, first:].bool())
    assert case.golden[:, :first].all()


@pytest.mark.golden("wina", OUTPUT)
def test_mlp_output_is_the_reference_output(case):
    method, block, found = gates(case)
    decode = case.parts["decode"] is not None
    x = case["x_decode" if decode else "x_prefill"]
    output = gated(found, block.module.mlp, x, method.sparse_tokens, decode)
    torch.testing.assert_close(output, case.golden, atol=1e-5, rtol=0)


@pytest.mark.golden("wina", QUANTILE, optional=True)
def test_threshold_is_the_reference_threshold(case):
    score = case["calib"].abs() * case["gate_w"].norm(dim=0)
    assert exact(score).quantile(float(case.parts["level"])) == pytest.approx(float(case.golden), abs=1e-3)


@pytest.mark.golden("wina", NORMS, optional=True)
def test_transformed_columns_have_the_reference_norms(case):
    layers = len(case.find(r"tr_k_w_\d+"))
    width, hidden = case["tr_k_w_0"].shape
    model = llama(
        hidden, case["tr_gate_w_0"].shape[0], layers, heads=hidden // width, kv_heads=1, head_dim=width
    )  # fmt: skip
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.k_proj.weight = nn.Parameter(case[f"tr_k_w_{index}"])
        layer.mlp.gate_proj.weight = nn.Parameter(case[f"tr_gate_w_{index}"])
        layer.input_layernorm.weight = nn.Parameter(case[f"tr_in_ln_{index}"])
        layer.post_attention_layernorm.weight = nn.Parameter(case[f"tr_post_ln_{index}"])
    with Rotation(model, center_embeddings=False).applied():
        block = gated_blocks(model)[int(case.parts["layer"])]
        norms = block.linears[case.parts["kind"]].module.weight.norm(dim=0)
    torch.testing.assert_close(norms, case.golden, atol=1e-4, rtol=0)


@pytest.mark.golden("wina", r".*")
def test_no_golden_output_is_left_unread(case):
    assert any(re.fullmatch(kind, case.key) for kind in (MASK, OUTPUT, QUANTILE, NORMS, INPUTS))
