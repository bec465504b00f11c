"""SeerAttention against the released code: gate, masks, ground truth and loss within 1e-5."""

from __future__ import annotations

import pytest
import torch
from prefill_cases import attend, heads_of

from sparsebench.methods.attention.gates import (
    block_rotary,
    by_share,
    by_threshold,
    distance,
    gate_logits,
    pooled_attention,
)
from sparsebench.methods.attention.selections import causal


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def logits(case, tokens=None, rotate=True):
    size = int(case["cfg_block_gatehidden"][0])
    query, key = (case[name][0].transpose(0, 1)[:, :tokens] for name in ("q_nope", "k_nope"))
    rotary = (case["block_cos"][0], case["block_sin"][0]) if rotate else None
    weights = {"q": case["linear_q_w"], "k": case["linear_k_w"]}
    return gate_logits(query, key, weights, size, str(case.arrays["gate_type"]), rotary)


def rotated_heads(case):
    parts = (case[name].transpose(1, 2) for name in ("q_rope", "k_rope", "v"))
    return heads_of(*parts)


@pytest.mark.golden("seer_attention", "gate_logits")
def test_gate_logits_and_block_rotary(case):
    found, expected = logits(case), case.golden[0]
    seen = torch.ones_like(expected, dtype=torch.bool).tril()
    close(found[seen], expected[seen])
    assert (found[~seen] < -1e29).all()
    size, width = case["cfg_block_gatehidden"].tolist()
    cos, sin = block_rotary(found.shape[-1], size, width, 10000.0, found.device)
    close(cos, case["block_cos"][0])
    close(sin, case["block_sin"][0])


@pytest.mark.golden("seer_attention", "gate_scores(?P<form>|_norope|_len_minus19)")
def test_gate_scores(case):
    options = {"_norope": {"rotate": False}, "_len_minus19": {"tokens": case["q_nope"].shape[1] - 19}, "": {}}
    close(logits(case, **options[case.parts["form"]]).softmax(dim=-1), case.golden[0])


@pytest.mark.golden("seer_attention", "mask_threshold_(?P<form>lastdense|nolastdense)")
def test_masks_by_threshold(case):
    for threshold, expected in zip(case["thresholds"].tolist(), case.golden, strict=True):
        mask = by_threshold(case["gate_scores"][0], threshold, case.parts["form"] == "lastdense")
        assert mask.equal(expected[0])


@pytest.mark.golden("seer_attention", "mask_nzratio")
def test_masks_by_share(case):
    for share, expected in zip(case["nz_ratios"].tolist(), case.golden, strict=True):
        assert by_share(case["nz_scores_in"][0], share).equal(expected[0])


@pytest.mark.golden("seer_attention", "gt_pooled")
def test_ground_truth_and_loss(case):
    heads = rotated_heads(case)
    wanted = pooled_attention(heads, int(case["cfg_block_gatehidden"][0]))
    close(wanted, case.golden[0])
    assert float(distance(logits(case), wanted, 0.25)) == pytest.approx(float(case["mask_loss_layer"]), abs=1e-5)
    whole = causal(heads.tokens, heads.tokens, heads.query.device)
    close(attend(heads, whole), case["attn_out"][0])
