"""Vectors before the rotary embedding, on models that turn them in other ways or only in some layers."""

from __future__ import annotations

import pytest
import torch
from prefill_models import attachment
from transformers import CodeGenConfig, GPT2Config, GPTJConfig, SmolLM3Config
from transformers.models.auto import AutoModelForCausalLM

from sparsebench.errors import UserError
from sparsebench.methods.attention import base
from sparsebench.methods.attention.gates import gate_logits
from sparsebench.methods.attention.seer_attention import SeerAttention
from sparsebench.methods.kv_cache import acting
from sparsebench.methods.kv_cache.expected_attention import ExpectedAttention
from sparsebench.methods.kv_cache.streaming_llm import StreamingLlm
from sparsebench.models.plug import Handler, plugged

OLD = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 0,
       "eos_token_id": 0}  # fmt: skip
IDS = torch.randint(2, 64, (2, 64), generator=torch.Generator().manual_seed(5))


def build(config):
    torch.manual_seed(2)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def smol():
    """Every second layer has no rotary embedding."""
    return build(
        SmolLM3Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, no_rope_layer_interval=2,
            pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


@pytest.mark.parametrize("config", [GPTJConfig(**OLD, rotary_dim=4), CodeGenConfig(**OLD, n_ctx=256, rotary_dim=4)])
def test_neighbours_that_are_turned_are_refused(config):
    """Their configs name no base, which must not pass for a model without rotary embeddings."""
    with pytest.raises(UserError, match=r"rotary embedding of .* is not of a kind that can be undone"):
        base.check([("seer_attention", SeerAttention())], build(config))


def test_models_without_rotary_embeddings_are_taken_as_they_are():
    model = build(GPT2Config(**OLD))
    method = SeerAttention(steps=1, batch=1, block_size=8)
    base.check([("seer_attention", method)], model)
    assert float(attachment(method, model).tensors["rope_base"]) == 0


class Layers(Handler):
    """Keeps what a gate is given in each layer, and what the projections gave."""

    def __init__(self):
        self.found = []

    def allow(self, call):
        heads = base.heads_of(call, 0, 0, call.tokens, {})
        query, key = heads.before_rotary()
        module = call.module
        plain = [p(call.hidden[0]).unflatten(-1, (-1, module.head_dim)).transpose(0, 1)
                 for p in (module.q_proj, module.k_proj)]  # fmt: skip
        self.found.append((heads, query, key, *plain))


def test_layers_without_rotary_embedding_are_not_turned_back(smol):
    layers = Layers()
    with torch.no_grad(), plugged(smol, layers):
        smol(input_ids=IDS, use_cache=False)
    assert [heads.rotates for heads, *_ in layers.found] == [True, False, True, False]
    method = SeerAttention(steps=1, batch=1, block_size=8)
    tensors = attachment(method, smol).tensors
    for heads, query, key, plain_query, plain_key in layers.found:
        torch.testing.assert_close(query, plain_query, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(key, plain_key, atol=1e-5, rtol=1e-5)
        weights = {name: tensors[f"gates.{heads.layer}.{name}"] for name in "qk"
                   if f"gates.{heads.layer}.{name}" in tensors}  # fmt: skip
        still = gate_logits(plain_query, plain_key, weights, 8, method.gate_type, None)
        same = torch.allclose(method.logits(heads, tensors), still, atol=1e-4)
        assert same is not heads.rotates, "the gate turns its blocks where the layer turns its tokens"


def test_cache_methods_turn_only_what_is_turned(smol):
    with pytest.raises(UserError, match="no rotary positions in layers 1, 3"):
        acting.check([("expected_attention", ExpectedAttention())], smol)
    streaming = StreamingLlm(n_sink=1, budget=16)
    acting.check([("streaming_llm", streaming)], smol)
