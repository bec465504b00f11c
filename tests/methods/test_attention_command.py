"""Sparse prefill through the command line: records, bad input, stacks over two targets."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import pytest
from transformers import MistralConfig, MistralForCausalLM

import sparsebench

TOKENIZER = Path(sparsebench.__file__).parent / "models" / "weights" / "tokenizer"
TINY = ["model=tiny_100k", "task.windows=2", "task.context=256"]


@pytest.mark.parametrize("name", ["vertical_slash", "flexprefill"])
def test_a_record_says_what_was_left_out_and_what_it_cost(command, name):
    answer = command(f"method={name}", "sparsity=0.5", *TINY)
    assert answer.code == 0, answer.err
    record = answer.records[0]
    assert record["status"] == "ok" and not record["flagged"]
    assert record["achieved"] == pytest.approx(0.5, abs=0.03) == record["sparsity_mask"]
    assert record["sparsity_reported"] < 1
    assert record["flops_prefill"] < record["flops_prefill_dense"]
    rows = answer.store.details("layers", record["run_id"], record["attempt"])
    assert [row["layer"] for row in rows] == ["attention.0", "attention.1"]


def test_it_stacks_with_a_weight_method(command):
    answer = command("method=[magnitude,local_sink]", "sparsity=0.5", *TINY)
    assert answer.code == 0, answer.err
    record = answer.records[0]
    assert record["achieved_weights"] == pytest.approx(0.5, abs=0.01)
    assert record["achieved_attention"] == pytest.approx(0.5, abs=0.03)
    assert "weights 0.5" in answer.out and "of the methods' scopes" in answer.out


def test_the_level_of_a_stack_is_that_of_its_first_method(command):
    levels = ["method.magnitude.sparsity=0.25", "method.local_sink.sparsity=0.75"]
    (record,) = command("method=[local_sink,magnitude]", *levels, *TINY).records
    assert record["sparsity"] == 0.75 and record["achieved"] == record["achieved_attention"]
    (_, record) = command("method=[magnitude,local_sink]", *levels, *TINY).records
    assert record["sparsity"] == 0.25 and record["achieved"] == record["achieved_weights"]


@pytest.mark.parametrize("names", ["dense,vertical_slash", "vertical_slash,dense", "dense,magnitude"])
def test_the_reference_stands_alone(command, names):
    """Its level of 0 would be told as the stack's."""
    answer = command(f"method=[{names}]", *TINY)
    assert answer.code == 2 and "dense is the model as it is" in answer.err and answer.records == []


def test_two_prefill_methods_are_refused(command):
    answer = command("method=[vertical_slash,block_sparse]", *TINY)
    assert answer.code == 2 and "attention (prefill)" in answer.err


@pytest.mark.parametrize(
    "words, said",
    [
        ("method=vertical_slash method.vertical_slash.vertical_size=2 method.vertical_slash.slash_size=64", "forced"),
        ("method=block_sparse method.block_sparse.top_chunks=2", "top_chunks=2"),
        ("method=flexprefill method.flexprefill.gamma=1.5", "gamma=1.5"),
        ("method=anchor_attention method.anchor_attention.theta=-1", "theta=-1"),
        ("method=pbs_attn method.pbs_attn.threshold=0", "threshold=0"),
        ("method=pbs_attn method.pbs_attn.block_size=16 method.pbs_attn.segment_size=40", "segment_size=40"),
        ("method=minference method.minference.fitted_from=nothing", "fitted_from=nothing"),
        ("method=seer_attention method.seer_attention.gate_type=Kavg", "gate_type=Kavg"),
        ("method=local_sink method.local_sink.n_last=4", "n_last=4: has no effect here"),
        ("method=flexprefill method.flexprefill.tile_size=8", "goes with method.flexprefill.variant=simplified"),
        (
            "method=flexprefill method.flexprefill.variant=simplified method.flexprefill.tau=0",
            "tau=0.0: has no effect here: goes with method.flexprefill.variant=original",
        ),
        ("method=vertical_slash method.vertical_slash.approximation_size=2048", "context has only 1024 tokens"),
        ("method=minference method.minference.starting_layer=200", "below the 2 layers"),
        ("method=minference method.minference.ratio=1e30", "<= 1048576"),
        *(
            (f"method={name} method.{name}.{size}", said)
            for name, size, said in (
                ("vertical_slash", "forced_verticals=3000", "only 255 tokens; must be <= 240"),
                ("vertical_slash", "forced_verticals=241", "only 255 tokens; must be <= 240"),
                ("vertical_slash", "forced_slashes=3000", "must be <= 244"),
                ("vertical_slash", "tile_size=128", "tile_size=128: leaves nothing out"),
                ("block_sparse", "chunk_size=85", "only 255 tokens; must be <= 84"),
                ("flexprefill", "block_size=300", "must be <= 127"),
                ("flexprefill", "min_budget=3000", "min_budget=3000: leaves nothing out"),
                ("seer_attention", "block_size=300", "must be <= 254"),
                ("local_sink", "n_init=255", "must be <= 253"),
                ("pbs_attn", "block_size=128", "block_size=128: leaves nothing out, as the prompt has only 255"),
                ("pbs_attn", "segment_size=256", "segment_size=256: leaves nothing out"),
                ("anchor_attention", "block_size=86", "must be <= 85"),
                ("anchor_attention", "step=11", "must be <= 10"),
            )
        ),
    ],
)
def test_bad_input_starts_nothing(command, words, said):
    answer = command(*words.split(), *TINY)
    assert answer.code == 2 and said in answer.err and answer.err.count("\n") == 1, answer.err
    assert answer.records == []


@pytest.mark.parametrize(
    "words",
    [
        "vertical_slash method.vertical_slash.forced_verticals=240",  # what the refusal of more names
        "vertical_slash method.vertical_slash.vertical_size=150 method.vertical_slash.slash_size=8 "
        "method.vertical_slash.forced_verticals=150",
        "pbs_attn method.pbs_attn.block_size=110 method.pbs_attn.segment_size=110",
    ],
)
def test_sizes_that_may_leave_something_out_are_not_refused(command, words):
    answer = command(*f"method={words}".split(), *TINY)
    assert answer.code != 2 and len(answer.records) == 1, answer.err  # what is left out depends on the prompt


def test_a_model_with_windows_is_refused(command, tmp_path):
    folder = copytree(TOKENIZER, tmp_path / "mistral")
    MistralForCausalLM(
        MistralConfig(
            vocab_size=1024, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, sliding_window=16, bos_token_id=0, eos_token_id=0,
        )
    ).save_pretrained(folder)  # fmt: skip
    answer = command("method=local_sink", "model=hf", f"model.path={folder}", "task.windows=2", "task.context=32")
    assert answer.code == 2 and "sliding" in answer.err and answer.records == []
