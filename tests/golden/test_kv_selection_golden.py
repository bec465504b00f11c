"""Methods that choose what each query reads, against scores, choices and outputs of the reference implementations."""

from __future__ import annotations

import pytest
import torch
from kv_calls import Layer, entries, tables

from sparsebench.methods.kv_cache.entries import Entries
from sparsebench.methods.kv_cache.quest import Quest
from sparsebench.methods.kv_cache.rotary import turned
from sparsebench.methods.kv_cache.tokenselect import TokenSelect, fingerprint


def close(found, expected, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def number(case, key):
    return case[key].item()


def before_last(query, key, value):
    """A layer that was fed all but the last key."""
    layer = Layer()
    layer.call(query.expand(-1, -1, key.shape[2] - 1, -1), key[:, :, :-1], value[:, :, :-1])
    return layer


def view(query, key):
    """What a method sees when the last token is decoded."""
    return Entries(before_last(query, key, key).call(query, key[:, :, -1:], key[:, :, -1:]))


# Quest


def quest(case, **options):
    return Quest(page_size=number(case, "page_size"), budget=number(case, "token_budget"), dense_layers=0, **options)


@pytest.mark.golden("quest", "page_scores")
def test_page_scores_are_those_of_the_released_code(case):
    close(quest(case, reference=True).scores(view(case["query"], case["keys"]))[0, :, 0], case.golden)


@pytest.mark.golden("quest", "page_scores")
def test_page_scores_bound_every_product(case):
    how, now = quest(case), view(case["query"], case["keys"])
    products = (now.call.query.float() @ now.keys.transpose(-1, -2))[0, :, 0]
    pages = now.rank[0, 0] // how.page_size
    bounds = how.scores(now)[0, :, 0]
    assert bool((bounds[:, pages] >= products - 1e-5).all())


@pytest.mark.golden("quest", "(page_selected|token_mask|output)")
def test_pages_are_those_of_the_released_code(case):
    how, query, keys = quest(case, reference=True), case["query"], case["keys"]
    now = view(query, keys)
    count = how.kept(now.prompt)
    if case.key == "page_selected":
        assert torch.equal(how.pages(now, count)[0, :, 0], case.golden)
    elif case.key == "token_mask":
        assert torch.equal(how.select(now, count)[0, :, 0], case.golden)
    else:
        layer = before_last(query, keys, case["values"])
        close(layer.feed(how, query, keys[:, :, -1:], case["values"][:, :, -1:])[0, :, 0], case.golden, rtol=0)


def read(mask):
    """Page ids of a mask (H, pages), by head."""
    return [set(line.nonzero()[:, 0].tolist()) for line in mask]


def check_pages(how, now, golden, lengths):
    pages = how.pages(now, how.kept(now.prompt))
    last = (int(now.seen[0, 0, 0]) - 1) // how.page_size
    mask = now.repeated(pages) if pages.shape[1] != now.call.query.shape[1] else pages
    assert read(mask[0, :, 0]) == [set(line) for line in golden.tolist()]
    assert all(last in line for line in read(mask[0, :, 0]))
    tokens = how.select(now, how.kept(now.prompt))[0, :, 0].sum(dim=-1)
    assert tokens.unique().tolist() == lengths.tolist()


@pytest.mark.golden("quest", "sf_pages_(?P<form>perhead|shared)")
def test_pages_with_the_current_one_forced(case):
    shared = case.parts["form"] == "shared"
    how = quest(case, share_pages="group" if shared else "none")
    check_pages(how, view(case["query"], case["keys"]), case.golden, case[f"sf_new_len_{case.parts['form']}"])


def frontier(case, **options):
    page, budget = case["quest_cfg_page_budget"].tolist()
    keys = torch.cat([case["k"], case["quest_new_key"][:, :, None]], dim=2)
    return Quest(page_size=page, budget=budget, dense_layers=0, **options), view(case["quest_query"][:, :, None], keys)


@pytest.mark.golden("sparse_frontier", "quest_pages_(?P<form>shared|unshared)")
def test_pages_as_harmonised(case):
    how, now = frontier(case, share_pages="group" if case.parts["form"] == "shared" else "none")
    check_pages(how, now, case.golden, case["quest_new_cache_seqlens"])


@pytest.mark.golden("sparse_frontier", "quest_page_minmax_prefill")
def test_page_vectors_as_harmonised(case):
    how = Quest(page_size=case["quest_cfg_page_budget"][0].item(), dense_layers=0)
    paged, held = how.paged(entries(case["q"], case["k"]))
    low = paged.masked_fill(~held, torch.inf).amin(dim=3)[0].transpose(0, 1)
    high = paged.masked_fill(~held, -torch.inf).amax(dim=3)[0].transpose(0, 1)
    assert torch.equal(torch.stack([low, high], dim=1), case.golden)


# TokenSelect


def tokenselect(case, **options):
    sizes = {name: number(case, name) for name in ("n_init", "n_local", "top_k")}
    return TokenSelect(gqa_map="modulo", **sizes, **options)


def chunk(case):
    """Queries of a decoded token or of a chunk (1, H, C, D), before the rotary embedding."""
    size = case["keys"].shape[-1]
    return case[f"query_{case.parts['what']}"].unflatten(-1, (-1, size)).transpose(0, 1)[None]


def seen_by_all(how, case):
    """Fingerprints (1, H, D), keys (1, K, T, D) and the candidates (1, T)."""
    query, keys = chunk(case), case["keys"].transpose(0, 1)[None]
    turn = tables(number(case, "rope_theta"), keys.shape[-1])
    mark = fingerprint(query, torch.tensor([how.n_local]), turn)
    places = torch.arange(keys.shape[2])
    return mark, keys, ((places >= how.n_init) & (places < keys.shape[2] - how.n_local))[None]


@pytest.mark.golden("tokenselect", "query_fingerprint_(?P<what>decode|chunk)")
def test_fingerprints_are_those_of_the_released_code(case):
    close(seen_by_all(tokenselect(case), case)[0][0], case.golden)


@pytest.mark.golden("tokenselect", "(?P<kind>dots|vote)_(?P<what>decode|chunk)_fp32")
def test_votes_are_those_of_the_released_code(case):
    how = tokenselect(case, score_dtype="fp32")
    mark, keys, among = seen_by_all(how, case)
    found = (
        how.dots(mark, keys)[0]
        if case.parts["kind"] == "dots"
        else how.votes(mark, keys, among, torch.tensor([how.top_k]))[0]
    )
    close(found[..., among[0]], case.golden, atol=1e-4 if case.parts["kind"] == "dots" else 1e-6)


@pytest.mark.golden("tokenselect", "indices_(?P<what>decode|chunk)(?P<pool>_pool)?_(?P<dtype>bf16|fp32)")
def test_selections_are_those_of_the_released_code(case):
    pool = number(case, "pool_kernel") if case.parts["pool"] else -1
    how = tokenselect(case, score_dtype=case.parts["dtype"], pool_kernel=pool)
    query, keys = chunk(case), case["keys"].transpose(0, 1)[None]
    theta, total = number(case, "rope_theta"), keys.shape[2]
    turn, tokens = tables(theta, keys.shape[-1]), query.shape[2]
    rotated = turned(keys, torch.arange(total).expand(1, keys.shape[1], -1), turn)
    query = turned(query, torch.arange(total - tokens, total).expand(1, 1, -1), turn)
    layer = Layer(theta)
    layer.call(query[:, :, :1].expand(-1, -1, total - tokens, -1), *[rotated[:, :, : total - tokens]] * 2)
    now = Entries(layer.call(query, *[rotated[:, :, total - tokens :]] * 2))
    chosen, parts = how.choose(now, how.kept(now.prompt))
    assert len(parts) == 1
    found, golden = set(chosen[0, -1].nonzero()[:, 0].tolist()), set(case.golden.tolist())
    assert len(found) == len(golden)
    if case.parts["dtype"] == "fp32" and not case.parts["pool"]:
        assert found == golden
    else:  # rounded or pooled votes tie
        assert len(found & golden) >= 0.9 * len(golden)
