"""At which lengths costs are counted: what the model was really given, in every kind of task."""

from __future__ import annotations

import pytest
import torch
from commands import Command
from transformers import LlamaConfig, LlamaForCausalLM

from sparsebench.columns import lengths
from sparsebench.costs.lengths import Lengths
from sparsebench.models import caching
from sparsebench.tasks.base import Outcome


@pytest.fixture(scope="module")
def model():
    shape = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(shape).eval()


def test_prompts_and_what_is_decoded_behind_them(model):
    ids, given = torch.ones(2, 10, dtype=torch.long), Lengths()
    with torch.no_grad(), given.watched(model):
        _, cache = caching.read(model, ids)
        assert (given.prompt, given.decode) == (10, None)
        caching.read(model, ids[:, :3], cache)  # behind 10, 11 and 12 tokens
        model(ids[:1, :4])  # by place
    model(ids)
    assert given.prompts == 3 and given.prompt == 8
    assert given.decoded == 6 and given.decode == 11


def test_padding_is_no_token(model):
    given = Lengths()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad(), given.watched(model):
        _, cache = caching.read(model, torch.ones(2, 6, dtype=torch.long), attention_mask=mask)
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        caching.read(model, torch.ones(2, 1, dtype=torch.long), cache, attention_mask=longer)
    assert (given.prompt, given.decode) == (5, 5)


def test_generation_is_one_prompt_and_single_tokens(model):
    given = Lengths()
    with given.watched(model):
        model.generate(torch.ones(1, 7, dtype=torch.long), max_new_tokens=4, do_sample=False)
    assert given.prompts == 1 and given.prompt == 7
    assert given.decoded == 3 and given.decode == 8


def test_a_text_that_has_ended_is_not_decoded(model):
    given = Lengths(fillers=frozenset({0}))
    with torch.no_grad(), given.watched(model):
        _, cache = caching.read(model, torch.ones(2, 6, dtype=torch.long))
        caching.read(model, torch.tensor([[1], [0]]), cache)  # the second row has ended
        caching.read(model, torch.tensor([[1], [0]]), cache)
    assert (given.decoded, given.decode) == (2, 6.5)


def test_lengths_do_not_depend_on_the_batch(command: Command):
    words = ["method=dense", "model=tiny_reasoner", "task=reasoning", "task.samples=6"]
    one, all_ = (command(*words, f"batch_size={rows}", "force=true").records[-1] for rows in (1, 16))
    assert one["cost_length_decode"] == all_["cost_length_decode"] and one["flops_decode"] == all_["flops_decode"]


def test_a_window_counts_whole_though_its_last_token_is_only_predicted():
    said = Outcome({}, notes={"context": 256})
    assert lengths(said, Lengths(prompts=2, read=510)) == {"cost_length": 256, "cost_length_decode": 256}
    assert lengths(said, Lengths(prompts=2, read=80, decoded=4, before=600)) == {
        "cost_length": 40,
        "cost_length_decode": 150,
    }
    assert lengths(said, Lengths()) == {"cost_length": 256, "cost_length_decode": 256}, (
        "a task that never calls the model"
    )
    assert lengths(Outcome({}), Lengths()) == {}


ONE = ["method=local_sink", "method.local_sink.n_local=32", "model=tiny_100k"]


@pytest.mark.parametrize(
    "words, prompt, decode",
    [
        ("task.context=256 task.windows=2", 256, 256),
        ("task.context=256 task.windows=2 task.protocol=continuation task.prefill=40", 40, 147),
        ("task=lm_eval task.tasks=tinyworld_copy task.tinyworld_length=128 task.tinyworld_samples=3", None, None),
        ("task=generation task.tasks=copy task.length=96 task.samples=2 task.items=2", None, None),
    ],
)
def test_sparsity_and_costs_are_of_the_same_prompts(command: Command, words, prompt, decode):
    answer = command(*ONE, *words.split())
    assert answer.code == 0, answer.err
    record = answer.records[0]
    length = record["cost_length"]
    if prompt is not None:
        assert (length, record["cost_length_decode"]) == (prompt, decode)
    assert 40 <= length <= 256 and length != 512 and record["cost_length_decode"] >= length
    # tiny_100k: 2 layers of 4 heads of 12
    attention = 2 * 4 * 12 * 4 * (length + 1) / 2
    left = 1 - (record["flops_prefill_dense"] - record["flops_prefill"]) / attention
    assert left == pytest.approx(1 - record["achieved"], abs=1e-9)
    if prompt == 40:  # 34 rows see all, 6 rows 34 keys: sinks 1, window 33
        assert record["achieved"] == pytest.approx(1 - (34 * 35 / 2 + 6 * 34) / (40 * 41 / 2))
    assert f"prefill of {length} tokens" in answer.out


def test_a_record_says_when_no_length_is_known(command: Command, toys):
    """A task that never runs the model: bytes are counted, what depends on a length is not, nor is it timed."""
    words = ["--config-dir", str(toys), "method=magnitude", "model=tiny_100k", "task=constant", "kernel=auto"]
    answer = command(*words)
    assert answer.code == 0, answer.err
    record = answer.records[0]
    assert record["bytes_weights"] < record["bytes_weights_dense"]
    assert not record.keys() & {"cost_length", "flops_prefill", "flops_decode", "bytes_decode", "ms_prefill"}
    assert record["latency"] == "simulated" and record["warnings"].count("tells no length of prompts") == 2
    assert "bytes " in answer.out and "FLOPs" not in answer.out


@pytest.mark.parametrize("words", ["method=snapkv sparsity=0.8 task.protocol=continuation", "method=dense"])
def test_timing_leaves_room_for_the_decoded_token(command: Command, words):
    """A prompt as long as the model's context leaves none: what was evaluated is not lost."""
    answer = command(
        *words.split(), *"model=tiny_100k task=sf_niah task.length=1024 task.samples=1".split(), "kernel=auto"
    )
    assert answer.code == 0, answer.err
    record = answer.records[0]
    assert record["status"] == "ok" and record["ms_prefill"] > 0 and record["ms_decode"] > 0
    assert record["cost_length"] in range(900, 1025)


def test_what_cannot_be_timed_stays_evaluated(command: Command, monkeypatch):
    from sparsebench import latency
    from sparsebench.errors import UserError

    def refuses(*given):
        raise UserError("1025 tokens go past the model's context of 1024")

    monkeypatch.setattr(latency, "columns", refuses)
    answer = command("method=local_sink", "sparsity=0.9", "method.local_sink.n_init=60", "model=tiny_100k",
                     "task.windows=1", "task.context=128", "kernel=auto")  # fmt: skip
    assert answer.code == 0, answer.err
    record = answer.records[0]
    assert record["status"] == "ok" and record["perplexity"] > 1 and record["latency"] == "simulated"
    assert "not timed: 1025 tokens" in record["warnings"] and "asked sparsity 0.9" in record["warnings"]
