"""PERP on small models: zeros stay, losses fall, everything is put back, and what it refuses."""

from __future__ import annotations

import copy
from random import Random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM
from weight_models import FAMILIES, WINDOWS, assert_same_masks, linears, masks_of, prune

from sparsebench import audits
from sparsebench.errors import UserError
from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights import walk
from sparsebench.methods.weights.adapters import LORA_TYPES, Adapted, MaskLoRA, adapting
from sparsebench.methods.weights.base import BlockRun
from sparsebench.methods.weights.dense import Dense
from sparsebench.methods.weights.magnitude import Magnitude
from sparsebench.methods.weights.perp import Perp
from sparsebench.methods.weights.walk import apply
from sparsebench.methods.weights.wanda import Wanda
from sparsebench.models.base import LoadedModel
from sparsebench.models.blocks import Blocks, capture, decoder_blocks
from sparsebench.trainer import Batch, TrainConfig, Trainer

MODES = ("retrain", "reconstruct")
QUICK = {"n_iterations": 3, "rank": 2, "lr": 1e-2}


def counting(rows, length=20):
    """Rows that count upwards by 1, 2 or 3 from a random start: what the trained model knows."""
    rng = Random(rows)
    starts = torch.tensor([[rng.randrange(2, 64), rng.randrange(1, 4)] for _ in range(rows)])
    return 2 + (starts[:, :1] + starts[:, 1:] * torch.arange(length)) % 62


class Counts:
    def batch(self, rng, rows, length):
        ids = counting(rng.randrange(1, 50))[:1].repeat(rows, 1)
        ids = 2 + (ids + torch.tensor([[rng.randrange(62)] for _ in range(rows)])) % 62
        return Batch(ids[:, : length + 1], torch.ones(rows, length))


@pytest.fixture(scope="module")
def learned(originals):
    """A model that counts."""
    model = copy.deepcopy(originals["llama"])
    config = TrainConfig(steps=100, batch_tokens=16 * 19, lengths=((1.0, 19),), lr=1e-2)
    Trainer(model, {"counts": (Counts(), 1.0)}, config, None).fit()
    return model.requires_grad_(True)


def recovered(model, perp, pruner=None, seed=0, windows=WINDOWS):
    """The stack [pruner, perp], applied in place."""
    stack = [("pruner", pruner or Magnitude(sparsity=0.6)), ("perp", perp)]
    walk.check(stack, model)
    return apply(stack, Surroundings(LoadedModel(model, None, "toy", 64), lambda: windows, seed))


def loss_of(model, windows):
    with torch.no_grad():
        logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


# the mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lora_type", LORA_TYPES)
@pytest.mark.parametrize("pruner", [Magnitude(sparsity=0.6), Magnitude(pattern="2:4")], ids=["unstructured", "2:4"])
def test_pruned_entries_stay_zero_and_nothing_else_is_left_behind(make, mode, lora_type, pruner):
    model, plain, before = make(), make(), audits.fingerprint(make())
    prune(plain, pruner)
    flags = {name: (type(module), module.training) for name, module in model.named_modules()}
    model.model.norm.weight.requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    perp = Perp(training_mode=mode, lora_type=lora_type, **QUICK)
    applied = recovered(model, perp, pruner)
    assert_same_masks(masks_of(model), masks_of(plain))
    achieved = audits.count(model, applied)
    assert all(check.held for check in audits.audit(model, applied, achieved, before, False))
    changed = {name for name, value in audits.fingerprint(model).items() if value != before[name]}
    assert changed == applied.acts_on and ("model.norm.weight" in changed) == (mode == "retrain")
    assert flags == {name: (type(module), module.training) for name, module in model.named_modules()}
    assert [name for name, _ in model.named_parameters()] == names
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"model.norm.weight"}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("lora_type", LORA_TYPES)
def test_the_mask_is_what_was_pruned_not_what_is_zero(lora_type):
    weight = torch.randn(6, 8)
    weight[:, 4:] = 0
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[:, 6:] = False  # columns 4 and 5 are kept zeros
    adapter = LORA_TYPES[lora_type](weight, mask, 2, 4.0, torch.Generator())
    nn.init.normal_(adapter.B)
    merged = adapter.merged(weight)
    assert not merged[:, 6:].any()
    assert bool(merged[:, 4:6].all()) == (lora_type != "scale_lora")  # a scaled zero is a zero


