"""Greedy decoding: what transformers' own generation gives, with left padding, after a cache, up to a stop text."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import sparsebench
from sparsebench.models.base import LoadedModel
from sparsebench.models.plug import Handler, plugged
from sparsebench.tasks.decoding import Stream, end_tokens, greedy

LADDER = Path(sparsebench.__file__).parent / "models" / "weights" / "tokenizer"


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, eos_token_id=[3, 0], bos_token_id=0,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(LADDER)
    return LoadedModel(LlamaForCausalLM(config).eval(), tokenizer, "tiny", 256)


def prompts(*lengths: int) -> list[list[int]]:
    torch.manual_seed(1)
    return [torch.randint(4, 1000, (length,)).tolist() for length in lengths]


def test_it_is_transformers_greedy_generation(llama: LoadedModel) -> None:
    for prompt in prompts(7, 12):
        ids = torch.tensor([prompt])
        whole = llama.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        new = [token for token in whole[0, len(prompt) :].tolist() if token not in end_tokens(llama)]
        assert greedy(llama, [prompt], 12) == [new]


@pytest.mark.parametrize("attached", [False, True])
def test_padded_rows_are_as_alone(llama: LoadedModel, attached: bool) -> None:
    batch = prompts(4, 9, 17)
    alone = [greedy(llama, [prompt], 8)[0] for prompt in batch]
    if attached:
        with plugged(llama.model, Handler()):
            assert greedy(llama, batch, 8) == alone
    else:
        assert greedy(llama, batch, 8) == alone


def test_it_goes_on_and_a_copy_leaves_no_trace(llama: LoadedModel) -> None:
    (prompt,) = prompts(20)
    stream = Stream(llama).feed([prompt[:15]])
    assert stream.copy().feed([prompt[15:]]).write(6) == greedy(llama, [prompt], 6)
    assert stream.copy().write(6) == greedy(llama, [prompt[:15]], 6)
    assert stream.feed([prompt[15:]]).write(6) == greedy(llama, [prompt], 6)
    assert stream.real is not None and stream.real.shape == (1, 25)  # the last new token is not fed
    with pytest.raises(ValueError, match="one length"):
        Stream(llama).feed(prompts(3, 3)).feed(prompts(2, 3))
    with pytest.raises(ValueError, match="nothing"):
        Stream(llama).write(1)


def test_it_ends_with_the_stop_text_or_the_end_token(llama: LoadedModel) -> None:
    (prompt,) = prompts(10)
    found = greedy(llama, [prompt], 10)[0]
    stop = llama.tokenizer.decode(found[3:5])
    assert greedy(llama, [prompt, *prompts(10)], 10, [stop])[0] == found[:5]
    llama.model.generation_config.eos_token_id = [found[6], 0]
    try:
        assert greedy(llama, [prompt], 10)[0] == found[:6]
    finally:
        llama.model.generation_config.eos_token_id = [3, 0]


def test_not_numbers_are_an_error(llama: LoadedModel) -> None:
    broken = deepcopy(llama)
    with torch.no_grad():
        broken.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not numbers"):
        greedy(broken, prompts(4), 2)
