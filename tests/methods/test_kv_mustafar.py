"""Mustafar's window, counts, directions and bytes."""

from __future__ import annotations

import pytest
import torch
from kv_calls import Layer

from sparsebench.errors import UserError
from sparsebench.methods.kv_cache.bitmap import pack
from sparsebench.methods.kv_cache.mustafar import Mustafar, survivors


def fed(how, tokens=80, steps=(1, 1, 3), size=16, heads=2):
    generator = torch.Generator().manual_seed(0)
    layer = Layer()
    for count in (tokens, *steps):
        query, key, value = (torch.randn(1, n, count, size, generator=generator) for n in (2 * heads, heads, heads))
        layer.feed(how, query, key, value)
    return layer.cache.layers[0]


def zeros(x):
    """(B, K, S): zeros of each vector."""
    return (x == 0).sum(dim=-1)


@pytest.mark.parametrize(("exact", "count"), [(False, 7), (True, 8)])
def test_every_token_behind_the_window_loses_the_same_number_once(exact, count):
    layer = fed(Mustafar(sparsity=0.5, residual_length=32, exact_count=exact))
    for x in (layer.keys, layer.values):
        assert zeros(x)[..., :53].unique().tolist() == [count]
        assert zeros(x)[..., 53:].unique().tolist() == [0]


def test_keys_and_values_have_their_own_level():
    layer = fed(Mustafar(k_sparsity=0.75, v_sparsity=0.0, residual_length=8))
    assert zeros(layer.keys)[..., :70].unique().tolist() == [11] and not zeros(layer.values).any()


def test_a_short_prompt_is_left_alone():
    layer = fed(Mustafar(sparsity=0.5, residual_length=32), tokens=20)
    assert not zeros(layer.keys).any()


def test_channels_are_ranked_in_whole_groups():
    layer = fed(Mustafar(sparsity=0.5, direction_v="channel", group_size=16, residual_length=8, exact_count=True))
    by_group = (layer.values[0, :, :64] == 0).unflatten(1, (4, 16)).sum(dim=2)
    assert by_group.unique().tolist() == [8]
    assert not zeros(layer.values)[..., 64:].any() and zeros(layer.keys)[..., :77].unique().tolist() == [8]


@pytest.mark.parametrize("which", ["k", "v"])
def test_output_aware_counts_are_exact(which):
    direction = {} if which == "k" else {"direction_v": "channel", "group_size": 8}
    how = Mustafar(sparsity=0.5, residual_length=8, **{f"criterion_{which}": "output_aware"}, **direction)
    layer = fed(how)
    found = layer.keys if which == "k" else layer.values
    assert int((found == 0).sum()) == 2 * 16 * (77 if which == "k" else 72) // 2


def test_output_aware_keys_follow_the_queries():
    how, layer = Mustafar(sparsity=0.5, residual_length=0, criterion_k="output_aware"), Layer()
    query = torch.ones(1, 2, 40, 16)
    query[..., :8] = 100.0
    layer.feed(how, query, *torch.rand(2, 1, 1, 40, 16) + 0.5)
    assert bool((layer.cache.layers[0].keys[..., :8] != 0).all()) and not layer.cache.layers[0].keys[..., 8:].any()


def test_the_bitmap_store_prunes_chunks_and_changes_nothing_else():
    masked, packed = (
        fed(Mustafar(sparsity=0.5, residual_length=8, compress_chunk=64, store=store)) for store in ("masked", "bitmap")
    )
    assert torch.equal(masked.keys[:, :, :64], packed.keys[:, :, :64])
    assert torch.equal(masked.values[:, :, :64], packed.values[:, :, :64])
    assert not zeros(packed.keys)[..., 64:].any()


def test_all_equal_vectors_stay_whole():
    assert bool(survivors(torch.ones(3, 8), 0.5, exact=False).all())
    assert survivors(torch.ones(8), 0.5, exact=True).tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("level", [0.3, 0.5, 0.7])
def test_bytes_of_a_long_cache(level):
    """The expected shares at head size 128 in half precision: about 65% at half, 46% at 70% of the entries pruned."""
    x = torch.randn(1, 512, 128, generator=torch.Generator().manual_seed(1)).half()
    share = pack(x * survivors(x.float().abs(), level, exact=False), "channels").nbytes / (x.numel() * 2)
    assert share == pytest.approx({0.3: 0.85, 0.5: 0.66, 0.7: 0.47}[level], abs=0.02)


def test_shapes_that_do_not_fill_tiles():
    with pytest.raises(ValueError, match="whole tiles of 64"):
        pack(torch.zeros(1, 63, 64), "tokens")
    with pytest.raises(UserError, match=r"compress_chunk=100: must be a multiple of 64"):
        Mustafar(compress_chunk=100).check_model(None)
