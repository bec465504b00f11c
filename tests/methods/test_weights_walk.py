"""The weight family's walk over real decoder blocks, against plain loops over whole forward passes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn
from weight_models import FAMILIES, WINDOWS, assert_same_masks, linears, masks_of, prune

from sparsebench.errors import UserError
from sparsebench.methods.weights.dense import Dense
from sparsebench.methods.weights.magnitude import Magnitude
from sparsebench.methods.weights.statistics import InputNorm, gathering
from sparsebench.methods.weights.walk import check
from sparsebench.methods.weights.wanda import Wanda
from sparsebench.models import blocks as walk
from sparsebench.models.blocks import Blocks, capture, decoder_blocks

# a plain implementation: whole forward passes, one sequence at a time, hooks on the layers in question


def squared_inputs(model, layers, windows):
    """{name: sum over all tokens of x^2}"""
    found = {name: torch.zeros(layer.in_features) for name, layer in layers.items()}

    def hook(name):
        def look(module, args):
            found[name] += args[0].reshape(-1, module.in_features).pow(2).sum(dim=0)

        return look

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def naive_mask(weight, squares, setting):
    scores = weight.detach().abs() * squares.sqrt()
    keep = torch.ones_like(scores, dtype=torch.bool)
    for row, scored in enumerate(scores.tolist()):
        width, gone = (len(scored), int(len(scored) * setting)) if isinstance(setting, float) else (4, 2)
        for start in range(0, len(scored), width):
            group = range(start, start + width)
            for column in sorted(group, key=lambda place, scored=scored: (scored[place], place))[:gone]:
                keep[row, column] = False
    return keep


def naive_wanda(model, windows, setting, sequential):
    layers = linears(model)
    prefix, blocks = decoder_blocks(model)
    in_block = [{n: m for n, m in layers.items() if n.startswith(f"{prefix}.{i}.")} for i in range(len(blocks))]
    stages = {
        "none": [layers],
        "block": in_block,
        "layer": [{name: layer} for block in in_block for name, layer in block.items()],
    }[sequential]
    found = {}
    for stage in stages:
        squares = squared_inputs(model, stage, windows)
        for name, layer in stage.items():
            found[name] = naive_mask(layer.weight, squares[name], setting)
            layer.weight.data[~found[name]] = 0
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting", [0.5, "2:4"])
@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_wanda_equals_a_plain_implementation(make, monkeypatch, family, setting, sequential):
    monkeypatch.setattr(walk, "_TOKENS_PER_CALL", 40)  # groups of 2, 2 and 1 sequences
    level = {"sparsity": setting} if isinstance(setting, float) else {"pattern": setting}
    model = make(family)
    prune(model, Wanda(**level, sequential=sequential))
    reference = make(family)
    assert_same_masks(masks_of(model), naive_wanda(reference, WINDOWS, setting, sequential))
    for name, layer in linears(model).items():
        assert torch.equal(layer.weight, linears(reference)[name].weight)


def test_nothing_behind_the_last_input_is_computed_twice(make):
    model, ended = make(), Counter()
    for index, block in enumerate(decoder_blocks(model)[1]):
        block.mlp.register_forward_hook(lambda *_, index=index: ended.update([index]))
    prune(model, Wanda(sparsity=0.5))
    # each but the last passes on its outputs, dense (for the others' arguments) and pruned
    assert ended == {0: 2, 1: 2}


def test_the_orders_of_measuring_differ(make):
    found = []
    for sequential in ("block", "layer", "none"):
        model = make()
        prune(model, Wanda(sparsity=0.5, sequential=sequential))
        found.append(masks_of(model))
    assert all(any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(found))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("group", ["row", "layer", "global"])
def test_how_sequences_are_grouped_does_not_matter(make, monkeypatch, family, group):
    found = []
    for tokens in (8192, 60, 20):  # all 5 sequences at once, 3 and 2, one at a time
        monkeypatch.setattr(walk, "_TOKENS_PER_CALL", tokens)
        model = make(family)
        prune(model, Wanda(sparsity=0.6, group=group))
        found.append(masks_of(model))
    assert_same_masks(found[1], found[0])
    assert_same_masks(found[2], found[0])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_statistics_are_means_over_sequences_of_sums_over_tokens(make, monkeypatch, family):
    monkeypatch.setattr(walk, "_TOKENS_PER_CALL", 40)
    model, seen = make(family), {}

    class Spy(Wanda):
        def score(self, layer):
            seen[layer.name] = layer.statistic.value.clone()
            return super().score(layer)

    expected = squared_inputs(model, linears(model), WINDOWS)
    prune(model, Spy(sparsity=0.5, sequential="none"))
    for name, squares in expected.items():
        torch.testing.assert_close(seen[name], squares / len(WINDOWS), rtol=1e-4, atol=1e-6)


def test_layers_with_one_input_share_a_statistic_and_nothing_changes(make):
    model = make()
    blocks = decoder_blocks(model)[1]
    block, layers = blocks[0], {n: m for n, m in blocks[0].named_modules() if isinstance(m, nn.Linear)}
    inputs = capture(Blocks(model), WINDOWS)
    with torch.no_grad(), gathering(block, layers, InputNorm) as together:
        inputs.run(0, block)
    assert together["self_attn.q_proj"] is together["self_attn.k_proj"] is together["self_attn.v_proj"]
    assert together["mlp.gate_proj"] is together["mlp.up_proj"]
    assert len({id(one) for one in together.values()}) == 4
    for name, layer in layers.items():
        with torch.no_grad(), gathering(block, {name: layer}, InputNorm) as alone:
            inputs.run(0, block)
        assert torch.equal(alone[name].value, together[name].value)


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_blocks_give_what_the_model_gives(make, family):
    model = make(family)
    blocks = decoder_blocks(model)[1]
    seen = []
    handle = blocks[-1].register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    handle.remove()
    inputs = capture(Blocks(model), WINDOWS)
    with torch.no_grad():
        for index, block in enumerate(blocks):
            inputs.hidden = inputs.run(index, block)
    assert torch.equal(torch.cat(inputs.hidden), seen[0])


# hooks never stay behind


def hooks_on(model):
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {f"{name} {kind}": len(getattr(m, kind)) for name, m in model.named_modules() for kind in kinds}


class Breaks(InputNorm):
    """Fails in the middle of the second block's calibration."""

    calls = 0

    def add(self, inputs, sequences):
        type(self).calls += 1
        if type(self).calls == 7:
            raise RuntimeError("in the middle")
        super().add(inputs, sequences)


