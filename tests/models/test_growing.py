"""A wider model that starts as the function of a narrower one."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsebench.models.growing import widen
from sparsebench.models.ladder import RUNGS


def llama(hidden: int, heads: int, intermediate: int) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=3,
            num_attention_heads=heads,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    ).eval()


def test_grown_model_has_the_logits_of_the_narrow_one_and_copies_that_part() -> None:
    narrow, wide = llama(32, 4, 48), llama(64, 8, 96)
    widen(narrow, wide)
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = narrow(input_ids=ids).logits, wide(input_ids=ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    wide(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in wide.named_parameters():
        if name.endswith("gate_proj.weight"):
            first, second = parameter.grad.chunk(2)
            assert not torch.allclose(first, second, rtol=1e-2), f"{name}: the copies would stay copies"


def test_a_grown_rung_is_twice_its_source() -> None:
    for rung in RUNGS.values():
        if rung.grown_from:
            source = RUNGS[rung.grown_from]
            twice = (2 * source.hidden, 2 * source.heads, 2 * source.intermediate, source.layers)
            assert twice == (rung.hidden, rung.heads, rung.intermediate, rung.layers)
