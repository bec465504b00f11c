"""Sparsing Law's metrics against the released metric and search code, on whole models (ReLU and SiLU)."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsebench.methods.activations.cett import Probe, WeakNeurons, common_cett
from sparsebench.methods.activations.gating import Acting
from sparsebench.methods.activations.sparsing_law import SparsingLaw

MODEL = r"(?P<model>relu|silu)\."
TARGET = MODEL + r"(?P<which>pplp\d+)_target"
LEVEL = MODEL + r"(?P<which>(?P<metric>cett|topk|fat)\d+)"
RESULT = MODEL + r"(?P<which>\w+?\d+)_(?P<what>cett|thresholds|ppl_ratio|activation)"
INPUTS = MODEL + r"(w\..+|input_ids)"
OPTION = {"cett": "cett", "topk": "topk_ratio", "fat": "fat_eps"}
HEADS = 2  # the file does not say; both of its models have two
PROBES = {}


def probe(case):
    """The golden model on the golden text, made once."""
    name = case.parts["model"]
    if (id(case.arrays), name) not in PROBES:
        weights = {match[1]: case[match[0]] for match in case.find(rf"{name}\.w\.(.+)")}
        vocabulary, hidden = weights["model.embed_tokens.weight"].shape
        gates = [value for key, value in weights.items() if key.endswith("mlp.gate_proj.weight")]
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=len(gates[0]), num_hidden_layers=len(gates),
            num_attention_heads=HEADS, num_key_value_heads=HEADS, hidden_act=name, tie_word_embeddings=True,
            attn_implementation="eager", pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert set(missing) <= {"lm_head.weight"} and not unexpected
        PROBES[id(case.arrays), name] = Probe(model, case[f"{name}.input_ids"])
    return PROBES[id(case.arrays), name]


class Watching(Acting):
    """Notes the share of kept neurons of every token."""

    def gate(self, gate, x):
        values, keep = gate(x)
        self.seen = [*getattr(self, "seen", []), keep.float().mean(-1)]
        return values


@torch.no_grad()
def activation(on, gates):
    """(layers, rows, tokens)"""
    acting = Watching(lambda tokens: tokens)
    with acting.on(on.model, gates):
        on.model(input_ids=on.windows)
    return torch.stack(acting.seen)


def golden(case, what):
    return case[f"{case.parts['model']}.{case.parts['which']}_{what}"]


@pytest.mark.golden("sparsing_law", LEVEL)
def test_fixed_levels_are_the_reference_levels(case):
    on, metric = probe(case), case.parts["metric"]
    method = SparsingLaw(metric=metric, **{OPTION[metric]: float(case.golden)})
    fitted = method.fit(on.model, on.windows, 0, lambda done, total: None)
    gates = method.gates(on.blocks, fitted)
    torch.testing.assert_close(activation(on, gates), golden(case, "activation"), atol=0.02, rtol=0)
    assert on.run(gates).ratio == pytest.approx(float(golden(case, "ppl_ratio")), abs=2e-3)


@pytest.mark.golden("sparsing_law", TARGET)
def test_the_search_finds_what_the_reference_finds(case):
    on = probe(case)
    cett = common_cett([on], float(case.golden) - 1, 1e-6)
    assert cett == pytest.approx(float(golden(case, "cett")), rel=0.02)
    torch.testing.assert_close(
        torch.tensor(on.thresholds(cett), dtype=torch.float64), golden(case, "thresholds"), atol=0, rtol=0.02
    )
    reached = on.run(on.gates(cett))
    assert reached.ratio == pytest.approx(float(golden(case, "ppl_ratio")), abs=5e-3)
    assert reached.mean == pytest.approx(float(golden(case, "activation").mean()), abs=0.01)


@pytest.mark.golden("sparsing_law", TARGET)
def test_golden_thresholds_keep_the_neurons_of_the_reference(case):
    on = probe(case)
    gates = [WeakNeurons(block, float(t)) for block, t in zip(on.blocks, golden(case, "thresholds"), strict=True)]
    torch.testing.assert_close(activation(on, gates), golden(case, "activation"), atol=0.02, rtol=0)


@pytest.mark.golden("sparsing_law", r".*")
def test_no_golden_output_is_left_unread(case):
    assert any(re.fullmatch(kind, case.key) for kind in (TARGET, LEVEL, RESULT, INPUTS))