class Breaking(Wanda):
    def statistic(self):
        return Breaks


class BreaksInSelect(Wanda):
    def select(self, layer):
        if layer.name.endswith("layers.1.mlp.up_proj"):
            raise RuntimeError("in the middle")
        return super().select(layer)


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_hooks_are_removed_after_success(make, sequential):
    model = make()
    before = hooks_on(model)
    prune(model, Wanda(sparsity=0.5, sequential=sequential))
    assert hooks_on(model) == before


@pytest.mark.parametrize("kind", [Breaking, BreaksInSelect])
def test_hooks_are_removed_after_a_failure(make, monkeypatch, kind):
    monkeypatch.setattr(Breaks, "calls", 0)
    model = make()
    before = hooks_on(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        prune(model, kind(sparsity=0.5))
    assert hooks_on(model) == before


@pytest.mark.parametrize("part", ["model.layers.0.mlp", "model.layers.2.self_attn", "model.embed_tokens"])
def test_hooks_are_removed_when_the_model_fails(make, part):
    model = make()
    before = hooks_on(model)
    module = model.get_submodule(part)

    def fail(*args, **kwargs):
        raise RuntimeError("in the middle")

    module.forward = fail
    with pytest.raises(RuntimeError, match="in the middle"):
        prune(model, Wanda(sparsity=0.5))
    assert hooks_on(model) == before


def test_only_the_reference_takes_a_model_without_linear_layers():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    check([("dense", Dense())], model)
    with pytest.raises(UserError, match=r"^model: its blocks have no linear layer .*, only Conv1D, LayerNorm$"):
        check([("magnitude", Magnitude(sparsity=0.5))], model)
