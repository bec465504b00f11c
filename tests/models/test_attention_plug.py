"""The attention plug: exact with nothing dropped, blind to the future with anything dropped, gone afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
)

from sparsebench.errors import UserError
from sparsebench.models.base import LoadedModel
from sparsebench.models.plug import Allowed, Handler, PositionCache, check_rotary, plugged, reach
from sparsebench.models.plug.cache import HOLE, PositionLayer
from sparsebench.tasks.scoring import score_tokens

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": None,
}  # fmt: skip
OPT = OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, init_std=0.3, num_attention_heads=4,
                max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0, pad_token_id=1)  # fmt: skip
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "multi_head": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "qwen3": Qwen3Config(**SHAPE),
    "opt": OPT,
    "gpt2": GPT2,
}
IDS = torch.randint(2, 64, (4, 24), generator=torch.Generator().manual_seed(1))


def make(config):
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


@pytest.fixture(scope="module")
def originals():
    return {name: make(config) for name, config in CONFIGS.items()}


@pytest.fixture(params=CONFIGS)
def model(request, originals):
    return originals[request.param]


@pytest.fixture
def llama(originals):
    return originals["llama"]


class Watch(Handler):
    """Does nothing, and keeps the calls and their work."""

    def __init__(self):
        self.calls, self.work = [], []

    def after(self, call, work):
        self.calls.append(call)
        self.work.append(work)


class Evict(Handler):
    """Keeps the positions that a function allows, after the first forward: (batch, kv_heads, columns) bool."""

    def __init__(self, keeps, phases=("prefill",)):
        self.keeps, self.phases = keeps, phases

    def after(self, call, work):
        if call.phase in self.phases:
            call.layer.keep(self.keeps(call.layer.positions, call.index))


class Mask(Handler):
    def __init__(self, mask, bias=None):
        self.mask, self.bias = mask, bias

    def allow(self, call):
        return Allowed(self.mask, self.bias)


def masked_logits(model, ids, allowed):
    """The dense model with its own attention, told by a 4D mask what each query sees."""
    seen = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    config = model.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        places = torch.arange(ids.shape[1])[None].expand(len(ids), -1)  # OPT would read them from the mask
        return model(input_ids=ids, attention_mask=seen, position_ids=places, use_cache=False).logits
    finally:
        config._attn_implementation = before


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 4])
def test_nothing_dropped_is_the_dense_model_in_every_protocol(model, rows):
    loaded = LoadedModel(model, None, "toy", 64)
    ids = IDS[:rows]
    for options in ({}, {"prefill": 10}, {"prefill": 10, "step": 1}, {"prefill": 10, "step": 3}):
        expected = score_tokens(loaded, ids, **options)
        with plugged(model, Watch()):
            found = score_tokens(loaded, ids, **options)
        close(found[0], expected[0])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(model, side):
    pads = torch.tensor([0, 3, 7, 1])
    steps = torch.arange(24)
    mask = (steps >= pads[:, None] if side == "left" else steps < 24 - pads[:, None]).long()
    kept = mask.bool()
    watch = Watch()
    expected = model(input_ids=IDS, attention_mask=mask).logits
    with plugged(model, watch):
        found = model(input_ids=IDS, attention_mask=mask).logits
    close(found[kept], expected[kept])
    lengths = 24 - pads
    assert watch.calls[0].real.equal(kept)
    assert watch.work[0].dense.tolist() == [int(n * (n + 1) // 2) for n in lengths]
    assert watch.work[0].computed.tolist() == [[int(n * (n + 1) // 2)] * 4 for n in lengths]


@torch.no_grad()
def test_generation_with_left_padding(model):
    mask = (torch.arange(24) >= torch.tensor([0, 3, 7, 1])[:, None]).long()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(IDS, attention_mask=mask, **options)
    watch = Watch()
    with plugged(model, watch):
        found = model.generate(IDS, attention_mask=mask, **options)
    assert found.equal(expected)
    assert isinstance(watch.calls[-1].cache, PositionCache)
    assert [watch.calls[0].phase, watch.calls[-1].phase] == ["prefill", "decode"]


@torch.no_grad()
def test_the_model_is_as_it_was_afterwards(llama):
    before = llama.config._attn_implementation
    expected = llama(input_ids=IDS).logits
    nothing = Mask(torch.zeros(1, 1, 24, 24, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="stop"), plugged(llama, nothing):
        llama(input_ids=IDS)
        raise RuntimeError("stop")
    assert llama.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in llama.modules())
    assert llama(input_ids=IDS).logits.equal(expected)
    assert isinstance(llama(input_ids=IDS, use_cache=True).past_key_values, DynamicCache)


@torch.no_grad()
def test_a_mask_is_exact_attention_over_what_it_allows(llama):
    allowed = torch.rand(24, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    allowed |= torch.eye(24, dtype=torch.bool)
    causal = torch.ones(24, 24).tril().bool()
    watch = Watch()
    with plugged(llama, Mask(allowed[None, None])), plugged(llama, watch):
        found = llama(input_ids=IDS).logits
    close(found, masked_logits(llama, IDS, (allowed & causal)[None, None].expand(4, 1, -1, -1)))
    assert watch.work[0].computed[0, 0] == 24 * 25 // 2, "a handler's work is what it leaves itself"


@torch.no_grad()
def test_masks_of_several_handlers_meet_and_a_bias_weighs(llama):
    first, second = torch.rand(2, 1, 4, 24, 24, generator=torch.Generator().manual_seed(0)) < 0.7
    both = first & second
    with plugged(llama, Mask(both)):
        expected = llama(input_ids=IDS).logits
    with plugged(llama, Mask(first)), plugged(llama, Mask(second)):
        close(llama(input_ids=IDS).logits, expected)
    dense = llama(input_ids=IDS).logits
    everything = torch.ones(1, 1, 1, 24, dtype=torch.bool)
    with plugged(llama, Mask(everything, torch.full((1, 1, 24, 24), 3.0))):
        close(llama(input_ids=IDS).logits, dense)  # the same for all: nothing
    diagonal = torch.eye(24, dtype=torch.bool)[None, None]
    with plugged(llama, Mask(both | diagonal)):
        expected = llama(input_ids=IDS).logits
    with plugged(llama, Mask(everything, torch.where(both | diagonal, 0.0, -1e9))):
        close(llama(input_ids=IDS).logits, expected)


@torch.no_grad()
def test_a_query_without_a_key_gives_zeros_not_nan(llama):
    with plugged(llama, Mask(torch.zeros(1, 1, 24, 24, dtype=torch.bool))):
        assert llama(input_ids=IDS).logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 5, 12])
def test_follow_ups_after_eviction_see_what_is_kept_and_never_the_future(model, step):
    kept = torch.tensor([0, 1, 5, 8, 11])
    evict = Evict(lambda positions, layer: torch.isin(positions, kept))
    allowed = torch.ones(24, 24).tril().bool()
    allowed[12:, :12] = torch.isin(torch.arange(12), kept)
    expected = masked_logits(model, IDS, allowed[None, None].expand(4, 1, -1, -1))
    with plugged(model, evict):
        output = model(input_ids=IDS[:, :12], use_cache=True)
        cache, found = output.past_key_values, [output.logits]
        for start in range(12, 24, step):
            output = model(input_ids=IDS[:, start : start + step], past_key_values=cache, use_cache=True)
            found.append(output.logits)
    close(torch.cat(found, dim=1), expected)
    assert cache.get_seq_length() == 24 and cache.layers[0].keys.shape[2] == 5 + 12


@torch.no_grad()
def test_a_mask_of_physical_places_would_see_the_future(llama):
    """What the positions are for: another last token changes no earlier logit, though half of the cache is gone."""
    other = IDS.clone()
    other[:, -1] = (other[:, -1] + 1) % 64
    logits = []
    for ids in (IDS, other):
        with plugged(llama, Evict(lambda positions, layer: positions % 2 == 0)):
            cache = llama(input_ids=ids[:, :16], use_cache=True).past_key_values
            logits.append(llama(input_ids=ids[:, 16:], past_key_values=cache).logits)
    assert logits[0][:, :-1].equal(logits[1][:, :-1])
    assert not logits[0][:, -1].equal(logits[1][:, -1])


@torch.no_grad()
def test_ragged_heads_each_see_their_own_entries(llama):
    def keeps(positions, layer):
        share = torch.stack([positions[:, 0] < 3, (positions[:, 1] > 6) | (positions[:, 1] == 0)], dim=1)
        share[0] |= positions[0] == 5
        return share

    watch = Watch()
    with plugged(llama, Evict(keeps)), plugged(llama, watch):
        cache = llama(input_ids=IDS[:, :12], use_cache=True).past_key_values
        assert cache.layers[0].lengths.tolist() == [[4, 7], [3, 6], [3, 6], [3, 6]]
        found = llama(input_ids=IDS[:, 12:], past_key_values=cache).logits
    call = watch.calls[2]
    assert call.key_positions[1, 0].tolist() == [0, 1, 2, *[HOLE] * 4, *range(12, 24)]
    allowed = torch.ones(24, 24).tril().bool().expand(4, 4, 24, 24).clone()
    old = keeps(torch.arange(12).expand(4, 2, 12), 0).repeat_interleave(2, dim=1)
    allowed[:, :, 12:, :12] = old[:, :, None]
    close(found, masked_logits(llama, IDS, allowed)[:, 12:])


@torch.no_grad()
def test_eviction_with_left_padding_and_continued_positions(llama):
    pads = torch.tensor([0, 3, 7, 1])
    mask = (torch.arange(24) >= pads[:, None]).long()
    places = (torch.arange(24) - pads[:, None]).clamp(min=0)
    watch = Watch()
    with plugged(llama, Evict(lambda positions, layer: positions >= 6)), plugged(llama, watch):
        cache = llama(
            input_ids=IDS[:, :12], attention_mask=mask[:, :12], position_ids=places[:, :12], use_cache=True
        ).past_key_values
        found = llama(
            input_ids=IDS[:, 12:], attention_mask=mask, position_ids=places[:, 12:], past_key_values=cache
        ).logits
    call = watch.calls[-1]
    assert call.key_positions[0, 0].tolist() == list(range(6, 24))
    assert call.key_position_ids[2, 1].tolist() == [0, *range(17)]
    for row, pad in enumerate(pads.tolist()):
        length = 24 - pad
        allowed = torch.ones(length, length).tril().bool()
        allowed[12 - pad :, : max(0, 6 - pad)] = False
        alone = masked_logits(llama, IDS[row : row + 1, pad:], allowed[None, None])
        close(found[row], alone[0, 12 - pad :])


@torch.no_grad()
def test_the_cache_can_be_cropped_reordered_and_repeated(llama):
    with plugged(llama, Evict(lambda positions, layer: positions % 3 == 0)):
        cache = llama(input_ids=IDS[:, :12], use_cache=True).past_key_values
        spare = copy.deepcopy(cache)
        expected = llama(input_ids=IDS[:, 14:18], past_key_values=copy.deepcopy(cache)).logits
        llama(input_ids=IDS[:, 12:14], past_key_values=cache)
        cache.crop(-2)
        assert cache.get_seq_length() == 12 and cache.layers[0].positions.equal(spare.layers[0].positions)
        close(llama(input_ids=IDS[:, 14:18], past_key_values=cache).logits, expected)
        order = torch.tensor([2, 0, 1, 3])
        spare.reorder_cache(order)
        close(llama(input_ids=IDS[order, 14:18], past_key_values=copy.deepcopy(spare)).logits, expected[order])
        spare.batch_select_indices(torch.tensor([1]))
        spare.batch_repeat_interleave(2)
        close(llama(input_ids=IDS[[0, 0], 14:18], past_key_values=spare).logits, expected[[0, 0]])
        spare.reset()
        assert spare.get_seq_length() == 0
        close(llama(input_ids=IDS[:2, :12], past_key_values=spare).logits, llama(input_ids=IDS[:2, :12]).logits)


def test_state_follows_its_entries():
    layer = PositionLayer()
    layer.update(torch.arange(12.0).view(1, 2, 6, 1), torch.zeros(1, 2, 6, 1))
    layer.state["score"] = torch.arange(12.0).view(1, 2, 6)
    layer.keep(layer.state["score"] % 4 == 1)
    assert layer.positions.tolist() == [[[1, 5], [3, HOLE]]]
    assert layer.state["score"][0, 0].tolist() == [1, 5] and layer.keys[0, 1, 0] == 9
    layer.update(torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1))
    assert layer.positions[..., -1].tolist() == [[6, 6]] and layer.state["score"][..., -1].tolist() == [[0, 0]]
    layer.replace(torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1), torch.full((1, 2, 1), 4))
    assert layer.seen == 7 and layer.lengths.tolist() == [[1, 1]] and layer.state == {}


@torch.no_grad()
def test_weights_are_those_of_the_attention_that_was_computed(llama):
    class Weights(Watch):
        wants_weights = True

    watch = Weights()
    with plugged(llama, watch):
        found = llama(input_ids=IDS).logits
    close(found, llama(input_ids=IDS).logits)
    weights = watch.calls[0].weights
    assert weights.shape == (4, 4, 24, 24)
    close(weights.sum(-1), torch.ones(4, 4, 24))
    assert weights.triu(1).abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_queries_and_keys_before_the_rotary_embedding(originals, name):
    model, watch = originals[name], Watch()
    with plugged(model, watch):
        model(input_ids=IDS)
    for call in watch.calls:
        query, key = call.unrotated()
        attention = call.module
        expected = attention.q_proj(call.hidden).view(4, 24, -1, 8)
        wanted = attention.k_proj(call.hidden).view(4, 24, -1, 8)
        if name == "qwen3":
            expected, wanted = attention.q_norm(expected), attention.k_norm(wanted)
        if name == "opt":
            expected = expected * attention.scaling
        close(query, expected.transpose(1, 2))
        close(key, wanted.transpose(1, 2))
        if name != "opt":
            cos, sin = call.rotate_at(torch.arange(24)[None])
            close(cos, call.rotary[0])
            close(sin, call.rotary[1])


@torch.no_grad()
def test_many_queries_run_in_pieces(llama, monkeypatch):
    from sparsebench.models.plug import attach

    allowed = torch.rand(1, 4, 24, 24, generator=torch.Generator().manual_seed(0)) < 0.6
    with plugged(llama, Mask(allowed)):
        expected = llama(input_ids=IDS).logits
    monkeypatch.setattr(attach, "_PAIRS_AT_ONCE", 4 * 4 * 24 * 5)
    watch = Watch()
    with plugged(llama, Mask(allowed)), plugged(llama, watch):
        close(llama(input_ids=IDS).logits, expected)
    assert watch.work[0].computed[0].tolist() == [300] * 4


def test_models_out_of_reach_are_refused():
    window = make(Gemma2Config(**SHAPE, sliding_window=8, query_pre_attn_scalar=8))
    with pytest.raises(UserError, match="sliding_attention"):
        reach(window)
    with pytest.raises(UserError, match="sliding_window"):
        reach(make(MistralConfig(**SHAPE, sliding_window=8)))
    own = make(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(UserError, match="0 of its 2 attention layers"):
        reach(own)
    full = make(MistralConfig(**SHAPE, sliding_window=None))
    assert len(reach(full)) == 2


def test_another_cache_is_refused(llama):
    cache = llama(input_ids=IDS[:, :4], use_cache=True).past_key_values
    with plugged(llama, Watch()), pytest.raises(UserError, match="DynamicCache"):
        llama(input_ids=IDS[:, 4:], past_key_values=cache)


def test_a_rotary_embedding_of_neighbours_is_refused():
    module = torch.nn.MultiheadAttention(8, 2)  # its file has no rotate_half at all
    with pytest.raises(UserError, match="MultiheadAttention"):
        check_rotary(module)
