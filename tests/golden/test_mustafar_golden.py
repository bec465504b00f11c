"""Mustafar against pruned vectors and compressed caches of the reference implementation."""

from __future__ import annotations

import pytest
import torch

from sparsebench.kernels.attention import Records, kv_attention
from sparsebench.kernels.bits import unpacked_bits
from sparsebench.methods.kv_cache.bitmap import TILE, PackedCache, pack, tile_bytes
from sparsebench.methods.kv_cache.mustafar import survivors

ALONG = {"key": "tokens", "value": "channels"}


@pytest.mark.golden("mustafar", r"(?P<name>key|value)_mask_(?P<level>\d+)")
def test_survivors_are_those_of_the_released_rule(case):
    level = case["sparsities"][int(case.parts["level"])].item()
    assert torch.equal(survivors(case[f"{case.name}s"].abs(), level, exact=False), case.golden)


@pytest.mark.golden("mustafar", r"tie_pruned_(?P<level>\d+)")
def test_ties_at_the_threshold_stay(case):
    level, x = case["sparsities"][int(case.parts["level"])].item(), case["tie_keys"]
    assert torch.equal(x * survivors(x.abs(), level, exact=False), case.golden)


@pytest.mark.golden("mustafar", r"(?P<name>key|value)_(?P<part>bitmap|offsets|nz|nz_len)")
def test_the_format_is_that_of_the_released_kernels(case):
    packed = pack(case[f"comp_{case.name}_in"], ALONG[case.name])
    part = {"bitmap": "bitmap", "offsets": "offsets", "nz": "values", "nz_len": "lengths"}[case.parts["part"]]
    assert torch.equal(getattr(packed, part), case.golden)


@pytest.mark.golden("mustafar", "comp_(?P<name>key|value)_in")
def test_what_is_unpacked_was_packed(case):
    packed = pack(case.golden, ALONG[case.name])
    assert torch.equal(packed.unpack(), case.golden)
    every = torch.ones(case.golden.shape[:2], dtype=torch.bool)
    assert int(tile_bytes(case.golden, ALONG[case.name], every).sum()) == packed.nbytes


def packed_by_the_paper(case, name) -> PackedCache:
    """A cache as the released kernels packed it."""
    parts = [case[f"{name}_{part}"] for part in ("bitmap", "offsets", "nz", "nz_len")]
    return PackedCache(*parts, tuple(case[f"comp_{name}_in"].shape), ALONG[name])


def records_of(case, name) -> Records:
    """What a released cache holds, in the records that our kernels read."""
    held = packed_by_the_paper(case, name).unpack()
    return Records.from_dense(held, held != 0)


@pytest.mark.golden("mustafar", "(?P<name>key|value)_bitmap")
def test_our_records_hold_the_paper_s_values_at_its_positions(case):
    records = records_of(case, case.name)
    size = records.dim
    bits = unpacked_bits(records.view[..., : size // 8])  # (heads, tokens, size), the lowest bit first
    first_is_highest = 1 << torch.arange(TILE - 1, -1, -1)
    along_tokens = ALONG[case.name] == "tokens"
    for head in range(records.heads):
        for tile, word in enumerate(case.golden[head].tolist()):
            kept = torch.tensor([word & int(bit) != 0 for bit in first_is_highest.tolist()])
            block, place = divmod(tile, size if along_tokens else TILE * (size // TILE))
            if along_tokens:
                ours = bits[head, TILE * block : TILE * (block + 1), place]
            else:
                channel, row = divmod(place, TILE)
                ours = bits[head, TILE * block + row, TILE * channel : TILE * (channel + 1)]
            assert torch.equal(ours, kept)
    assert torch.equal(records.dense(), case[f"comp_{case.name}_in"].bfloat16())


@pytest.mark.golden("mustafar", "comp_key_in")
def test_attention_over_our_records_is_that_over_the_paper_s_cache(case):
    keys, values = case.golden.double(), case["comp_value_in"].double()
    heads, _, size = keys.shape
    q = torch.randn(4 * heads, size, generator=torch.Generator().manual_seed(0))
    got = kv_attention(q, records_of(case, "key"), records_of(case, "value"))
    score = q.double().view(heads, -1, size) @ keys.mT * size**-0.5
    right = (score.softmax(-1) @ values).view(q.shape)
    assert float((got.double() - right).abs().max()) <= 0.02 * float(right.abs().max())  # records are bfloat16
