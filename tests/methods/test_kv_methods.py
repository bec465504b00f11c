"""Every method of the KV cache: exact with nothing dropped, blind to the future, the same for every batch, counted."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sparsebench.catalogue import build
from sparsebench.errors import UserError
from sparsebench.methods.base import Surroundings
from sparsebench.methods.kv_cache import apply, check
from sparsebench.models.base import LoadedModel
from sparsebench.tasks.scoring import score_tokens

CATALOGUE = build()
METHODS = sorted(name for name, one in CATALOGUE.found["method"].items() if one.target == "kv_cache")
SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 96, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": None,
}  # fmt: skip
IDS = torch.randint(2, 64, (4, 48), generator=torch.Generator().manual_seed(1))
PADS = torch.tensor([0, 3, 7, 12])
SMALL = {
    "alisa": {"kv_bits": 16},
    "tokenselect": {"chunk_size": 4},
    "mustafar": {"residual_length": 4},
    "quest": {"page_size": 4, "dense_layers": 0, "min_pages": 1},
    "specontext": {"distill_steps": 2, "n_sink": 2},
}
VARIANTS = [
    *((name, {}) for name in METHODS),
    ("streaming_llm", {"positions": "text"}),
    ("streaming_llm", {"decode": False, "room": 1}),
    ("h2o", {"variant": "masked"}),
    ("h2o", {"variant": "global_lmeval"}),
    ("h2o", {"variant": "observed"}),
    ("tova", {"variant": "prefill"}),
    ("snapkv", {"pooling": "max", "local_window": 4, "prefix_tokens": 2}),
    ("snapkv", {"group_reduce": "per_query_head", "window_size": 4}),
    ("expected_attention", {"head_allocation": "ada", "epsilon": 0.01}),
    ("random_kv", {"n_sink": 2, "recent": 3}),
    ("ems", {"tau": "mean", "decode_buffer": 3, "global_norm": "none", "combine": "max"}),
    ("kvmerger", {"linkage": "pivot", "max_set_size": 3, "merge_interval": 6}),
    ("kvmerger", {"eps_mode": "calibrated"}),
    ("alisa", {"history_steps": 5, "local_fraction": 0.2}),
    ("specontext", {"source": "layer0", "head_level": False, "group_reduce": "mean"}),
    ("specontext", {"source": "attn_kd"}),
    ("tokenselect", {"reposition": False, "pool_kernel": 3, "vote": "hard", "gqa_map": "modulo"}),
    ("tokenselect", {"selection_cache": True, "similarity_threshold": 0.5, "vote": "sum_logits"}),
    ("quest", {"share_pages": "group"}),
    ("quest", {"reference": True}),
    ("mustafar", {"exact_count": True, "criterion_k": "output_aware", "direction_v": "channel", "group_size": 8}),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval()


@pytest.fixture(params=VARIANTS, ids=lambda one: "-".join([one[0], *map(str, one[1].values())]))
def variant(request):
    return request.param


@pytest.fixture
def attach(model):
    """The attachment of a method with these options."""

    def make(name, **options):
        how = CATALOGUE.load("method", name)(**{**SMALL.get(name, {}), **options})
        loaded = LoadedModel(model, None, "toy", 96)
        check([(name, how)], model)
        return apply([(name, how)], Surroundings(loaded, lambda: IDS, seed=0)).attachments[0]

    return make


def close(found, expected, atol=2e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


def padded():
    """Rows of different lengths, padded on the left."""
    mask = (torch.arange(48) >= PADS[:, None]).long()
    return IDS * mask, mask


def places(mask):
    """Rotary positions as generate() gives them: what depends on them (page vectors) is then the same for every row."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def through_cache(model, ids, mask=None, prefill=36, step=3):
    """Logits of the tokens behind the prefill, some at a time."""
    cache, found = None, []
    end = ids.shape[1]
    for start, stop in [(0, prefill), *((t, min(t + step, end)) for t in range(prefill, end, step))]:
        told = {} if mask is None else {"attention_mask": mask[:, :stop], "position_ids": places(mask)[:, start:stop]}
        output = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, **told)
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found[1:], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 4])
def test_nothing_dropped_is_the_dense_model(model, attach, variant, rows):
    name, options = variant
    acting = attach(name, sparsity=0.0, **options)
    ids, mask = (part[-rows:] for part in padded())
    expected = [through_cache(model, ids, mask, step=step) for step in (1, 12)]
    written = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    with acting.attached():
        found = [through_cache(model, ids, mask, step=step) for step in (1, 12)]
        again = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    assert torch.equal(again, written)
    counted = acting.counted()
    assert counted.acted and counted.achieved == 0


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 5])
def test_no_token_sees_those_after_it(model, attach, variant, step):
    name, options = variant
    if options.get("variant") == "global_lmeval":
        pytest.skip("looks ahead within a forward, as its paper's evaluation does")
    if name == "tokenselect":  # a chunk's tokens choose together
        options = {**options, "chunk_size": 1}
    acting = attach(name, sparsity=0.5, **options)
    other = IDS.clone()
    other[:, 42:] = (other[:, 42:] + 7) % 62 + 2
    with acting.attached():
        first, second = (through_cache(model, ids, step=step) for ids in (IDS, other))
    assert torch.isfinite(first).all()
    close(first[:, :6], second[:, :6], atol=1e-5)
    assert not torch.allclose(first[:, 6:], second[:, 6:])


