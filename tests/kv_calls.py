"""Given queries, keys and values in place of a model: one attention layer with its cache, for tests of cache
methods."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from sparsebench.methods.kv_cache.acting import ActingMethod
from sparsebench.methods.kv_cache.entries import Entries
from sparsebench.models.plug import Call, PositionCache
from sparsebench.models.plug.attach import compute

CONTEXT = 100_000


def tables(theta, size):
    """cos and sin at positions (rows, tokens), as Llama makes them."""
    config = LlamaConfig(hidden_size=size, num_attention_heads=1, head_dim=size, max_position_embeddings=CONTEXT)
    config.rope_parameters = {"rope_type": "default", "rope_theta": float(theta)}
    rotary = LlamaRotaryEmbedding(config)
    return lambda positions: rotary(torch.zeros(1), position_ids=positions)


class Layer:
    """One attention layer whose inputs are given: ``feed`` runs the methods on the next tokens."""

    def __init__(self, theta=10_000.0):
        self.cache, self.fed, self.theta = PositionCache(), 0, theta

    def call(self, query, key, value, real=None):
        """The next tokens: query (B, H, T, D), key, value (B, K, T, D), rotated; ``real``: (B, L) bool."""
        batch, _, tokens, size = query.shape
        keys, values = self.cache.update(key, value, 0)
        past, self.fed = self.fed, self.fed + tokens
        places = torch.arange(past, self.fed)
        slots = (torch.arange(self.fed) <= places[:, None]).expand(batch, 1, -1, -1)
        if real is not None:
            slots = slots & real[:, None, None] & real[:, None, past:, None]
        positions = places.expand(batch, -1)
        self.cache.remember(positions, past)
        turn = tables(self.theta, size)
        module = LlamaAttention(LlamaConfig(hidden_size=8, num_attention_heads=1), layer_idx=0)
        return Call(0, module, query, keys, values, torch.zeros(batch, tokens, 1), turn(positions), positions, slots,
                    size**-0.5, self.cache, turn)  # fmt: skip

    def feed(self, how, query, key, value, learned=None):
        """Output (B, H, T, D) under a method, which may then edit the cache."""
        model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: None))
        handler = ActingMethod("method", how, model, learned or {})
        return compute(self.call(query, key, value), [handler]).transpose(1, 2)

    @property
    def positions(self):
        """(B, K, S): what the cache holds."""
        return self.cache.layers[0].positions


def entries(query, key, value=None, theta=10_000.0, real=None, learned=None):
    """The view that a method has of one prompt."""
    return Entries(Layer(theta).call(query, key, key if value is None else value, real), learned or {})


def kept(mask):
    """(B, K, n): the kept columns of a mask (B, K, S), in order."""
    return torch.stack([torch.stack([line.nonzero()[:, 0] for line in row]) for row in mask])
