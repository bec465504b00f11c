"""What every sparse prefill method must keep: exactness with nothing dropped, targets, causality, padding, counts."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefill_models import IDS, METHODS, attachment, make_llama, run

from sparsebench.errors import UserError
from sparsebench.methods.attention.base import AttentionMethod, check, check_prompts, search
from sparsebench.methods.attention.flexprefill import FlexPrefill
from sparsebench.methods.attention.local_sink import LocalSink
from sparsebench.methods.attention.minference import MInference
from sparsebench.methods.attention.pbs_attn import PbsAttn
from sparsebench.methods.attention.selections import Heads, Selection
from sparsebench.methods.attention.vertical_slash import VerticalSlash
from sparsebench.models.base import LoadedModel
from sparsebench.tasks.base import Evaluation
from sparsebench.tasks.tinyworld import Encoded, TinyworldTask


@pytest.fixture(scope="module", params=["grouped", "multi_head"])
def model(request):
    return make_llama(2 if request.param == "grouped" else 4)


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_nothing_dropped_is_dense(model, name):
    dense = run(model, None, IDS)
    for options in ({"sparsity": 0.0}, METHODS[name].everything):
        if options is None:
            continue
        logits, counted = run(model, METHODS[name].make(**options), IDS)
        close(logits, dense)
        assert counted.acted and counted.achieved == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("target", [0.3, 0.6])
def test_a_target_is_reached_by_each_prompt_alone(model, name, target):
    method = METHODS[name].make(sparsity=target)
    logits, counted = run(model, method, IDS)
    assert counted.achieved == pytest.approx(target, abs=METHODS[name].slack)
    assert counted.columns["sparsity_mask"] == counted.achieved
    assert {row["method"] for row in counted.rows} == {"test"} and len(counted.rows) == 2
    for row in range(len(IDS)):
        close(run(model, method, IDS[row : row + 1])[0], logits[row : row + 1])


def test_padding_on_the_left_changes_nothing(model, name):
    method = METHODS[name].make(sparsity=0.5)
    pads = torch.tensor([0, 9, 30])
    mask = (torch.arange(IDS.shape[1]) >= pads[:, None]).long()
    places = (torch.arange(IDS.shape[1]) - pads[:, None]).clamp(min=0)
    logits, _ = run(model, method, IDS, attention_mask=mask, position_ids=places)
    for row, pad in enumerate(pads.tolist()):
        alone, _ = run(model, method, IDS[row : row + 1, pad:])
        close(logits[row : row + 1, pad:], alone)


def test_tokens_that_follow_through_the_cache_are_dense_and_not_counted(model, name):
    method = METHODS[name].make(sparsity=0.5)
    whole, _ = run(model, method, IDS[:, :128])
    handler = attachment(method, model)
    with torch.no_grad(), handler.attached():
        output = model(input_ids=IDS[:, :128], use_cache=True)
        close(output.logits, whole)
        pairs = handler.counted().rows[0]["total"]
        model(input_ids=IDS[:, 128:140], past_key_values=output.past_key_values)
        assert handler.counted().rows[0]["total"] == pairs == 3 * 128 * 129 / 2


def test_indices_cost_something_unless_nothing_is_looked_for(model, name):
    counted = run(model, METHODS[name].make(sparsity=0.5), IDS)[1]
    cost = counted.saving.index_prefill(1024)
    assert (cost == 0) == (name in ("local_sink", "tri_shape"))
    assert counted.saving.index_prefill(2048) >= cost
    assert counted.saving.pairs_prefill == pytest.approx(1 - counted.achieved)


def test_counting_starts_anew_and_the_model_stays_as_it_was(model, name):
    before = run(model, None, IDS)
    method = METHODS[name].make(sparsity=0.5)
    first, second = (run(model, method, IDS)[1] for _ in range(2))
    assert first.achieved == second.achieved and first.rows == second.rows
    assert run(model, None, IDS).equal(before)


def test_small_forms_count_what_their_masks_hold(model, name, monkeypatch):
    """Every selection's analytic count of causal pairs is that of its mask."""
    found = []
    method = METHODS[name].make(sparsity=0.5)
    select = type(method).select

    def kept(self, heads):
        found.append(select(self, heads))
        return found[-1]

    monkeypatch.setattr(type(method), "select", kept)
    run(model, method, IDS[:1, :150])
    for selection in found:
        mask = selection.rows(0, 150).tril()
        torch.testing.assert_close(selection.pairs(), mask.sum(dim=(1, 2)).double(), atol=1e-6, rtol=0)
        assert selection.rows(37, 55).equal(selection.rows(0, 150)[:, 37:55])


