"""Vertical-slash, block-sparse and the simplified FlexPrefill against The Sparse Frontier's code: indices, masks and
sparsities exact, kernel outputs (fp16) within 5e-3."""

from __future__ import annotations

import pytest
import torch
from prefill_cases import attend, causal_mask, heads_of, unpacked

from sparsebench.methods.attention.block_sparse import BlockSparse, chunks_for, nearest_chunks
from sparsebench.methods.attention.flexprefill import FlexPrefill
from sparsebench.methods.attention.vertical_slash import VerticalSlash


def heads(case):
    return heads_of(case["q"], case["k"], case["v"])


def vertical_slash(case):
    columns, diagonals, rows = case["vs_cfg_vertical_slash_lastq"].tolist()
    return VerticalSlash(
        vertical_size=columns, slash_size=diagonals, approximation_size=rows, tile_size=64, forced_slashes=64
    )


@pytest.mark.golden("sparse_frontier", "vs_vertical_idx_sorted")
def test_vertical_slash_indices(case):
    method = vertical_slash(case)
    columns, diagonals = method.estimate(heads(case))
    for head, expected in enumerate(case.golden[0]):
        assert (columns[head] < method.vertical_size).nonzero()[:, 0].tolist() == expected.tolist()
    for head, expected in enumerate(case["vs_slash_idx_sorted_desc"][0]):
        assert (diagonals[head] < method.slash_size).nonzero()[:, 0].flip(0).tolist() == expected.tolist()


@pytest.mark.golden("sparse_frontier", "vs_mask_packed")
def test_vertical_slash_mask_and_its_sparsities(case):
    prompt = heads(case)
    found = vertical_slash(case).select(prompt)
    mask = causal_mask(found)
    assert mask.equal(unpacked(case.golden, prompt.tokens)[0])
    assert found.pairs().tolist() == mask.sum(dim=(1, 2)).tolist()
    torch.testing.assert_close(found.reported.float(), case["vs_sparsity_reported"], atol=1e-6, rtol=0)
    torch.testing.assert_close(attend(prompt, mask), case["vs_out_fp16kernel"][0], atol=5e-3, rtol=0)


@pytest.mark.golden("sparse_frontier", "bs_index_sorted_padded_rows")
def test_block_sparse_chunks_sparsity_and_output(case):
    size, kept = case["bs_cfg_chunk_topk"].tolist()
    prompt = heads(case)
    mask = nearest_chunks(prompt, size, kept)
    for head, rows in enumerate(case.golden[0]):
        for row, expected in enumerate(rows):
            used = expected[: min(row + 1, kept)].tolist()
            assert mask[head, row].nonzero()[:, 0].tolist() == used
    found = BlockSparse(top_chunks=kept, chunk_size=size).select(prompt)
    assert float(found.reported) == pytest.approx(float(case["bs_sparsity_formula"]), abs=1e-12)
    whole = causal_mask(found)
    assert found.pairs().tolist() == whole.sum(dim=(1, 2)).tolist()
    torch.testing.assert_close(attend(prompt, whole), case["bs_out_fp16kernel"][0], atol=5e-3, rtol=0)


@pytest.mark.golden("sparse_frontier", "bs_topchunks_for_sparsity")
def test_chunks_of_a_target_sparsity(case):
    for tokens, chunk, target, expected in case.golden.tolist():
        assert chunks_for(target, -(-int(tokens) // int(chunk))) == expected


@pytest.mark.golden("sparse_frontier", r"(?P<name>fp\d)_mask_packed")
def test_simplified_flexprefill(case):
    alpha = float(case["fp_alphas"][int(case.name[2:])])
    budget, rows = case["fp_min_budget_approx"].tolist()
    method = FlexPrefill(variant="simplified", gamma=alpha, min_budget=budget, approximation_size=rows, tile_size=64)
    prompt = heads(case)
    seen = method.estimate(prompt)
    assert seen.counts(alpha).tolist() == case[f"{case.name}_counts_vertical_slash"].tolist()
    found = method.select(prompt)
    mask = causal_mask(found)
    assert mask.equal(unpacked(case.golden, prompt.tokens)[0])
    torch.testing.assert_close(found.reported.float(), case[f"{case.name}_sparsity_reported"], atol=1e-6, rtol=0)
    output = f"{case.name}_out_fp16kernel"
    if output in case.arrays:
        torch.testing.assert_close(attend(prompt, mask), case[output][0], atol=5e-3, rtol=0)
