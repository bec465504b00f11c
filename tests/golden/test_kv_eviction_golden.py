"""Methods that drop cache entries, against scores and kept positions of the reference implementations."""

from __future__ import annotations

import pytest
import torch
from kv_calls import Layer, entries, kept, tables

from sparsebench.methods.kv_cache.ada_snapkv import AdaSnapKv
from sparsebench.methods.kv_cache.entries import Entries, top
from sparsebench.methods.kv_cache.expected_attention import ExpectedAttention, averaged_rotation, statistics
from sparsebench.methods.kv_cache.h2o import H2O, SUMS
from sparsebench.methods.kv_cache.rotary import turned
from sparsebench.methods.kv_cache.snapkv import DROPPED, SnapKv
from sparsebench.methods.kv_cache.streaming_llm import StreamingLlm
from sparsebench.methods.kv_cache.tova import Tova


def close(found, expected, rtol=1e-4, atol=1e-6):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def chosen(how, now):
    return kept(how.choose(now, how.kept(now.prompt)))


def number(case, key):
    return case[key].item()


# StreamingLLM


def streaming(case, **options):
    return StreamingLlm(n_sink=number(case, "n_sink"), sparsity=number(case, "compression_ratio"), **options)


@pytest.mark.golden("streaming_llm", "kvpress_kept")
def test_streaming_keeps_what_kvpress_keeps(case):
    now = entries(case["keys_rope"], case["keys_rope"])
    assert torch.equal(chosen(streaming(case), now), case.golden)


@pytest.mark.golden("streaming_llm", "kvpress_scores")
def test_streaming_drops_what_scores_nothing(case):
    how, now = streaming(case), entries(case["keys_rope"], case["keys_rope"])
    assert torch.equal(how.choose(now, how.kept(now.prompt)).float(), case.golden)


@pytest.mark.golden("streaming_llm", "kvpress_rerotated_keys")
def test_streaming_turns_keys_to_their_places_in_the_cache(case):
    where = case["kvpress_kept"]
    keys = case["keys_rope"].gather(2, where[..., None].expand(-1, -1, -1, case["keys_rope"].shape[-1]))
    turn = tables(number(case, "rope_theta"), keys.shape[-1])
    close(turned(keys, torch.arange(where.shape[-1]) - where, turn), case.golden, atol=1e-4)

    layer = Layer(number(case, "rope_theta"))
    layer.feed(streaming(case), case["keys_rope"], case["keys_rope"], case["values"])
    call = layer.call(*(torch.zeros(1, 2, 1, keys.shape[-1]) for _ in range(3)))
    streaming(case).before(Entries(call))
    close(call.key[:, :, :-1], case.golden, atol=1e-4)


@pytest.mark.golden("streaming_llm", r"original_kept_(call|evict_for_(?P<coming>\d+))")
def test_streaming_keeps_what_the_released_code_keeps(case):
    how = StreamingLlm(
        n_sink=number(case, "start_size"), recent=number(case, "recent_size"), room=int(case.parts["coming"] or 0)
    )
    found = chosen(how, entries(case["keys_rope"], case["keys_rope"]))
    assert torch.equal(found[0, 0], case.golden) and torch.equal(found[0, 1], case.golden)


# H2O


