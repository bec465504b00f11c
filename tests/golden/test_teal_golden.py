"""TEAL against thresholds, gated activations and the greedy allocation of the reference implementation."""

from __future__ import annotations

import re

import pytest
import torch
from gated_models import gated, llama
from torch import nn

from sparsebench.methods.activations.allocation import greedy
from sparsebench.methods.activations.scored import ScoreGate
from sparsebench.methods.activations.sites import READER, gated_blocks, walk
from sparsebench.methods.activations.teal import Teal

THRESHOLD = r"thr_s(?P<level>[\d.]+)"
OUTPUT = r"out_(?P<phase>prefill|decode)_s(?P<level>[\d.]+)"
ALLOCATION = r"gr_rows"
INPUTS = r"acts|x_prefill|x_decode|gr_(input|w_.*|columns|dense_out)"
KINDS = ("q", "k", "v", "o", "gate", "up", "down")


def distribution(values):
    method = Teal()
    found = method.distributions(type("Seen", (), {"values": {"attn_in": values}}), ["q"])
    return method, found["q"]


@pytest.mark.golden("teal", THRESHOLD)
def test_threshold_is_the_reference_threshold(case):
    method, known = distribution(case["acts"])
    assert method.threshold(known, float(case.parts["level"])) == pytest.approx(float(case.golden), abs=1e-4)


@pytest.mark.golden("teal", OUTPUT)
def test_activations_are_gated_as_in_the_reference(case):
    x = case[f"x_{case.parts['phase']}"]
    threshold = float(case[f"thr_s{case.parts['level']}"])
    block = gated_blocks(llama(x.shape[-1], 40, layers=1, heads=2))[0]
    block.linears["o"].module.weight = nn.Parameter(torch.eye(x.shape[-1]))
    decode = case.parts["phase"] == "decode"
    gate = ScoreGate(block, "o", None, threshold)
    found = gated([gate], gate.module, x, Teal().sparse_tokens, decode)
    away = (x.abs() - threshold).abs() > 1e-6
    torch.testing.assert_close(found[away], case.golden[away], atol=1e-6, rtol=0)


def golden_model(case):
    """One Llama block whose embedding hands out the golden input, a row per token."""
    states = case["gr_input"]
    hidden, intermediate = states.shape[-1], case["gr_w_mlp.gate_proj"].shape[0]
    heads = 2
    model = llama(hidden, intermediate, layers=1, heads=heads, kv_heads=heads, vocab=states[..., 0].numel())
    model.model.embed_tokens.weight = nn.Parameter(states.flatten(0, 1))
    block = model.model.layers[0]
    for name in case.find(r"gr_w_(?P<name>.+)"):
        block.get_submodule(name["name"]).weight = nn.Parameter(case[name[0]])
    return model, torch.arange(states[..., 0].numel()).view(states.shape[:2])


@pytest.mark.golden("teal", ALLOCATION, optional=True)
def test_greedy_allocation_is_that_of_the_reference(case):
    model, ids = golden_model(case)
    method = Teal(base_step=0.1)
    weights = dict(zip(KINDS, (1, 1, 1, 1, 2.5, 2.5, 2.5), strict=True))
    for seen in walk(model, ids, list(READER)):
        torch.testing.assert_close(torch.cat(seen.run()), case["gr_dense_out"], atol=1e-5, rtol=0)
        known = method.distributions(seen, KINDS)

        def make(kind, level, seen=seen, known=known):
            return ScoreGate(seen.block, kind, None, method.threshold(known[kind], level))

        rows = greedy(seen, make, weights, method.sparse_tokens, base_step=0.1, target=0.5, last_fraction=0.25)
    golden = case.golden
    assert len(rows) == len(golden)
    assert [row.effective for row in rows] == pytest.approx(golden[:, 0].tolist(), abs=1e-9)
    for row, wanted in zip(rows[:10], golden[:10], strict=True):
        assert [row.levels[kind] for kind in KINDS] == pytest.approx(wanted[3:].tolist(), abs=1e-9)
        assert row.error == pytest.approx(float(wanted[1]), rel=1e-3)
        assert row.uniform_error == pytest.approx(float(wanted[2]), rel=1e-3)
    assert rows[-1].error == pytest.approx(float(golden[-1, 1]), rel=0.02)
    assert rows[-1].error < rows[-1].uniform_error


@pytest.mark.golden("teal", r".*")
def test_no_golden_output_is_left_unread(case):
    assert any(re.fullmatch(kind, case.key) for kind in (THRESHOLD, OUTPUT, ALLOCATION, INPUTS))
