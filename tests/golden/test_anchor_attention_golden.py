"""AnchorAttention against the released kernels: anchors, columns (1% may differ: fp16), outputs of both variants."""

from __future__ import annotations

from math import log

import pytest
import torch
from prefill_cases import attend, causal_mask, heads_of, unpacked

from sparsebench.methods.attention.anchor_attention import AnchorAttention, anchors, margins, with_stripes


def prompt(case):
    return heads_of(case["q"], case["k"], case["v"])


def method(case, variant):
    block, step = case["cfg_block_step"].tolist()
    return AnchorAttention(theta=float(case["theta"]), block_size=block, step=step, variant=variant)


def given(case):
    """What the kernels computed: with their own columns, a few of which lie within fp16 rounding of the threshold."""
    block, step = case["cfg_block_step"].tolist()
    return with_stripes(unpacked(case["sel_packed"], case["q"].shape[2])[0], block * step)


@pytest.mark.golden("anchor_attention", "anchor_rowmax_log2")
def test_anchors_and_the_sums_of_the_first_pass(case):
    heads, (block, step) = prompt(case), case["cfg_block_step"].tolist()
    found = anchors(heads, block * step)
    torch.testing.assert_close(found / log(2), case.golden[0], atol=1e-2, rtol=0)
    size, tokens = block * step, heads.tokens
    key = torch.arange(tokens)
    base = ((key < size) | (key // size == key[:, None] // size)) & (key <= key[:, None])
    logits = heads.query @ heads.keys.transpose(1, 2) * heads.scaling
    sums = ((logits - found[..., None]).exp() * base).sum(dim=2)
    torch.testing.assert_close(sums, case["row_lse_l"][0], atol=0, rtol=1e-2)


@pytest.mark.golden("anchor_attention", "sel_packed")
def test_columns(case):
    heads, sizes = prompt(case), case["cfg_block_step"].tolist()
    expected = unpacked(case.golden, heads.tokens)[0]
    found = margins(heads, *sizes, released=True) <= float(case["theta"])
    assert (found ^ expected).sum() <= 0.01 * expected.sum()
    counts = found.sum(dim=2)
    assert (counts - case["counts"][0]).abs().max() <= 0.01 * expected.sum()
    ratio = method(case, "released").select(heads).extra["stripe_ratio"]
    assert ratio == pytest.approx(float(case["ratio_reported"]), rel=0.01)


@pytest.mark.golden("anchor_attention", "out_fp16kernel")
def test_released_output_counts_keys_of_the_first_group_twice(case):
    heads = prompt(case)
    found = given(case)
    mask, bias = causal_mask(found), found.bias_rows(0, heads.tokens)
    logits = heads.query @ heads.keys.transpose(1, 2) * heads.scaling + bias
    output = logits.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ heads.value
    torch.testing.assert_close(output, case.golden[0], atol=5e-3, rtol=0)


@pytest.mark.golden("anchor_attention", "union_mask_out_fp32")
def test_each_key_once_and_the_mass_it_holds(case):
    heads = prompt(case)
    mask = causal_mask(given(case))
    torch.testing.assert_close(attend(heads, mask), case.golden[0], atol=1e-4, rtol=0)
    logits = heads.query @ heads.keys.transpose(1, 2) * heads.scaling
    seen = torch.ones_like(mask).tril()
    weights = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    assert float((weights * mask).sum(dim=2).mean()) == pytest.approx(float(case["recall_mean"]), abs=1e-3)
