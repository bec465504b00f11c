"""Small gated-MLP models for tests of activation sparsity."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsebench.methods.activations.gating import DECODE, Acting, Gating
from sparsebench.methods.activations.sites import gated_blocks


def llama(hidden=32, intermediate=80, layers=2, heads=4, kv_heads=2, vocab=64, std=0.2, **more):
    """A random Llama in float32, ready to evaluate."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=64, rms_norm_eps=1e-6,
        initializer_range=std, pad_token_id=0, bos_token_id=0, eos_token_id=0, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def mlp_block(gate, up, down, **more):
    """(model, block) of a one-block Llama whose MLP has these weights: (intermediate, hidden) twice, the transpose."""
    intermediate, hidden = gate.shape
    model = llama(hidden, intermediate, layers=1, heads=2, kv_heads=2, **more)
    mlp = model.model.layers[0].mlp
    for linear, weight in ((mlp.gate_proj, gate), (mlp.up_proj, up), (mlp.down_proj, down)):
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return model, gated_blocks(model)[0]


@torch.no_grad()
def gated(gates, module, x, sparse, decode=False):
    """``module(x)`` with gates acting on the last ``sparse(tokens)`` positions, or on all in decoding."""
    acting = Acting(sparse, phase=DECODE if decode else 0)
    handles = [handle for gate in gates for handle in gate.install(acting)]
    try:
        return module(x)
    finally:
        for handle in handles:
            handle.remove()


def attachment(model, gates, sparse, **more):
    """The gates as an attachment of the model."""
    return Gating("toy", None, 0.03, model, gated_blocks(model), list(gates), sparse, **more)
