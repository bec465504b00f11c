"""Block-shaped selections on the block kernel: the same outputs and counts as over masks, and a reason elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prefill_models import IDS, attachment, make_llama

from sparsebench.methods.attention.base import SparseAttention
from sparsebench.methods.attention.block_sparse import BlockSparse
from sparsebench.methods.attention.flexprefill import FlexPrefill
from sparsebench.methods.attention.minference import BLOCK_SPARSE, VERTICAL_SLASH, MInference
from sparsebench.methods.attention.pbs_attn import PbsAttn
from sparsebench.methods.attention.seer_attention import SeerAttention
from sparsebench.methods.attention.vertical_slash import VerticalSlash

PADDED = torch.ones(3, 200, dtype=torch.long)
PADDED[0, :37] = 0  # on the left
BLOCKY = {
    "block_sparse": BlockSparse(top_chunks=3, chunk_size=64),
    "dense": BlockSparse(sparsity=0.0),
    "flexprefill": FlexPrefill(gamma=0.6, block_size=64, tau=0.6),
    "seer_attention": SeerAttention(nz_ratio=0.5, block_size=64, force_diagonal=True, steps=1, batch=1),
    "pbs_attn": PbsAttn(threshold=0.3, block_size=64, segment_size=64),
    "pbs_attn segments": PbsAttn(threshold=0.3, block_size=64, segment_size=128),
}


@torch.no_grad()
def both(handler: SparseAttention, kv_heads: int, ids: torch.Tensor, mask: torch.Tensor | None) -> Any:
    """(logits, counts) over masks, then on kernels, with what became of those."""
    model, found = handler.model, []
    with handler.attached():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found.append((logits, handler.counted()))
    with handler.on_kernels() as use, handler.attached():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found.append((logits, handler.counted()))
    assert handler.kernels is None
    return *found, use


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("name", BLOCKY)
def test_kernels_and_masks_agree(name: str, kv_heads: int) -> None:
    handler = attachment(BLOCKY[name], make_llama(kv_heads))
    masked, swapped, use = both(handler, kv_heads, IDS, PADDED)
    assert use.layers == {0, 1} and use.refused == ""
    assert (masked[0] - swapped[0])[PADDED.bool()].abs().max() < 1e-4
    assert masked[1].achieved == pytest.approx(swapped[1].achieved)
    assert masked[1].columns == pytest.approx(swapped[1].columns)


def test_heads_with_patterns_of_their_own() -> None:
    handler = attachment(MInference(ratio=1.0, block_size=64, block_topk=2), make_llama(2))
    handler.tensors = {"patterns": torch.tensor([[[BLOCK_SPARSE, 8, 1]] * 4] * 2)}
    masked, swapped, use = both(handler, 2, IDS, None)
    assert use.refused == "" and (masked[0] - swapped[0]).abs().max() < 1e-4
    handler.tensors["patterns"][1, 2] = torch.tensor([VERTICAL_SLASH, 8, 16])
    masked, swapped, use = both(handler, 2, IDS, None)
    assert use.layers == {0} and use.refused == "what is computed is no set of blocks"
    assert (masked[0] - swapped[0]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (VerticalSlash(sparsity=0.5), "what is computed is no set of blocks"),
        (BlockSparse(sparsity=0.5), "blocks of 8 tokens, the kernel takes multiples of 64"),
    ],
)
def test_what_the_kernel_cannot_compute_is_computed_over_masks(method: Any, reason: str) -> None:
    handler = attachment(method, make_llama(2))
    masked, swapped, use = both(handler, 2, IDS, None)
    assert not use.layers and use.refused == reason
    assert masked[0].equal(swapped[0])


def test_stacked_on_the_same_attention_no_kernel_runs() -> None:
    model = make_llama(2)
    first, second = (attachment(BLOCKY["block_sparse"], model) for _ in range(2))
    with torch.no_grad(), first.on_kernels() as use, first.attached(), second.attached():
        model(input_ids=IDS, use_cache=False)
    assert use.refused == "several methods act on the same attention"
