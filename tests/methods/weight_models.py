"""Small random models of several families, and what the tests of weight methods ask of them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights.walk import apply
from sparsebench.models.base import LoadedModel
from sparsebench.models.blocks import decoder_blocks

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE)),
    # its blocks differ in their attention mask: every second one sees a window of 8 tokens
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SHAPE, sliding_window=8, query_pre_attn_scalar=8)),
    # it flattens sequences and tokens before its MLP
    "opt": (OPTForCausalLM, OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=3, init_std=0.2,
            num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0,
            pad_token_id=1, bos_token_id=0, eos_token_id=0)),
}  # fmt: skip
WINDOWS = torch.randint(2, 64, (5, 20), generator=torch.Generator().manual_seed(11))


def prune(model, method, seed=0, windows=WINDOWS):
    return apply([("method", method)], Surroundings(LoadedModel(model, None, "toy", 64), lambda: windows, seed))


def linears(model):
    """{full name: linear layer} of the decoder blocks, in the model's order."""
    prefix, blocks = decoder_blocks(model)
    return {f"{prefix}.{n}": m for n, m in blocks.named_modules() if isinstance(m, nn.Linear)}


def masks_of(model):
    return {name: layer.weight != 0 for name, layer in linears(model).items()}


def assert_same_masks(found, expected):
    assert found.keys() == expected.keys()
    different = {name: int((found[name] != expected[name]).sum()) for name in found}
    assert not any(different.values()), different