def test_merging_a_mask_lora_does_not_change_the_model(make):
    model = make()
    applied_layers = masks_of_pruned(model)
    adapters = Perp(rank=4, train_bias=False).adapters(model, "", applied_layers)
    with adapting(model, adapters) as adapted:
        for adapter in adapted.adapters:
            if isinstance(adapter, MaskLoRA):
                nn.init.normal_(adapter.B, std=0.05)
        with torch.no_grad():
            unmerged = adapted(input_ids=WINDOWS, use_cache=False).logits
            pruned = model(input_ids=WINDOWS, use_cache=False).logits
            adapted.merge()
            merged = model(input_ids=WINDOWS, use_cache=False).logits
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-4)
    assert float((unmerged - pruned).abs().max()) > 0.1


@pytest.mark.parametrize("lora_type", LORA_TYPES)
def test_before_the_first_step_the_model_is_the_pruned_one(make, lora_type):
    model = make()
    adapters = Perp(rank=3, lora_type=lora_type).adapters(model, "", masks_of_pruned(model))
    with adapting(model, adapters) as adapted, torch.no_grad():
        start = adapted(input_ids=WINDOWS, use_cache=False).logits
    torch.testing.assert_close(start, model(input_ids=WINDOWS, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def masks_of_pruned(model):
    """Prunes the model and returns its layers with their masks."""
    prune(model, Magnitude(sparsity=0.6))
    layers = [layer for block in walk.scoped_layers(model, Magnitude(), 0) for layer in block]
    for layer in layers:
        layer.mask = layer.weight != 0
    return layers


# it recovers


SUBSETS = {
    "norms": {"train_lora": False, "lr": 2e-2},
    "mask_lora": {"train_norm": False},
    "scale_lora": {"train_norm": False, "lora_type": "scale_lora"},
    "lora_prune": {"train_norm": False, "lora_type": "lora_prune"},
}


@pytest.mark.parametrize("subset", SUBSETS)
def test_retraining_lowers_the_loss(learned, subset):
    model, plain, fresh = copy.deepcopy(learned), copy.deepcopy(learned), counting(40)
    prune(plain, Magnitude(sparsity=0.6))
    options = {"lr": 5e-3, "n_iterations": 40, "batch_size": 4, **SUBSETS[subset]}
    notes = recovered(model, Perp(**options), windows=counting(32)).notes
    dense, pruned, after = (loss_of(one, fresh) for one in (learned, plain, model))
    assert dense < 0.5 * pruned and after < (0.95 if subset == "norms" else 0.8) * pruned
    assert notes["recovery_loss_last"] < notes["recovery_loss_first"]
    assert notes["recovery_steps"] == 40 and notes["seconds_recover"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_reconstruction_lowers_the_error_of_the_blocks(make, family):
    model = make(family)
    notes = recovered(model, Perp(training_mode="reconstruct", n_iterations=25, lr=5e-3)).notes
    assert notes["reconstruction_mse_after"] < 0.8 * notes["reconstruction_mse_before"]
    assert notes["recovery_steps"] == 3 * 25


def test_reconstruction_lowers_the_loss_of_a_trained_model(learned):
    model, plain = copy.deepcopy(learned), copy.deepcopy(learned)
    prune(plain, Magnitude(sparsity=0.6))
    recovered(model, Perp(training_mode="reconstruct", n_iterations=40, lr=5e-3), windows=counting(16))
    assert loss_of(model, counting(40)) < 0.8 * loss_of(plain, counting(40))


def test_the_error_is_that_of_each_block_on_the_recovered_prefix(make):
    model, dense = make(), make()
    notes = recovered(model, Perp(training_mode="reconstruct", **QUICK)).notes
    inputs, total = capture(Blocks(model), WINDOWS), 0.0
    for index, (block, before) in enumerate(zip(model.model.layers, dense.model.layers, strict=True)):
        with torch.no_grad():
            outputs, targets = inputs.run(index, block), inputs.run(index, before)
        total += float((torch.cat(outputs) - torch.cat(targets)).square().mean())
        inputs.hidden = outputs
    assert notes["reconstruction_mse_after"] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_accumulated_batches_equal_one_large_batch(make, mode):
    found = []
    for size, parts in ((4, 1), (2, 2)):
        model = make()
        windows = counting(8) if mode == "reconstruct" else counting(8)[:1].repeat(8, 1)  # retraining draws its rows
        recovered(model, Perp(training_mode=mode, batch_size=size, grad_accum=parts, **QUICK), windows=windows)
        found.append(dict(model.named_parameters()))
    for name, one in found[0].items():
        torch.testing.assert_close(one, found[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_the_rows_of_the_whole(make, family):
    model = make(family)
    blocks = decoder_blocks(model)[1]
    run = BlockRun(blocks[1], 1, capture(Blocks(model), WINDOWS))
    with torch.no_grad():
        run.inputs.hidden = run.inputs.hidden[0].split((2, 3))
        for rows in (range(0, 2), range(1, 4), range(4, 5)):
            whole = blocks[1]
            expected = run.inputs.fitting(5)(1, whole, torch.cat(run.inputs.hidden))[rows.start : rows.stop]
            torch.testing.assert_close(run.batch(rows, whole), expected, rtol=1e-4, atol=1e-5)
    assert run.rows == 5


def test_the_learning_rate_rises_and_falls():
    rate = Perp(n_iterations=20, warmup_ratio=0.1).rate_at
    assert [rate(step) for step in (0, 1, 2, 11, 20)] == [0, 0.5, 1, 0.5, 0]
    assert Perp(n_iterations=1).rate_at(0) == 1


# seeds, number formats, subsets


@pytest.mark.parametrize("mode", MODES)
def test_the_seed_decides_everything(mode):
    torch.manual_seed(0)
    original = OPTForCausalLM(OPTConfig(**{**FAMILIES["opt"][1].to_dict(), "dropout": 0.2})).eval()
    found = []
    for noise, seed in ((1, 0), (2, 0), (1, 1)):
        model = copy.deepcopy(original)
        torch.manual_seed(noise)
        expected = torch.randn(3, generator=torch.Generator().manual_seed(noise))
        recovered(model, Perp(training_mode=mode, **QUICK), seed=seed)
        assert torch.equal(torch.randn(3), expected)  # the global generator is as it was
        found.append(audits.fingerprint(model))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_bfloat16_model_is_trained_in_float32_and_keeps_its_format(make, mode, family):
    model, plain = make(family).bfloat16(), make(family).bfloat16()
    prune(plain, Magnitude(sparsity=0.6))
    applied = recovered(model, Perp(training_mode=mode, n_iterations=8, lr=1e-2))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name, mask in masks_of(plain).items():
        assert not linears(model)[name].weight[~mask].any()
    assert not audits.count(model, applied).missed
    norms = dict(plain.named_parameters())
    assert any(not torch.equal(p, norms[name]) for name, p in model.named_parameters() if "norm" in name)


@pytest.mark.parametrize("mode", MODES)
def test_biases_alone_are_trained_where_there_are_some(make, mode):
    model, before = make("opt"), audits.fingerprint(make("opt"))
    prune(model, Magnitude(sparsity=0.6))
    pruned = audits.fingerprint(model)
    model = make("opt")
    applied = recovered(model, Perp(training_mode=mode, train_lora=False, train_norm=False, **QUICK))
    changed = {name for name, value in audits.fingerprint(model).items() if value != pruned[name]}
    # a constant added to all keys shifts every score of a query alike: no gradient but rounding
    assert changed and all(name.endswith("bias") for name in changed)
    assert {name for name in before if name.endswith("fc2.bias")} <= changed
    assert applied.warnings == []
    total = sum(p.numel() for p in model.parameters())
    biases = {n: p.numel() for n, p in model.named_parameters() if n.endswith("bias")}
    trained = sum(size for name, size in biases.items() if mode == "retrain" or ".layers." in name)
    assert applied.notes["trainable_fraction"] == pytest.approx(trained / total)


def test_a_model_without_biases_is_warned_of(make):
    applied = recovered(make(), Perp(**QUICK))
    assert applied.warnings == ["perp: train_bias trains nothing, the model has no biases"]
    assert recovered(make(), Perp(train_bias=False, **QUICK)).warnings == []


def test_the_trainable_share_counts_adapters_as_parameters(make):
    model = make()
    low_rank = sum(2 * sum(layer.weight.shape) for layer in linears(model).values())
    gains = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    total = sum(p.numel() for p in model.parameters())
    assert recovered(model, Perp(**QUICK)).notes["trainable_fraction"] == (low_rank + gains) / (total + low_rank)


def test_an_untied_head_gets_an_ordinary_low_rank_update(make):
    model, before = make(), make().lm_head.weight
    applied = recovered(model, Perp(train_head_lora=True, train_norm=False, **QUICK))
    assert "lm_head.weight" in applied.acts_on
    assert torch.linalg.matrix_rank(model.lm_head.weight - before, atol=1e-4) == 2


@pytest.mark.parametrize("mode", MODES)
def test_patterns_limit_what_is_trained(make, mode):
    model, plain = make(), make()
    prune(plain, Magnitude(sparsity=0.6))
    applied = recovered(model, Perp(training_mode=mode, include=("*.1.*",), exclude=("*q_proj",), **QUICK))
    after, before = audits.fingerprint(model), audits.fingerprint(plain)
    changed = {name for name in after if after[name] != before[name]}
    assert changed and all(".layers.1." in name and "q_proj" not in name for name in changed)
    assert changed | {f"{name}.weight" for name in linears(model)} == applied.acts_on


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_trained_where_the_scopes_do_not_meet(make, mode):
    model, plain = make(), make()
    pruner = Magnitude(sparsity=0.6, include=("*.0.*",))
    prune(plain, pruner)
    applied = recovered(model, Perp(training_mode=mode, train_norm=False, include=("*.1.*",), **QUICK), pruner)
    assert audits.fingerprint(model) == audits.fingerprint(plain)
    assert applied.notes["recovery_steps"] == 0
    assert "perp: nothing that was pruned is in its scope" in applied.warnings


def test_a_data_driven_pruner_sees_the_recovered_prefix(make):
    model, plain = make(), make()
    prune(plain, Wanda(pattern="2:4"))
    applied = recovered(model, Perp(training_mode="reconstruct", **QUICK), Wanda(pattern="2:4"))
    found, expected = masks_of(model), masks_of(plain)
    first = [name for name in found if ".0." in name]
    assert_same_masks({name: found[name] for name in first}, {name: expected[name] for name in first})
    assert any(not torch.equal(found[name], expected[name]) for name in found)
    assert audits.count(model, applied).scope == 0.5


# what it refuses, and what is put back after a failure


def test_options_that_do_not_fit_are_refused(make):
    off = {"train_lora": False, "train_norm": False}
    for family, perp, reason in [
        ("llama", Perp(**off, train_bias=False), r"method\.perp\.train_lora=false: .* nothing is trained"),
        ("llama", Perp(**off), r"method\.perp\.train_bias=true: LlamaForCausalLM has no biases"),
        ("gemma2", Perp(train_head_lora=True), r"method\.perp\.train_head_lora=true: this model ties its head"),
        ("llama", Perp(train_head_lora=True, training_mode="reconstruct"), r"method\.perp\.train_head_lora=true: "),
    ]:
        with pytest.raises(UserError, match=reason) as found:
            recovered(make(family), perp)
        assert "\n" not in str(found.value)
    for wrong in ({"lora_type": "lora"}, {"rank": 0}, {"warmup_ratio": 1.0}, {"lr": 0.0}, {"training_mode": "none"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Perp(**wrong)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pruner", [Dense(), Magnitude(sparsity=0.0)], ids=["dense", "sparsity 0"])
def test_where_nothing_was_pruned_nothing_changes(make, mode, pruner):
    model, before = make(), audits.fingerprint(make())
    applied = recovered(model, Perp(training_mode=mode, **QUICK), pruner)
    assert audits.fingerprint(model) == before and applied.notes["recovery_steps"] == 0
    assert "perp: nothing was pruned, so there is nothing to recover" in applied.warnings


@pytest.mark.parametrize("mode", MODES)
def test_a_failure_leaves_no_trace_in_the_modules(make, monkeypatch, mode):
    model = make()
    kinds = {name: type(module) for name, module in model.named_modules()}

    def fail(self):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(Adapted, "merge", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        recovered(model, Perp(training_mode=mode, **QUICK))
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module.training for module in model.modules())


def test_training_without_a_folder_writes_nothing(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make()
    optimiser = torch.optim.SGD([model.model.norm.weight], lr=1.0)
    before = audits.fingerprint(model)
    config = TrainConfig(steps=2, batch_tokens=38, lengths=((1.0, 19),), evaluate_every=1, checkpoint_every=1)
    made = Trainer(model, {"counts": (Counts(), 1.0)}, config, None, optimisers=[optimiser])
    made.fit()
    assert made.step == 2 and made.optimisers == [optimiser] and not list(tmp_path.iterdir())
    after = audits.fingerprint(model)
    assert {name for name in after if after[name] != before[name]} == {"model.norm.weight"}