def repeated(case, key, heads):
    return case[key].repeat_interleave(heads // case[key].shape[1], dim=1)


@pytest.mark.golden("h2o", "kvpress_observed_(scores|kept)")
def test_observed_attention_is_that_of_kvpress(case):
    how = H2O(variant="observed", sparsity=number(case, "compression_ratio"))
    now = entries(case["queries_rope"], case["keys_rope"])
    how.observe(now)
    if case.key.endswith("scores"):
        close(now.layer.state[SUMS] / (now.lengths[..., None] - now.rank), case.golden)
    else:
        assert torch.equal(chosen(how, now), case.golden)


@pytest.mark.golden("h2o", "stream_(kept|scores)")
def test_real_drop_streams_as_the_released_code(case):
    query = case["queries_rope"]
    key = repeated(case, "keys_rope", query.shape[1])  # the released code keeps a set per query head
    how = H2O(heavy_size=number(case, "hh_size"), recent_size=number(case, "recent_size"))
    layer, start, found = Layer(), number(case, "prefill_len"), []
    for first, last in [(0, start), *((t, t + 1) for t in range(start, start + len(case.golden) - 1))]:
        layer.feed(how, *(x[:, :, first:last] for x in (query, key, key)))
        found.append(layer.cache.layers[0].state[SUMS] if case.key.endswith("scores") else layer.positions)
    if case.key.endswith("scores"):
        close(torch.cat(found), case.golden)
    else:
        assert torch.equal(torch.cat(found), case.golden)


# TOVA and SnapKV


@pytest.mark.golden("tova", "(scores|kept)")
def test_tova_is_that_of_kvpress(case):
    last = case["last_attention"]
    heads = number(case, "num_kv_heads")
    now = entries(torch.zeros(1, last.shape[1], last.shape[2], 4), torch.zeros(1, heads, last.shape[2], 4))
    now.attention = lambda last: case["last_attention"][:, :, None]
    how = Tova(sparsity=number(case, "compression_ratio"))
    if case.key == "kept":
        assert torch.equal(chosen(how, now), case.golden)
    else:
        scores = how.score(now)
        close(scores[..., :-1], case.golden[..., :-1], rtol=1e-5)
        assert bool((case.golden.argmax(-1) == last.shape[2] - 1).all()) and bool(scores[..., -1].isinf().all())


def snap(case):
    return SnapKv(
        window_size=number(case, "window_size"),
        kernel_size=number(case, "kernel_size"),
        sparsity=number(case, "compression_ratio"),
    )


@pytest.mark.golden("snapkv", "kvpress_(scores|kept)")
def test_snapkv_is_that_of_kvpress(case):
    how, now = snap(case), entries(case["queries_rope"], case["keys_rope"])
    if case.key.endswith("kept"):
        assert torch.equal(chosen(how, now), case.golden)
        return
    window, scores = number(case, "window_size"), how.score(now)
    close(scores[..., :-window], case.golden[..., :-window])
    assert bool(scores[..., -window:].isinf().all())


@pytest.mark.golden("snapkv", "original_kept_(?P<pooling>avg|max)pool")
def test_snapkv_votes_per_query_head_are_those_of_the_released_code(case):
    query = case["queries_rope"]
    now = entries(query, repeated(case, "keys_rope", query.shape[1]))
    how = SnapKv(
        window_size=number(case, "window_size"),
        kernel_size=number(case, "kernel_size"),
        pooling=case.parts["pooling"],
        budget=number(case, "max_capacity_prompt"),
    )
    found = chosen(how, now)
    if case.parts["pooling"] == "avg":
        assert torch.equal(found, case.golden)
    else:  # maxima are shared by neighbours: ties
        pairs = zip(found[0].tolist(), case.golden[0].tolist(), strict=True)
        assert all(len(set(a) & set(b)) >= 0.85 * len(b) for a, b in pairs)


@pytest.mark.golden("snapkv", "original_kept_avgpool")
def test_a_set_per_query_head_is_that_of_the_released_code(case):
    now = entries(case["queries_rope"], case["keys_rope"])
    how = SnapKv(
        window_size=number(case, "window_size"),
        kernel_size=number(case, "kernel_size"),
        group_reduce="per_query_head",
        budget=number(case, "max_capacity_prompt"),
    )
    union = how.choose(now, how.kept(now.prompt))
    sets = ~now.layer.state[DROPPED].transpose(2, 3)  # (B, K, H / K, S)
    assert torch.equal(kept(sets.flatten(1, 2)), case.golden)
    assert torch.equal(union, sets.any(dim=2))


def sizes(case):
    capacity, window, kernel, local, prefix = case["snap_cfg_capacity_window_kernel_local_prefix"].tolist()
    return {"budget": capacity, "window_size": window, "kernel_size": kernel, "local_window": local,
            "prefix_tokens": prefix}  # fmt: skip


@pytest.mark.golden("sparse_frontier", "snap_keep")
def test_snapkv_as_harmonised(case):
    how, now = SnapKv(**sizes(case)), entries(case["q"], case["k"])
    assert torch.equal(how.choose(now, how.kept(now.prompt))[0], case.golden)


@pytest.mark.golden("sparse_frontier", "ada_(keep|seq_lens)")
def test_ada_snapkv_as_harmonised(case):
    how = AdaSnapKv(**sizes(case), min_head_share=number(case, "ada_min_head_capacity_ratio"))
    now = entries(case["q"], case["k"])
    mask = how.choose(now, how.kept(now.prompt))[0]
    assert (mask if case.key == "ada_keep" else mask.sum(dim=-1)).tolist() == case.golden.tolist()


# Expected Attention


def expected_attention(case, **options):
    return ExpectedAttention(
        sparsity=number(case, "compression_ratio"),
        n_future=number(case, "n_future_positions"),
        n_sink=number(case, "n_sink"),
        epsilon=number(case, "epsilon"),
        **options,
    )


def prompt(case):
    """The layer's prompt; queries are given before the rotary embedding, the plug undoes it."""
    size = case["keys_rope"].shape[-1]
    query = (case["hidden_states"] @ case["q_proj_weight"].T).unflatten(-1, (-1, size)).transpose(1, 2)
    turn = tables(number(case, "rope_theta"), size)
    query = turned(query, torch.arange(query.shape[2]).expand(1, 1, -1), turn)
    return entries(query, case["keys_rope"], case["values"], number(case, "rope_theta"))


@pytest.mark.golden("expected_attention", "(?P<what>mean|cov)_query")
def test_expected_statistics_are_those_of_kvpress(case):
    how, now = expected_attention(case), prompt(case)
    counted = (torch.arange(now.call.tokens) >= how.n_sink).float()[None, None]
    mean, spread = how.rotated(now, *statistics(now.call.unrotated()[0], counted))
    close(mean if case.parts["what"] == "mean" else spread, case.golden, rtol=1e-3, atol=1e-5)


OPTIONS = {"full": {}, "nocov": {"use_covariance": False}, "novnorm": {"use_vnorm": False}}


@pytest.mark.golden("expected_attention", "(?P<what>scores|kept)_(?P<form>full|nocov|novnorm)")
def test_expected_attention_is_that_of_kvpress(case):
    how, now = expected_attention(case, **OPTIONS[case.parts["form"]]), prompt(case)
    if case.parts["what"] == "kept":
        assert torch.equal(chosen(how, now), case.golden)
    else:
        close(how.score(now)[..., how.n_sink :], case.golden[..., how.n_sink :], rtol=1e-3, atol=1e-7)


def test_the_averaged_rotation_turns_as_the_rotary_embedding_does():
    vector = torch.randn(1, 1, 1, 8)
    turn = tables(100.0, 8)
    cos, sin = (part[:, 0] for part in turn(torch.tensor([[5]])))
    close(
        (averaged_rotation(cos, sin, 8) @ vector[0, 0, 0])[0], turned(vector, torch.full((1, 1, 1), 5), turn)[0, 0, 0]
    )


def test_of_equal_scores_the_first_is_kept():
    assert top(torch.zeros(4), torch.tensor(2), torch.tensor([True, False, True, True])).tolist() == [
        True,
        False,
        True,
        False,
    ]
