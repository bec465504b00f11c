"""Mustafar against pruned vectors and compressed caches of the reference implementation."""

from __future__ import annotations

import pytest
import torch

from sparsebench.methods.kv_cache.bitmap import pack, tile_bytes
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
