"""Every audit catches the bug that it is there for, and a sound run passes them all."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsebench import audits
from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights.dense import Dense
from sparsebench.methods.weights.given import Given
from sparsebench.methods.weights.magnitude import Magnitude
from sparsebench.methods.weights.walk import apply
from sparsebench.models.base import LoadedModel

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def untouched():
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)).eval()


@pytest.fixture
def model(untouched):
    return copy.deepcopy(untouched)


class Audited:
    """A sparse model before its audits, so that a test can break it in between."""

    def __init__(self, model, method):
        self.model, self.before = model, audits.fingerprint(model)
        self.applied = apply([("method", method)], Surroundings(LoadedModel(model, None, "toy", 32), lambda: None, 0))

    def weight(self, layer=LAYER):
        return self.model.get_submodule(layer).weight.data

    def broken(self):
        """The names of the audits that do not hold."""
        achieved = audits.count(self.model, self.applied)
        checks = audits.audit(self.model, self.applied, achieved, self.before, not achieved.asked)
        for check in checks:
            assert check.held or check.detail, f"{check.name} failed without saying what was seen"
        return [check.name for check in checks if not check.held]


@pytest.mark.parametrize(
    "method",
    [Magnitude(sparsity=0.5), Magnitude(pattern="2:4"), Magnitude(pattern="1:8"), Magnitude(sparsity=0.0), Dense(),
     Given(), Magnitude(sparsity=0.5, group="global"), Magnitude(pattern="4:10", remainder="dense"),
     Magnitude(pattern="9:18", remainder="dense")],
    ids=range(9),
)  # fmt: skip
def test_a_sound_run_passes(model, method):
    assert Audited(model, method).broken() == []


def test_a_revived_weight(model):
    run = Audited(model, Magnitude(sparsity=0.5))
    weight = run.weight()
    row, column = (weight == 0).nonzero()[0].tolist()
    weight[row, column] = 1e-8
    assert run.broken() == ["exact_zeros"]


def test_zeros_beyond_the_mask(model):
    run = Audited(model, Magnitude(sparsity=0.5))
    run.weight()[0] = 0
    assert run.broken() == ["exact_zeros"]


def test_n_of_m_along_the_wrong_dimension(model):
    run = Audited(model, Magnitude(pattern="2:4"))
    weight = run.weight()  # square, so that its transpose fits and has as many zeros
    weight.copy_(weight.t().clone())
    assert run.broken() == ["pattern_n_of_m"]


def test_n_of_m_of_a_weight_that_is_stored_transposed(model):
    run = Audited(model, Magnitude(pattern="2:4"))
    module = model.get_submodule(LAYER)
    module.weight.data = module.weight.data.t().contiguous().t()
    assert run.broken() == []


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_a_change_outside_the_scope(model, name):
    run = Audited(model, Magnitude(sparsity=0.5, exclude=("*up_proj",)))
    model.get_parameter(name).data.view(-1)[0] += 1
    assert run.broken() == ["excluded_untouched"]


@pytest.mark.parametrize(
    "change", [lambda w: w.neg(), lambda w: w.flip(0), lambda w: torch.cat([-w[:1], -w[1:2], w[2:]])], ids=range(3)
)
def test_a_change_of_signs_or_order_outside_the_scope(model, change):
    run = Audited(model, Magnitude(sparsity=0.5))
    embedding = model.get_input_embeddings().weight.data
    embedding.copy_(change(embedding.clone()))
    assert run.broken() == ["excluded_untouched"]


def test_a_changed_buffer(model):
    run = Audited(model, Magnitude(sparsity=0.5))
    name, buffer = next(iter(model.named_buffers()))
    buffer.view(-1)[0] += 1
    assert run.broken() == ["excluded_untouched"], name


def test_any_change_where_nothing_was_asked(model):
    run = Audited(model, Magnitude(sparsity=0.0))
    run.weight()[0, 0] *= -1
    assert run.broken() == ["zero_equals_dense"]


class Idle(Magnitude):
    """Says that it prunes and keeps everything."""

    def select(self, layer):
        return torch.ones_like(layer.weight, dtype=torch.bool)


def test_a_method_that_never_acts(model):
    assert Audited(model, Idle(sparsity=0.5)).broken() == ["acted"]


def test_groups_wider_than_every_layer(model):
    assert Audited(model, Magnitude(pattern="20:40", remainder="dense")).broken() == ["acted"]


def test_zeros_that_were_there_before_are_not_the_methods_act(model):
    apply([("magnitude", Magnitude(sparsity=0.5))], Surroundings(LoadedModel(model, None, "toy", 32), lambda: None, 0))
    assert Audited(model, Idle(sparsity=0.5)).broken() == ["acted"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(model, value):
    run = Audited(model, Magnitude(sparsity=0.5))
    weight = run.weight()
    row, column = weight.nonzero()[0].tolist()
    weight[row, column] = value
    assert run.broken() == ["finite_weights"]


def test_counts_are_of_the_result_over_scope_and_model(model):
    run = Audited(model, Magnitude(sparsity=0.5, exact_count=True, include=("*q_proj", "*down_proj")))
    achieved = audits.count(model, run.applied)
    zeros = sum(int((run.weight(row["layer"]) == 0).sum()) for row in achieved.layers)
    assert len(achieved.layers) == 4
    assert achieved.scope == achieved.asked == 0.5 and not achieved.missed
    assert achieved.model == zeros / sum(parameter.numel() for parameter in model.parameters())


def test_findings_name_an_empty_layer_and_a_missed_level(model):
    run = Audited(model, Magnitude(sparsity=0.5))
    run.weight().zero_()
    found = list(audits.findings(model, run.applied, audits.count(model, run.applied)))
    assert any(LAYER in text for text in found) and any("asked sparsity 0.5" in text for text in found)
