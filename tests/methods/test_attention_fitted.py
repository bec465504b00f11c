"""Methods that learn once: what their files hold is checked, and what they learned decides what choosing costs."""

from __future__ import annotations

import pytest
import torch
from prefill_models import IDS, attachment, learned, make_llama, run
from safetensors.torch import load_file, save_file

from sparsebench.errors import UserError
from sparsebench.methods.attention.base import check
from sparsebench.methods.attention.minference import MInference
from sparsebench.methods.attention.seer_attention import SeerAttention

SHORT = {"steps": 1, "batch": 1}
NAN = float("nan")


@pytest.fixture(scope="module")
def model():
    return make_llama(2)


def saved(folder, tensors, **changes):
    """A file of these tensors, some of them changed (None: taken out)."""
    found = {**tensors, **{name.replace("__", "."): one for name, one in changes.items()}}
    save_file({name: one for name, one in found.items() if one is not None}, folder / "fitted.safetensors")
    return str(folder / "fitted.safetensors")


def refusal(method, model):
    with pytest.raises(UserError) as caught:
        check([("test", method)], model)
    text = str(caught.value)
    assert "\n" not in text and f".fitted_from={method.fitted_from}: " in text
    return text


@pytest.mark.parametrize(
    "place, value, said",
    [
        ((0, 0, 0), 7, "kinds from 0 to 7; they go from 0 to 2"),
        ((1, 2, 0), -1, "kinds from -1"),
        ((0, 1, 2), -3, "a size of -3; must be >= 0"),
        ((0, 1, 1), 2**40, f"a size of {2**40}"),
    ],
)
def test_patterns_that_are_none_are_refused(model, tmp_path, place, value, said):
    tensors = learned(MInference(), model)
    patterns = tensors["patterns"].clone()
    patterns[..., 0] %= 2
    patterns[0, 0, 0] = 0
    patterns[place] = value
    assert said in refusal(MInference(fitted_from=saved(tmp_path, tensors, patterns=patterns)), model)


def test_patterns_must_be_whole_numbers(model, tmp_path):
    tensors = learned(MInference(), model)
    for patterns, said in (
        (tensors["patterns"] * NAN, "patterns is not finite"),
        (tensors["patterns"].double(), "whole"),
    ):
        assert said in refusal(MInference(fitted_from=saved(tmp_path, tensors, patterns=patterns)), model)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("block_size", torch.tensor(0), "block_size is 0"),
        ("block_size", torch.tensor(-8), "block_size is -8"),
        ("block_size", torch.tensor(300), "<= 256"),
        ("block_size", torch.tensor(8.5), "block_size is 8.5"),
        ("rope_base", torch.tensor(500.0), "rope_base is 500; the model's is 10000"),
        ("gates.1.k", None, "gates.1.k is not there"),
        ("gates.1.k", torch.full((4, 24, 8), NAN), "gates.1.k is not finite"),
        ("gates.0.k", torch.ones(4, 24, 8, dtype=torch.int64), "gates.0.k is torch.int64"),
        ("gate_type", torch.tensor([*b"Qavg_Kmaxavgmin\n"], dtype=torch.uint8), r"gate_type='Qavg_Kmaxavgmin\n'"),
        ("gate_type", torch.tensor([1.5]), "gate_type="),
    ],
)
def test_gates_that_cannot_be_used_are_refused(model, tmp_path, name, value, said):
    tensors = learned(SeerAttention(**SHORT), model)
    file = saved(tmp_path, {**tensors, name: value})
    assert said in refusal(SeerAttention(fitted_from=file), model)


def test_a_gate_is_used_as_what_it_was_trained(model, tmp_path):
    """Other poolings in another order have tensors of the same shapes."""
    first = SeerAttention(**SHORT, block_size=16)
    tensors = learned(first, model)
    file = saved(tmp_path, tensors)
    check([("test", SeerAttention(fitted_from=file))], model)
    said = refusal(SeerAttention(fitted_from=file, gate_type="Qavg_Kavgminmax"), model)
    assert "gate_type='Qavg_Kmaxminavg', not Qavg_Kavgminmax" in said
    assert "block_size of 16, not 32" in refusal(SeerAttention(fitted_from=file, block_size=32), model)
    older = SeerAttention(fitted_from=saved(tmp_path, tensors, gate_type=None))
    check([("test", older)], model)
    assert run(model, older, IDS)[0].equal(run(model, first, IDS)[0])


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_choosing_costs_what_the_learned_gate_does(tmp_path, kv_heads):
    """By hand, on 1024 tokens in blocks of 32: 32 pooled queries and keys of 4 and ``kv_heads`` heads of 8, keys pooled
    three times, through matrices to a width of 16; products of half of all pairs of blocks."""
    model = make_llama(kv_heads)
    method = SeerAttention(**SHORT, block_size=32, gate_hidden_size=16)
    maps = 2 * 32 * 16 * (4 * 8 + kv_heads * 24)
    products = 2 * 4 * 16 * 32**2 / 2
    counted = run(model, method, IDS)[1]
    assert counted.saving.index_prefill(1024) == 2 * (maps + products)  # two layers
    file = saved(tmp_path, attachment(method, model).tensors)
    again = SeerAttention(fitted_from=file, gate_hidden_size=16)
    other = run(model, again, IDS)[1]
    assert other.achieved == counted.achieved
    assert other.saving.index_prefill(1024) == counted.saving.index_prefill(1024)


def test_a_gate_that_ran_away_fails_the_run(model, monkeypatch):
    method = SeerAttention(**SHORT)
    tensors = learned(method, model)
    monkeypatch.setattr(SeerAttention, "learn", lambda *_: tensors | {"gates.0.k": tensors["gates.0.k"] * NAN})
    with pytest.raises(FloatingPointError, match=r"gates\.0\.k"):
        learned(method, model)


def test_files_are_read_through_the_command_line(command, tmp_path):
    tiny = ["model=tiny_100k", "task.windows=1", "task.context=128", "method=seer_attention"]
    answer = command(*tiny, "method.seer_attention.steps=1", f"save={tmp_path / 'm'}")
    assert answer.code == 0, answer.err
    tensors = load_file(tmp_path / "m" / "sparsebench-seer_attention.safetensors")
    assert bytes(tensors["gate_type"].tolist()) == b"Qavg_Kmaxminavg"
    words = [*tiny, f"method.seer_attention.fitted_from={saved(tmp_path, tensors)}"]
    assert command(*words).code == 0
    saved(tmp_path, tensors, block_size=torch.tensor(0))
    answer = command(*words)
    assert answer.code == 2 and answer.err.count("\n") == 1 and "block_size is 0" in answer.err
