"""KVMerger: sets, weights, budgets (the hand checks of its description; there is no released code)."""

from __future__ import annotations

import pytest
import torch
from kv_calls import Layer

from sparsebench.errors import UserError
from sparsebench.methods.kv_cache.kvmerger import KvMerger, Watch, neighbours

NOTHING = torch.zeros(1, 1, dtype=torch.long)


def one(*numbers):
    """(1, 1, S, 1)"""
    return torch.tensor(numbers)[None, None, :, None]


@pytest.mark.parametrize(("sigma", "value", "key"), [("mean_dist", 10.1799, 0.03597), ("rms", 12.6894, 0.53788)])
def test_weights_around_the_pivot(sigma, value, key):
    sets = torch.tensor([[[0, 0]]])
    paid = torch.tensor([[[1.0, 0.5]]])
    pivots, keys, values, sums = KvMerger(sigma=sigma).merged(one(0.0, 2.0), one(10.0, 20.0), paid, sets)
    assert pivots.tolist() == [[[True, False]]] and sums[0, 0, 0] == 1.5
    assert values[0, 0, 0].item() == pytest.approx(value, abs=1e-3)
    assert keys[0, 0, 0].item() == pytest.approx(key, abs=1e-3)


def walk(*cosines):
    """Keys (1, 1, S, 2) whose neighbours have these cosines."""
    angles = (
        torch.tensor([0.0, *cosines]).where(torch.tensor([False] + [True] * len(cosines)), torch.tensor(1.0)).acos()
    )
    turned = angles.cumsum(0)
    return torch.stack([turned.cos(), turned.sin()], dim=-1)[None, None]


WALK = walk(0.9, 0.8, 0.2, 0.95)
PAID = torch.ones(1, 1, 5)


@pytest.mark.parametrize(("protected", "sets"), [([], [0, 0, 0, 1, 1]), ([1], [0, 1, 2, 3, 3])])
def test_sets_are_runs_of_similar_keys(protected, sets):
    free = torch.ones(1, 1, 5, dtype=torch.bool)
    free[..., protected] = False
    found = KvMerger(eps_mode="fixed").sets(WALK, PAID, free, NOTHING)
    assert found[0, 0].tolist() == sets


@pytest.mark.parametrize("options", [{}, {"max_set_size": 5}])
def test_the_budget_takes_the_most_similar(options):
    free = torch.ones(1, 1, 5, dtype=torch.bool)
    how = KvMerger(**options)
    assert how.sets(WALK, PAID, free, NOTHING + 1)[0, 0].tolist() == [0, 1, 2, 3, 3]
    assert how.sets(WALK, PAID, free, NOTHING + 3)[0, 0].tolist() == [0, 0, 0, 1, 1]
    assert how.sets(WALK, PAID, free, NOTHING)[0, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("options", [{}, {"max_set_size": 5}])
def test_protected_entries_hold_sets_apart_whatever_the_budget(options):
    free = torch.tensor([[[True, True, False, True, True]]])
    assert KvMerger(**options).sets(WALK, PAID, free, NOTHING + 4)[0, 0].tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("sparsity", "eps"), [(0.2, 0.95), (0.4, 0.9), (0.6, 0.8), (0.8, 0.2), (0.95, -1.0), (0.05, 2.0)]
)
def test_a_calibrated_eps_is_the_one_that_so_many_neighbours_reach(sparsity, eps):
    watch = Watch(KvMerger())
    free = torch.ones(1, 1, 5, dtype=torch.bool)
    cosines = neighbours(WALK, free)[0, 0]
    watch.cosines, watch.entries = {0: [torch.cat([cosines, torch.tensor([-2.0])])]}, {0: 5}
    assert watch.thresholds(sparsity).tolist() == pytest.approx([eps], abs=1e-5)


def test_sets_do_not_grow_beyond_the_largest():
    keys = torch.ones(1, 1, 6, 2)
    free = torch.ones(1, 1, 6, dtype=torch.bool)
    found = KvMerger(eps_mode="fixed", max_set_size=2).sets(keys, torch.ones(1, 1, 6), free, NOTHING)
    assert found[0, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_linkages_look_at_different_members():
    keys = walk(0.9, 0.9, 0.9)  # each near the next one, the last far from the first
    paid = torch.tensor([[[9.0, 1, 1, 1]]])
    free = torch.ones(1, 1, 4, dtype=torch.bool)
    found = {
        linkage: KvMerger(eps_mode="fixed", eps=0.7, linkage=linkage).sets(keys, paid, free, NOTHING)[0, 0].tolist()
        for linkage in ("adjacent", "centroid", "pivot")
    }
    assert found["adjacent"] == [0, 0, 0, 0] and found["pivot"] == [0, 0, 1, 1]
    assert found["centroid"][:3] == [0, 0, 0]


def test_equal_entries_merge_into_themselves():
    keys, values = torch.ones(1, 1, 3, 4), torch.full((1, 1, 3, 4), 5.0)
    _, merged_keys, merged_values, _ = KvMerger().merged(keys, values, torch.ones(1, 1, 3), torch.zeros(1, 1, 3).long())
    assert torch.equal(merged_keys, keys) and torch.equal(merged_values, values)


def output_error(keep):
    """Mean squared error of attention after the keys and values of a random walk were halved by ``keep``."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 64, 16, generator=generator)
    keys = [noise[:, :, 0]]
    for step in noise[:, :, 1:].unbind(2):
        keys.append(0.95 * keys[-1] + (1 - 0.95**2) ** 0.5 * step)
    keys, values = torch.stack(keys, dim=2), torch.randn(1, 1, 64, 16, generator=generator).cumsum(dim=2) / 8
    sets = torch.arange(64)[None, None] // 2
    query = torch.randn(1, 1, 32, 16, generator=generator)
    before = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    after = torch.nn.functional.scaled_dot_product_attention(query, *keep(keys, values, sets))
    return (after - before).pow(2).mean().item()


def test_merging_is_nearer_than_dropping_on_a_random_walk():
    def merging(keys, values, sets):
        pivots, keys, values, _ = KvMerger().merged(keys, values, torch.ones(1, 1, 64), sets)
        return keys[pivots][None, None], values[pivots][None, None]

    def dropping(keys, values, sets):
        return keys[:, :, ::2], values[:, :, ::2]

    assert output_error(merging) <= output_error(dropping)


def test_every_head_ends_with_its_budget_and_merges_again():
    how, layer = KvMerger(budget=20, merge_interval=8), Layer()
    lengths = []
    for count in (48, *[1] * 17):
        layer.feed(how, *(torch.randn(1, n, count, 8) for n in (4, 2, 2)))
        lengths.append(layer.cache.layers[0].lengths.unique().tolist())
    assert lengths[0] == [20] and lengths[7] == [27] and lengths[8] == [20] and lengths[16] == [20]


def test_a_budget_below_what_is_protected():
    with pytest.raises(
        UserError, match=r"method\.kvmerger\.budget=10: keeps 10 of a prompt's 100 tokens; recent_ratio"
    ):
        KvMerger(budget=10).check_prompt(100)