@torch.no_grad()
def test_a_row_is_the_same_alone_and_in_a_padded_batch(model, attach, variant):
    name, options = variant
    acting = attach(name, sparsity=0.5, **options)
    ids, mask = padded()
    with acting.attached():
        together = through_cache(model, ids, mask)
        alone = [through_cache(model, ids[i : i + 1, pad:], prefill=36 - pad) for i, pad in enumerate(PADS.tolist())]
    for row, one in zip(together, alone, strict=True):
        close(row, one[0])


@torch.no_grad()
def test_what_was_asked_is_achieved_and_counted(model, attach, variant):
    name, options = variant
    acting = attach(name, sparsity=0.5, **options)
    before = score_tokens(LoadedModel(model, None, "toy", 96), IDS)[0]
    with acting.attached():
        for _ in range(2):
            score_tokens(LoadedModel(model, None, "toy", 96), IDS, prefill=36, step=1)
    counted = acting.counted()
    assert counted.acted
    assert counted.achieved == pytest.approx(0.5, abs=acting.tolerance)
    assert [row["layer"] for row in counted.rows] == ["kv_cache.0", "kv_cache.1"]
    saving = counted.saving
    assert saving.kv_read > 0 and saving.pairs_decode <= 1
    if name != "mustafar":  # at head size 8 its tiles take more than they save
        assert min(saving.kv_stored, saving.kv_read, saving.pairs_decode) < 1
    assert saving.index_prefill(64) >= 0 and saving.index_decode(64) >= 0
    assert torch.equal(score_tokens(LoadedModel(model, None, "toy", 96), IDS)[0], before)


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_a_cache_can_be_frozen_and_used_again(model, attach, name):
    acting = attach(name, sparsity=0.5)
    with acting.attached():
        context = model(input_ids=IDS[:2, :36], use_cache=True).past_key_values
        answers = []
        for question in (IDS[:2, 36:42], IDS[2:, 36:42], IDS[:2, 36:42]):
            cache = copy.deepcopy(context)
            answers.append(model(input_ids=question, past_key_values=cache, use_cache=True).logits)
            model(input_ids=IDS[:2, 44:45], past_key_values=cache, use_cache=True)
    assert torch.equal(answers[0], answers[2]) and not torch.equal(answers[0], answers[1])


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_it_does_not_act_where_nothing_is_decoded(model, attach, name):
    acting = attach(name, sparsity=0.5)
    with acting.attached():
        score_tokens(LoadedModel(model, None, "toy", 96), IDS)
    assert not acting.counted().acted