def test_a_search_ends_at_the_nearest_value():
    assert search(0, 100, 0.5, lambda n: n / 100) == 50
    assert search(0, 100, 2.0, lambda n: n / 100) == 100
    assert search(5, 100, 0.01, lambda n: n / 100) == 5
    assert search(0, 10, 0.31, lambda n: (n // 5) * 0.3) == 5
    assert search(0.0, 1.0, 0.25, lambda x: x * x) == pytest.approx(0.5, abs=0.01)


def test_unreachable_models_are_refused():
    with pytest.raises(UserError, match="decoder"):
        check([("local_sink", LocalSink())], torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name, options, tokens, words", [
    (name, *case) for name, kind in METHODS.items() for case in kind.mistakes
])  # fmt: skip
def test_bad_input_names_the_option(model, name, options, tokens, words):
    with pytest.raises(UserError) as caught:
        method = METHODS[name].kind(**options)
        check([(name, method)], model)
        method.check_tokens(tokens)
    text = str(caught.value)
    assert all(word in text for word in words) and "\n" not in text, text


def sized() -> st.SearchStrategy[AttentionMethod]:
    """Methods with sizes of all kinds, for prompts of up to 100 tokens."""
    size, level = st.integers(1, 110), st.sampled_from([0.01, 0.5])
    few = st.none() | st.sampled_from([1, 2, 8])
    lines = st.builds(
        VerticalSlash, sparsity=level, forced_verticals=size, forced_slashes=few | size, tile_size=few | size
    )
    native = st.builds(
        lambda first, near, more: VerticalSlash(
            vertical_size=first + more, slash_size=near + more, forced_verticals=first, forced_slashes=near, tile_size=1
        ),
        size, size, st.integers(0, 9),
    )  # fmt: skip
    permuted = st.builds(
        lambda block, blocks, first, share: PbsAttn(
            sparsity=share, block_size=block, segment_size=block * blocks, force_first=first
        ),
        size, st.integers(1, 3), st.booleans(), level,
    )  # fmt: skip
    simple = st.builds(FlexPrefill, variant=st.just("simplified"), sparsity=level, min_budget=size, tile_size=few)
    original = st.builds(FlexPrefill, sparsity=level, min_budget=size, block_size=st.integers(8, 60))
    return st.one_of(lines, native, permuted, simple, original)


@settings(deadline=None, max_examples=150)
@given(method=sized(), tokens=st.integers(16, 100), seed=st.integers(0, 999))
def test_only_what_is_certain_to_leave_nothing_out_is_refused(method, tokens, seed):
    draw = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, tokens, 8, generator=draw) for _ in range(3))
    try:
        method.check_model(None)
        method.check_tokens(tokens)
    except UserError:
        return
    if not method.leaves_out(tokens):
        heads = Heads(0, query, key, value, 8**-0.5, lambda: (query, key), {}, False)
        assert method.select(heads).density == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("method, tokens, density", [
    (VerticalSlash(forced_verticals=54, forced_slashes=1, tile_size=1), 100, 0.95),
    (VerticalSlash(vertical_size=300, slash_size=8, forced_verticals=300), 512, 0.85),
])  # fmt: skip
def test_forced_sizes_alone_leave_something_out(method, tokens, density):
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, tokens, 8, generator=draw) for _ in range(3))
    heads = Heads(0, query, key, value, 8**-0.5, lambda: (query, key), {}, False)
    assert method.select(heads).density < density
    method.check_sizes([tokens])


@pytest.mark.parametrize("method", [
    VerticalSlash(forced_verticals=512), VerticalSlash(forced_verticals=195, vertical_size=199, slash_size=8),
    VerticalSlash(forced_slashes=600), VerticalSlash(tile_size=400), FlexPrefill(block_size=300),
    FlexPrefill(min_budget=600), FlexPrefill(variant="simplified", min_budget=600), PbsAttn(segment_size=512),
    PbsAttn(segment_size=520, block_size=8), PbsAttn(block_size=300),
])  # fmt: skip
@pytest.mark.parametrize("lengths", [[200], [200, 150, 100]])
def test_the_value_a_refusal_names_is_valid_and_the_largest(model, method, lengths):
    with pytest.raises(UserError, match=f"has only {max(lengths)} tokens; must be <=") as caught:
        check_prompts([("test", method)], model, iter(lengths))
    name, most = re.search(r"\.(\w+)=\d+: .* must be <= (\d+)$", str(caught.value)).groups()
    check_prompts([("test", replace(method, **{name: int(most)}))], model, lengths)
    with pytest.raises(UserError):
        check_prompts([("test", replace(method, **{name: int(most) + 1}))], model, lengths)


def test_options_fit_the_shortest_and_the_longest_prompt(model):
    method = PbsAttn(segment_size=24)  # blocks of 8, then of 64
    check_prompts([("test", method)], model, [200])
    with pytest.raises(UserError, match="4096 tokens"):
        check_prompts([("test", method)], model, [200, 4096])


def test_dense_layers_look_for_nothing(model):
    whole, half = (attachment(MInference(starting_layer=first), model) for first in (0, 1))
    costs = []
    for handler in (whole, half):
        with torch.no_grad(), handler.attached():
            model(input_ids=IDS, use_cache=False)
            costs.append(handler.counted().saving.index_prefill(1024))
    assert costs[0] == 2 * costs[1] > 0


def test_local_sink_keeps_sinks_window_and_last_rows():
    mask = Selection(6).rows(0, 6)
    assert mask.shape == (1, 6, 6) and mask.all()
    method = LocalSink(n_init=1, n_local=1, shape="tri_shape", n_last=2)
    found = method.build(type("H", (), {"tokens": 6, "query": torch.zeros(1, 6, 1)}), None, 1)
    assert found.rows(0, 6)[0].tril().int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1],
    ]
    assert replace(method, shape="a_shape", n_last=None).native(6) == 1


def test_documents_of_other_lengths_in_a_batch_change_nothing(model):
    """Padding behind a document would stand where methods look for its last queries."""
    draw = torch.Generator().manual_seed(7)
    lengths = (70, 96, 83, 96, 70, 64)
    documents = [
        Encoded(
            str(i), torch.randint(2, 64, (n,), generator=draw).tolist(), n - 8, [(p, p + 1) for p in range(n - 30, n)]
        )
        for i, n in enumerate(lengths)
    ]
    task, found = TinyworldTask(length=96), []
    for size in (1, 16):
        handler = attachment(METHODS["vertical_slash"].make(sparsity=0.5), model)
        with handler.attached():
            outcome = task.evaluate(LoadedModel(model, None, "toy", 256), Evaluation(size), {"copy": documents})
        found.append((sorted(map(str, outcome.samples)), handler.counted().achieved))
    assert found[0][0] == found[1][0] and found[0][1] == pytest.approx(found[1][1])
