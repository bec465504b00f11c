"""MInference against the released code: indices, tiles, blocks and the winning pattern exact, recalls within 2e-3."""

from __future__ import annotations

import pytest
import torch
from prefill_cases import heads_of

from sparsebench.methods.attention.minference import (
    A_SHAPE,
    BLOCK_SPARSE,
    VERTICAL_SLASH,
    MInference,
    candidates,
    pooled_blocks,
    recall,
)
from sparsebench.methods.attention.slashes import slash_tiles

KINDS = {"stream_llm": A_SHAPE, "vertical_and_slash": VERTICAL_SLASH, "block_sparse": BLOCK_SPARSE}


def lines(case):
    method = MInference(last_q=64, forced_verticals=30, forced_slashes=100, block_size=64)
    wide, near = case["vs_cfg_v_s"].tolist()
    columns, diagonals = method.estimate(heads_of(case["vs_q"], case["vs_k"]))
    return columns < wide, diagonals < near


@pytest.mark.golden("minference", "vs_vertical_idx")
def test_vertical_and_slash_indices(case):
    columns, diagonals = lines(case)
    assert columns[0].nonzero()[:, 0].tolist() == case.golden.flatten().tolist()
    assert diagonals[0].nonzero()[:, 0].flip(0).tolist() == case["vs_slash_idx"].flatten().tolist()


@pytest.mark.golden("minference", "vs_block_count")
def test_tiles_and_single_columns(case):
    found = slash_tiles(*lines(case), 64)
    tokens = found.tokens
    for row, count in enumerate(case.golden.flatten().tolist()):
        expected = torch.zeros(tokens + 64, dtype=torch.bool)
        for start in case["vs_block_offset"][0, 0, row, :count].tolist():
            expected[start : start + 64] = True
        singles = case["vs_column_count"].flatten()[row]
        expected[case["vs_column_index"][0, 0, row, :singles].long()] = True
        assert found.mask[0, row].equal(expected[:tokens])


@pytest.mark.golden("minference", "bs_index")
def test_blocks(case):
    kept, size = case["bs_cfg_topk_block"].tolist()
    mask = pooled_blocks(case["bs_q"][0], case["bs_k"][0], size, kept)
    for head, rows in enumerate(case.golden[0]):
        for row, expected in enumerate(rows):
            assert mask[head, row].nonzero()[:, 0].tolist() == sorted(expected.tolist())[: min(row + 1, kept)]


@pytest.mark.golden("minference", "search_scores")
def test_search(case):
    prompt = heads_of(case["search_q"], case["search_k"])
    rows = case.arrays["search_candidates"].tolist()
    given = [(KINDS[kind], int(first), int(second)) for kind, first, second in rows]
    assert candidates(prompt.tokens) == given
    found = recall(prompt)[:, 0]
    torch.testing.assert_close(found, case.golden, atol=2e-3, rtol=0)
    kind, first, second = case.arrays["search_returned"].tolist()
    best = MInference(assign="released").stored(given[int(found.argmax())], prompt.tokens)
    assert best == (KINDS[kind], int(first), int(second))