def test_budgets_in_entries_and_in_bytes_are_the_same(model, attach):
    per_token = 2 * 2 * 2 * 8 * 4  # layers, K and V, heads, size, bytes per value
    tokens, in_bytes = (
        attach("snapkv", **{key: value}) for key, value in (("budget", 18), ("budget_bytes", 18 * per_token))
    )
    assert in_bytes.how.budget == tokens.how.budget == 18 and tokens.asked is None
    with tokens.attached(), torch.no_grad():
        score_tokens(LoadedModel(model, None, "toy", 96), IDS, prefill=36)
    assert tokens.counted().achieved == 0.5


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("streaming_llm", {"budget": 4}, "method.streaming_llm.budget=4: keeps 4 of a prompt's 36 tokens"),
        ("snapkv", {"budget": 8, "window_size": 16}, "fewer than the 16 that are forced"),
        ("snapkv", {"window_size": 36}, "method.snapkv.window_size=36: the prompt has 36 tokens"),
        ("ada_snapkv", {"sparsity": 0.9}, "fewer than the 5 that are forced"),
        ("random_kv", {"n_sink": 30, "sparsity": 0.5}, "fewer than the 30 that are forced"),
    ],
)
def test_budgets_that_do_not_hold_what_is_forced(model, attach, name, options, words):
    acting = attach(name, **options)
    with pytest.raises(UserError, match=words), acting.attached():
        score_tokens(LoadedModel(model, None, "toy", 96), IDS, prefill=36)


@torch.no_grad()
def test_generation_past_the_context(model, attach):
    ids = torch.cat([IDS, IDS, IDS[:, :4]], dim=1)[:1]
    with pytest.raises(UserError, match="100 tokens go past the model's context of 96"), attach("snapkv").attached():
        score_tokens(LoadedModel(model, None, "toy", 96), torch.cat([ids, ids[:, :1]], dim=1), prefill=36)
    streaming = attach("streaming_llm", budget=32)  # rotates to places in the cache, so it may go on
    with streaming.attached():
        nll, _ = score_tokens(LoadedModel(model, None, "toy", 96), ids, prefill=36, step=1)
    assert torch.isfinite(nll).all()


@torch.no_grad()
def test_prompts_padded_on_the_right_are_refused(model, attach):
    mask = torch.ones(4, 48, dtype=torch.long)
    mask[1, 40:] = 0
    with pytest.raises(UserError, match="must be padded on the left"), attach("snapkv").attached():
        model(input_ids=IDS, attention_mask=mask, use_cache=True)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("snapkv", {"kernel_size": 4}, "method.snapkv.kernel_size=4: must be odd"),
        ("snapkv", {"budget_bytes": 10}, "method.snapkv.budget_bytes=10: one token takes 256 bytes"),
        ("snapkv", {"budget_bytes": 5120, "budget": 3}, "goes without method.snapkv.budget=3"),
        ("h2o", {"heavy_size": 3}, "heavy_size and recent_size go together"),
        ("h2o", {"heavy_size": 0, "recent_size": 0}, "must be at least 1"),
        ("h2o", {"heavy_size": 3, "recent_size": 2, "budget": 9}, "goes without method.h2o.budget=9"),
        ("kvmerger", {"eps_mode": "calibrated", "linkage": "pivot"}, "linkage=pivot: method.kvmerger.eps_mode=calib"),
        ("kvmerger", {"eps_mode": "calibrated", "budget": 9}, "budget=9: method.kvmerger.eps_mode=calibrated goes"),
        ("streaming_llm", {"recent": 3, "budget": 9}, "goes without method.streaming_llm.budget=9"),
    ],
)
def test_options_that_do_not_fit(attach, name, options, words):
    with pytest.raises(UserError, match=words):
        attach(name, **options)


def test_models_whose_cache_is_out_of_reach():
    how = CATALOGUE.load("method", "snapkv")()
    with pytest.raises(UserError, match="no Hugging Face decoder"):
        check([("snapkv", how)], SimpleNamespace())
