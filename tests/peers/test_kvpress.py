"""Methods that kvpress has too keep the same entries of a prompt (needs the extra ``peers``).

kvpress' own hooks read an argument that newer transformers do not pass; its public ``compress`` is called instead, with
what those hooks would give it. Its random press draws other numbers, and its merging is of another kind.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sparsebench.catalogue import build
from sparsebench.methods.base import Surroundings
from sparsebench.methods.kv_cache import apply
from sparsebench.models.base import LoadedModel

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(find_spec("kvpress") is None, reason="kvpress is not installed"),
]

CATALOGUE = build()
SHAPE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024, "initializer_range": 0.3,
}  # fmt: skip
WINDOW = {"window_size": 8, "kernel_size": 5}
ALONE = {"window_size": 8, "kernel_size": 1}
PAIRS = {
    "streaming_llm": ({"decode": False, "positions": "text"}, lambda k, r: k.StreamingLLMPress(r)),
    "h2o": ({"variant": "observed"}, lambda k, r: k.ObservedAttentionPress(r)),
    "tova": ({"variant": "prefill"}, lambda k, r: k.TOVAPress(r)),
    "snapkv": (WINDOW, lambda k, r: k.SnapKVPress(r, **WINDOW)),
    # the form that is here pools votes over the window too, so that of kvpress is the same without pooling
    "ada_snapkv": (
        {**ALONE, "group_reduce": "mean", "window_reduce": "mean", "local_window": 8, "prefix_tokens": 0},
        lambda k, r: k.AdaKVPress(k.SnapKVPress(r, **ALONE), alpha_safeguard=0.2),
    ),
    "expected_attention": ({}, lambda k, r: k.ExpectedAttentionPress(r)),
    "expected_attention, no covariance": (
        {"use_covariance": False, "use_vnorm": False},
        lambda k, r: k.ExpectedAttentionPress(r, use_covariance=False, use_vnorm=False),
    ),
    "expected_attention, shared": (
        {"head_allocation": "ada", "epsilon": 0.01},
        lambda k, r: k.AdaKVPress(k.ExpectedAttentionPress(r, epsilon=0.01), alpha_safeguard=0.2),
    ),
}  # fmt: skip


def model(how):
    torch.manual_seed(5)
    config = LlamaConfig(**SHAPE, attn_implementation=how)
    return AutoModelForCausalLM.from_config(config, attn_implementation=how).eval()


def theirs(press, ids, how):
    """(B, K, S) bool of each layer: what the press keeps."""
    one, found = model(how), []

    def hook(module, inputs, arguments, output):
        cache = arguments["cache" if "cache" in arguments else "past_key_values"]  # older model code has the latter
        layer = cache.layers[module.layer_idx]
        keys, values = layer.keys, layer.values
        kept = press.compress(module, arguments["hidden_states"], keys, values, output[1], arguments)[0]
        mask = (kept[:, :, :, None] == keys[:, :, None]).all(dim=-1).any(dim=2)  # rotated keys are all different
        marked = getattr(module, "masked_key_indices", None)
        if marked is not None:  # budgets shared among heads: entries are marked, not removed
            mask[marked] = False
        found.append(mask)

    press.post_init_from_model(one)
    for block in one.model.layers:
        block.self_attn.rotary_emb = one.model.rotary_emb
        block.self_attn.register_forward_hook(hook, with_kwargs=True)
    one(input_ids=ids, use_cache=True)
    return found


def ours(name, options, ratio, ids):
    """(B, K, S) bool of each layer: what the method keeps."""
    one = model("sdpa")
    how = CATALOGUE.load("method", name)(sparsity=ratio, **options)
    acting = apply([(name, how)], Surroundings(LoadedModel(one, None, "toy", 1024), lambda: ids, seed=0)).attachments[0]
    with acting.attached():
        layers = one(input_ids=ids, use_cache=True).past_key_values.layers
    columns = torch.arange(ids.shape[1])
    return [(layer.positions[..., None] == columns).any(dim=2) for layer in layers]


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_same_entries_are_kept(pair, ratio):
    import kvpress

    name = pair.split(",")[0]
    options, press = PAIRS[pair]
    # shared budgets are given one prompt at a time: kvpress numbers the heads of all rows together
    rows = 1 if pair.endswith("shared") or name == "ada_snapkv" else 2
    ids = torch.randint(2, 64, (rows, 101), generator=torch.Generator().manual_seed(1))
    how = "eager" if name == "h2o" else "sdpa"
    expected = theirs(press(kvpress, ratio), ids, how)
    found = ours(name, options, ratio, ids)
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        assert one.sum() == int(101 * (1 - ratio)) * 2 * rows
        assert torch.equal(one, other)
