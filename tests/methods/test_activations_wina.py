"""WINA on small models: the transform leaves the function, the norm lowers the error, nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from gated_models import llama
from torch import nn
from weight_models import FAMILIES

from sparsebench.errors import UserError
from sparsebench.methods.activations import apply, check
from sparsebench.methods.activations.rotation import Rotation
from sparsebench.methods.activations.scored import ScoreGate
from sparsebench.methods.activations.sites import gated_blocks
from sparsebench.methods.activations.wina import Wina
from sparsebench.methods.base import Surroundings
from sparsebench.models.base import LoadedModel

WINDOWS = torch.randint(2, 64, (8, 32), generator=torch.Generator().manual_seed(1))


def scaled_norms(model):
    """Norm gains that differ from 1, or folding them would not be tested."""
    torch.manual_seed(2)
    for name, gain in model.named_parameters():
        if "norm" in name:
            gain.data = 1 + 0.5 * torch.rand_like(gain)
    return model


@torch.no_grad()
def run(model, method):
    loaded = LoadedModel(model, None, "toy", 64)
    one = apply([("wina", method)], Surroundings(loaded, lambda: WINDOWS, 0)).attachments[0]
    with one.attached():
        found = model(input_ids=WINDOWS).logits
    return found, one.counted()


@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
@torch.no_grad()
def test_the_transform_leaves_the_function_and_the_model(more):
    model = scaled_norms(llama(layers=3, **more))
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            bias.data = torch.randn_like(bias)
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    dense = model(input_ids=WINDOWS).logits
    rotation = Rotation(model, center_embeddings=False)
    with rotation.applied():
        turned = model(input_ids=WINDOWS).logits
        for block in gated_blocks(model):
            for kind in ("k", "gate"):
                gram = block.linears[kind].module.weight.T @ block.linears[kind].module.weight
                torch.testing.assert_close(gram, gram.diag().diag(), atol=1e-4, rtol=0)
    assert (turned - dense).abs().max() <= 1e-4 * dense.abs().max()
    assert not torch.equal(turned, dense)
    after = dict(model.named_parameters())
    assert all(after[name] is own and torch.equal(own, value) for name, (own, value) in before.items())
    assert torch.equal(model(input_ids=WINDOWS).logits, dense)
    with Rotation(model, center_embeddings=True).applied():
        assert (model(input_ids=WINDOWS).logits - dense).abs().max() > 1e-3


@torch.no_grad()
def test_with_orthogonal_columns_no_token_loses_more_than_by_magnitude():
    block = gated_blocks(llama())[0]
    linear = block.linears["gate"].module
    q = torch.linalg.qr(torch.randn(80, 80, generator=torch.Generator().manual_seed(0))).Q[:, :32]
    linear.weight = nn.Parameter(q * torch.linspace(0.1, 3, 32))
    x = torch.randn(4, 50, 32, generator=torch.Generator().manual_seed(1))

    def error(scale):
        return (linear(ScoreGate(block, "gate", scale, 0.0, 16)(x)[0]) - linear(x)).norm(dim=-1)

    assert (error(linear.weight.norm(dim=0)) <= error(None) + 1e-5).all()
    assert error(linear.weight.norm(dim=0)).mean() < 0.9 * error(None).mean()


def test_counts_and_costs():
    model = scaled_norms(llama())
    _, plain = run(model, Wina(sparsity=0.5, transform=False))
    _, turned = run(model, Wina(sparsity=0.5))
    assert plain.achieved == turned.achieved == 0.5
    assert plain.columns["sparse_tokens"] == pytest.approx(31 / 32)
    assert plain.saving.index_decode(9) == 0
    assert turned.saving.index_decode(9) == 2 * 32 * 32 * 3
    assert turned.saving.index_prefill(10) == 10 * turned.saving.index_decode(9)


def test_the_forms_differ_and_thresholds_agree_with_counts():
    model = scaled_norms(llama())
    outputs = {norm_on: run(model, Wina(sparsity=0.5, norm_on=norm_on))[0] for norm_on in ("code", "all", "none")}
    assert not torch.equal(outputs["code"], outputs["all"]) and not torch.equal(outputs["code"], outputs["none"])
    _, counted = run(model, Wina(sparsity=0.5, mask_by="threshold", norm_on="all", sparse_tail=1.0))
    assert counted.achieved == pytest.approx(0.5, abs=0.06)


def test_nothing_asked_is_the_dense_model():
    model = llama()
    found, counted = run(model, Wina(sparsity=0.0, transform=False))
    with torch.no_grad():
        assert torch.equal(found, model(input_ids=WINDOWS).logits)
    assert counted.achieved == 0


def test_the_greedy_allocation_runs_under_the_transform():
    _, counted = run(scaled_norms(llama()), Wina(sparsity=0.4, allocation="greedy", base_step=0.2, windows=2))
    assert counted.achieved == pytest.approx(0.4, abs=0.05)
    assert counted.columns["allocation_error"] > 0


def test_a_model_that_cannot_be_rotated_is_refused():
    kind, config = FAMILIES["gemma2"]
    gemma = kind(config)
    with pytest.raises(UserError, match=r"^method\.wina\.transform=true: Gemma2ForCausalLM: [^\n]*transform=false$"):
        check([("wina", Wina())], gemma)
    check([("wina", Wina(transform=False))], gemma)
    qwen, config = FAMILIES["qwen3"]
    check([("wina", Wina())], qwen(config))


def test_from_the_command_line(command, small):
    answer = command(
        "method=wina", "method.wina.norm_on=all", *small, "calibration.nsamples=8", "calibration.seqlen=32"
    )
    assert answer.code == 0, answer.err
    assert answer.records[0]["achieved"] == pytest.approx(0.5)
