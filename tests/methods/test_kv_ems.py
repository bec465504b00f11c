"""EMS: classes, the zero class, weights, norms (the hand checks of its description; there is no released code)."""

from __future__ import annotations

import pytest
import torch
from kv_calls import Layer, entries

from sparsebench.errors import UserError
from sparsebench.methods.kv_cache.ems import Ems, assigned, combined, merged

KEYS = torch.tensor([[[[2.0, 0], [1, 0], [0, 1], [0, 3]]]])
VALUES = torch.tensor([[[[1.0], [2], [3], [4]]]])
SCORES = torch.tensor([[[4.0, 2, 1, 9]]])
CENTRES = torch.tensor([[[True, False, False, False]]])  # the last token is the window: kept, but no centre
CANDIDATES = torch.tensor([[[False, True, True, False]]])


def test_similar_candidates_join_and_others_go_to_the_zero_class():
    to = assigned(KEYS, CENTRES, CANDIDATES, 0.6)
    assert to.tolist() == [[[0, 0, -1, 3]]]
    keys, values, joined = merged(KEYS, VALUES, SCORES, to)
    assert values[0, 0, 0].item() == pytest.approx(4 / 3)
    assert keys[0, 0, 0].tolist() == [2, 0]
    assert torch.equal(keys[:, :, 3], KEYS[:, :, 3]) and joined.tolist() == [[[True, False, False, False]]]


def test_the_order_of_candidates_does_not_matter():
    order = torch.tensor([0, 2, 1, 3])
    to = assigned(KEYS[:, :, order], CENTRES, CANDIDATES, 0.6)
    keys, values, _ = merged(KEYS[:, :, order], VALUES[:, :, order], SCORES[..., order], to)
    assert values[0, 0, 0].item() == pytest.approx(4 / 3) and keys[0, 0, 0].tolist() == [2, 0]


@pytest.mark.parametrize(("tau", "evicted"), [(-1.0, 0), (1.01, 2), (None, 1)])
def test_tau_says_how_much_is_merged(tau, evicted):
    to = assigned(KEYS, CENTRES, CANDIDATES, tau)
    assert int((to == -1).sum()) == evicted


def test_a_class_without_scores_weighs_its_members_alike():
    _, values, _ = merged(KEYS, VALUES, torch.zeros_like(SCORES), assigned(KEYS, CENTRES, CANDIDATES, 0.6))
    assert values[0, 0, 0].item() == pytest.approx(1.5)


def test_merged_keys_keep_their_norm_only_if_asked():
    keys = torch.tensor([[[[2.0, 0], [0, 2.0]]]])
    to = torch.tensor([[[0, 0]]])
    ones = torch.ones(1, 1, 2)
    assert merged(keys, keys, ones, to)[0][0, 0, 0].norm().item() == pytest.approx(2.0)
    assert merged(keys, keys, ones, to, norm_preserve=False)[0][0, 0, 0].norm().item() == pytest.approx(2**0.5)


def test_both_scores_have_the_same_mass():
    total, local = torch.rand(1, 2, 20) * 50, torch.rand(1, 2, 20)
    lengths = torch.full((1, 2), 20)
    joined = combined(total, local, lengths, 1, "sum")
    torch.testing.assert_close(joined.sum(-1), 2 * local.sum(-1))
    assert bool((combined(total, local, lengths, 1, "max") <= joined).all())


def feed(how, query, key, value):
    layer = Layer()
    layer.feed(how, query, key, value)
    return layer


def test_duplicates_are_merged_into_one_entry():
    """Every fact twice in a row, half of the places: what is merged has the same value."""
    facts = torch.randn(1, 1, 20, 8, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, dim=2)
    query = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(1))
    # keys alike whatever their positions: tested on tensors, without a rotary embedding
    layer = feed(Ems(budget=20, window=2, tau="0.99", gamma=10.0), query, facts, facts).cache.layers[0]
    assert layer.keys.shape[2] == 20
    held = {tuple(one) for one in facts[0, 0].round(decimals=3).tolist()}
    assert {tuple(one) for one in layer.values[0, 0].round(decimals=3).tolist()} <= held


def test_tau_above_one_is_eviction_by_the_same_score():
    query, key, value = (torch.randn(1, n, 40, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2))
    layer = feed(Ems(budget=16, window=4, tau="1.01"), query, key, value).cache.layers[0]
    where = layer.positions[..., None].expand(-1, -1, -1, 8)
    assert torch.equal(layer.keys, key.gather(2, where)) and torch.equal(layer.values, value.gather(2, where))
    assert bool((layer.positions[..., -4:] == torch.arange(36, 40)).all())


def test_sums_of_attention_favour_early_tokens_unless_counted():
    now = entries(torch.zeros(1, 2, 60, 4), torch.zeros(1, 1, 60, 4))  # uniform attention
    means = {}
    for norm in ("count", "none"):
        how = Ems(window=8, global_norm=norm, pool_kernel=1)
        now.layer.state.clear()
        how.observe(now)
        scores = how.scores(now, torch.tensor([8]))[0, 0]
        means[norm] = (scores[:15].mean() / scores[36:51].mean()).item()
    assert means["none"] > means["count"] > 1


def test_decoding_compresses_again_when_the_buffer_is_full():
    how, layer = Ems(budget=16, window=4, decode_buffer=8), Layer()
    lengths = []
    for count in (40, *[1] * 18):
        layer.feed(how, *(torch.randn(1, n, count, 8) for n in (2, 1, 1)))
        lengths.append(int(layer.cache.layers[0].lengths.max()))
    assert lengths[0] == 16 and max(lengths) == 24 and lengths[9] == 16 and lengths[-1] == 16


@pytest.mark.parametrize("options", [{"pool_kernel": 4}, {"tau": "most"}])
def test_options_that_do_not_fit(options):
    with pytest.raises(UserError, match=r"method\.ems\."):
        Ems(**options).check_model(None)
