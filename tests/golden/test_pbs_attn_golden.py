"""PBS-Attn against the released code: permutation and block masks exact, scores and outputs within 1e-5."""

from __future__ import annotations

import pytest
import torch
from prefill_cases import attend, causal_mask, heads_of

from sparsebench.methods.attention.pbs_attn import PbsAttn, block_scores, key_order, own_segment, taken

NAME = r"(?P<name>c\d+)_"


def setting(case):
    block, segment = case[f"{case.name}_cfg_block_segment"].tolist()
    heads = heads_of(*(case[f"{case.name}_{part}"] for part in "qkv"))
    return heads, block, segment, float(case[f"{case.name}_threshold"])


@pytest.mark.golden("pbs_attn", NAME + "key_perm_indices")
def test_permutation_and_scores(case):
    heads, block, segment, _ = setting(case)
    order = key_order(heads, block, segment, "importance", shared=False)
    assert order.equal(case.golden[0].long())
    scores = case[f"{case.name}_block_scores"][0].nan_to_num(0.0)
    torch.testing.assert_close(block_scores(heads, order, block, segment), scores, atol=1e-5, rtol=0)


@pytest.mark.golden("pbs_attn", NAME + "block_mask_(?P<order>before_segment|no_permutation)")
def test_blocks(case):
    heads, block, segment, threshold = setting(case)
    kind = "importance" if case.parts["order"] == "before_segment" else "none"
    order = key_order(heads, block, segment, kind, shared=False)
    mask = taken(block_scores(heads, order, block, segment), threshold)
    mask[torch.arange(len(mask)), :, (order == 0).int().argmax(dim=1) // block] = True
    assert mask.equal(case.golden[0])
    own = own_segment(mask.shape[-1], segment // block, mask.device)
    assert own.equal(case[f"{case.name}_segment_mask"])


@pytest.mark.golden("pbs_attn", NAME + "out")
def test_output(case):
    heads, block, segment, threshold = setting(case)
    found = PbsAttn(threshold=threshold, block_size=block, segment_size=segment).select(heads)
    torch.testing.assert_close(attend(heads, causal_mask(found)), case.golden[0], atol=1e-5, rtol=0)
