"""DSnoT: against a plain loop over rows, the synthetic layer of the paper's claim, and inside the walk."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from weight_models import WINDOWS, assert_same_masks, linears, masks_of

from sparsebench import audits
from sparsebench.errors import UserError
from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights import masks, walk
from sparsebench.methods.weights.base import Layer
from sparsebench.methods.weights.dsnot import DSnoT
from sparsebench.methods.weights.magnitude import Magnitude
from sparsebench.methods.weights.random import Random
from sparsebench.methods.weights.sparsegpt import SparseGPT
from sparsebench.methods.weights.statistics import InputMoments
from sparsebench.methods.weights.wanda import Wanda
from sparsebench.models import blocks
from sparsebench.models.base import LoadedModel


def stack(model, *methods, windows=WINDOWS, seed=0):
    named = [(type(method).__name__.lower(), method) for method in methods]
    return walk.apply(named, Surroundings(LoadedModel(model, None, "toy", 64), lambda: windows, seed))


def layer_of(weight, inputs, n_of_m=None, score=None, name="model.layers.0.self_attn.q_proj"):
    """weight: (out, in); inputs: (sequences, tokens, in)"""
    module = nn.Linear(1, 1, bias=False)
    module.weight = nn.Parameter(weight, requires_grad=False)
    statistic = InputMoments()
    statistic.add(inputs, len(inputs))
    return Layer(name, module, statistic, dense=weight, n_of_m=n_of_m, score=score)


# a plain implementation: one row at a time, in Python numbers that round as float32 does


def first(columns, used):
    return next((j for j in columns if j not in used), None)


def plain_row(weights, kept, seen, method, cycles, score, n_of_m):
    """The refined row (list of bool), the size of its largest swap, its first and last err."""
    count = len(kept)
    d = (weights * seen.sums).tolist()
    wanda = (weights.abs() * seen.squares.sqrt()).tolist()
    score = wanda if score is None else score.tolist()
    power = method.pow_of_var_regrowing
    key = (weights * seen.sums / seen.variance**power if power else weights * seen.sums).tolist()
    pruned = [j for j in range(count) if not kept[j] and math.isfinite(key[j])]
    lists = {
        1: (sorted((j for j in pruned if key[j] > 0), key=lambda j: (-key[j], j)),
            sorted((j for j in range(count) if kept[j] and d[j] < 0), key=lambda j: (wanda[j], j))),
        -1: (sorted((j for j in pruned if key[j] < 0), key=lambda j: (key[j], j)),
             sorted((j for j in range(count) if kept[j] and d[j] > 0), key=lambda j: (wanda[j], j))),
    }  # fmt: skip
    err = float((weights * seen.sums * ~torch.tensor(kept)).sum())
    initial, result, used, largest = err, list(kept), set(), 0.0
    for _ in range(cycles):
        grows, prunes = lists[1 if err > 0 else -1]
        g = first(grows, used)
        if g is not None and n_of_m:
            size = n_of_m[1]
            group = range(g // size * size, g // size * size + size)
            prunes = sorted((j for j in group if kept[j]), key=lambda j: (score[j], j))
        p = first(prunes, used)
        if g is None or p is None or not abs(err) > method.update_threshold:
            break
        new = float(torch.tensor(err) + torch.tensor(d[p]) - torch.tensor(d[g]))
        if (n_of_m or method.same_sign_rule) and (new > 0) - (new < 0) != (initial > 0) - (initial < 0):
            break
        result[p], result[g] = False, True
        used |= {p, g}
        largest = max(largest, abs(new - err))
        err = new
    return result, largest, initial, err


@st.composite
def problems(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.sampled_from([4, 8]))
    columns = size * draw(st.integers(1, 6))
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    weight = normal(draw(st.integers(1, 5)), columns)
    inputs = normal(3, 6, columns) + draw(st.sampled_from([0.0, 1.0, 3.0])) * normal(columns)
    for column in draw(st.lists(st.integers(0, columns - 1), max_size=3)):
        inputs[:, :, column] = draw(st.sampled_from([0.0, 1.5]))  # dead, or constant
    method = DSnoT(
        skip_layer="none",
        max_cycle_time=draw(st.sampled_from(["0", "1", "3", "50", "auto"])),
        update_threshold=draw(st.sampled_from([0.0, 0.1, 2.0])),
        pow_of_var_regrowing=draw(st.sampled_from([0.0, 0.5, 1.0])),
        same_sign_rule=draw(st.booleans()),
    )
    if draw(st.booleans()):
        n_of_m = (draw(st.integers(1, size - 1)), size)
        score = draw(st.sampled_from([None, weight.abs()]))
        chosen = weight.abs() if score is None else score
        return layer_of(weight, inputs, n_of_m, score), masks.keep_n_of_m(chosen, *n_of_m), method
    return layer_of(weight, inputs), masks.keep_rows(weight.abs(), draw(st.floats(0, 0.95))), method


@settings(max_examples=150, deadline=None)
@given(problems())
def test_all_rows_at_once_give_what_one_row_at_a_time_gives(problem):
    layer, mask, method = problem
    before = mask.clone()
    refined = method.refine(layer, mask)
    assert torch.equal(mask, before)
    assert torch.equal(refined.sum(dim=1), mask.sum(dim=1))
    if layer.n_of_m:
        groups = refined.unflatten(1, (-1, layer.n_of_m[1]))
        assert bool((groups.sum(dim=2) == layer.n_of_m[0]).all())
    cycles = method.cycles(mask.shape[1])
    for row, kept in enumerate(mask.tolist()):
        score = None if layer.score is None else layer.score[row]
        found, largest, initial, last = plain_row(
            layer.weight[row], kept, layer.statistic, method, cycles, score, layer.n_of_m
        )
        assert refined[row].tolist() == found
        if not layer.n_of_m:
            assert abs(last) <= max(abs(initial), largest) * (1 + 1e-5)


# the synthetic layer of the paper's claim: features with a mean


def output_error(weight, mask, inputs):
    dense = inputs.flatten(0, 1) @ weight.t()
    return float((dense - inputs.flatten(0, 1) @ (weight * mask).t()).norm() / dense.norm())


@pytest.mark.parametrize("initial", ["magnitude", "wanda"])
@pytest.mark.parametrize(("columns", "cycles"), [(128, "1"), (512, "auto")])
@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_features_with_a_mean_lose_less_of_the_output(ratio, columns, cycles, initial):
    generator = torch.Generator().manual_seed(5)
    weight = 0.05 * torch.randn(32, columns, generator=generator)
    mean = ratio * torch.randn(columns, generator=generator)
    inputs, fresh = (mean + torch.randn(16, 64, columns, generator=generator) for _ in range(2))
    layer = layer_of(weight, inputs)
    score = weight.abs() if initial == "magnitude" else weight.abs() * layer.statistic.squares.sqrt()
    mask = masks.keep_rows(score, 0.6)
    refined = DSnoT(max_cycle_time=cycles).refine(layer, mask)
    assert output_error(weight, refined, fresh) < 0.95 * output_error(weight, mask, fresh)


def test_inputs_without_a_mean_or_a_high_threshold_change_nothing():
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    half = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(2))
    mask = masks.keep_rows(weight.abs(), 0.5)
    balanced = torch.stack([half, -half], dim=2).flatten(1, 2)
    layer = layer_of(weight, balanced)
    layer.statistic._totals[0] = 0  # exactly, whatever the sum rounds to
    assert torch.equal(DSnoT().refine(layer, mask), mask)
    assert torch.equal(DSnoT(update_threshold=0).refine(layer, mask), mask)
    shifted = layer_of(weight, half + 1)
    assert not torch.equal(DSnoT().refine(shifted, mask), mask)
    assert torch.equal(DSnoT(update_threshold=1e30).refine(shifted, mask), mask)
    assert torch.equal(DSnoT(max_cycle_time=0).refine(shifted, mask), mask)


def test_a_feature_that_does_not_vary_is_never_regrown():
    generator = torch.Generator().manual_seed(4)
    weight = torch.rand(8, 64, generator=generator) + 0.1
    inputs = torch.randn(4, 16, 64, generator=generator) + 2
    inputs[:, :, ::2] = 2.0
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[:, :24] = False
    weight[:, 40:] *= -1
    refined = DSnoT(max_cycle_time=10).refine(layer_of(weight, inputs), mask)
    assert not torch.equal(refined, mask)
    assert not bool(refined[:, 0:24:2].any())
    assert torch.equal(refined.sum(dim=1), mask.sum(dim=1))


def test_statistics_measure_every_sequence_by_itself():
    inputs = torch.randn(6, 10, 5, generator=torch.Generator().manual_seed(0))
    inputs += 10 * torch.arange(6)[:, None, None]  # shifts between sequences are no variance
    one_by_one, together, flat = InputMoments(), InputMoments(), InputMoments()
    for sequence in inputs:
        one_by_one.add(sequence[None], 1)
    together.add(inputs, 6)
    flat.add(inputs[:4].flatten(0, 1), 4)
    flat.add(inputs[4:].flatten(0, 1), 2)
    for one in (one_by_one, together, flat):
        torch.testing.assert_close(one.sums, inputs.sum(dim=1).mean(dim=0))
        torch.testing.assert_close(one.squares, inputs.square().sum(dim=1).mean(dim=0))
        torch.testing.assert_close(one.variance, inputs.var(dim=1, correction=0).mean(dim=0))
    picked = InputMoments()  # tokens that were routed here: 7 of 2 sequences, then none of 1
    picked.add(inputs[0, :7], 2)
    picked.add(inputs[0, :0], 1)
    torch.testing.assert_close(picked.sums, inputs[0, :7].sum(dim=0) / 3)
    torch.testing.assert_close(picked.variance, inputs[0, :7].var(dim=0, correction=0))


# in the walk


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(
    ("pruner", "level"),
    [(Magnitude, {"sparsity": 0.6}), (Wanda, {"sparsity": 0.6}), (SparseGPT, {"sparsity": 0.6}),
     (Magnitude, {"pattern": "2:4"}), (Wanda, {"pattern": "4:8"}), (SparseGPT, {"pattern": "2:4"}),
     (Random, {"sparsity": 0.5}), (Magnitude, {"sparsity": 0.5, "group": "global"})],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)  # fmt: skip
def test_a_refined_model_has_the_counts_of_its_pruner(make, family, pruner, level):
    plain, refined, dense = make(family), make(family), linears(make(family))
    stack(plain, pruner(**level))
    applied = stack(refined, pruner(**level), DSnoT(max_cycle_time="auto", skip_layer="none", update_threshold=0.0))
    assert not audits.count(refined, applied).missed
    before, after = masks_of(plain), masks_of(refined)
    first = next(iter(after))
    assert not torch.equal(before[first], after[first])  # the first layer sees the same inputs in both
    assert torch.equal(before[first].sum(dim=1), after[first].sum(dim=1))
    for name, mask in after.items():
        assert int(mask.sum()) == pytest.approx(int(before[name].sum()), rel=0.02 if pruner is SparseGPT else 0)
        if "pattern" in level:
            kept, size = map(int, level["pattern"].split(":"))
            assert bool((mask.unflatten(1, (-1, size)).sum(dim=2) == kept).all())
        if pruner is not SparseGPT:
            assert torch.equal(linears(refined)[name].weight, dense[name].weight * mask)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("skip", ["mlp", "self_attn", "none"])
def test_skipped_layers_keep_the_mask_of_the_pruner(make, monkeypatch, family, skip):
    seen = {}

    class Spy(DSnoT):
        def refine(self, layer, mask):
            seen[layer.name] = (mask, super().refine(layer, mask))
            return seen[layer.name][1]

    stack(make(family), Magnitude(sparsity=0.5), Spy(skip_layer=skip, max_cycle_time="auto", update_threshold=0.0))
    changed = {name for name, (before, after) in seen.items() if not torch.equal(before, after)}
    attention = {name for name in seen if "self_attn" in name}
    assert attention and attention < seen.keys()
    assert changed == {"mlp": attention, "self_attn": seen.keys() - attention, "none": seen.keys()}[skip]


def test_a_skipped_projection_and_layers_out_of_scope_keep_their_masks(make):
    plain = make()
    stack(plain, Magnitude(sparsity=0.5))
    for options, kept in (({"skip_sub_layer": "v_proj"}, "v_proj"), ({"exclude": ("*q_proj",)}, "q_proj")):
        refined = make()
        stack(refined, Magnitude(sparsity=0.5), DSnoT(max_cycle_time="auto", update_threshold=0.0, **options))
        changed = {n for n, mask in masks_of(plain).items() if not torch.equal(mask, masks_of(refined)[n])}
        assert changed == {n for n in masks_of(plain) if "self_attn" in n and not n.endswith(kept)}


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_how_sequences_are_grouped_does_not_matter(make, monkeypatch, family):
    found = []
    for tokens in (8192, 60, 20):  # all 5 sequences at once, 3 and 2, one at a time
        monkeypatch.setattr(blocks, "_TOKENS_PER_CALL", tokens)
        model = make(family)
        stack(model, Wanda(sparsity=0.6), DSnoT(max_cycle_time="auto", skip_layer="none"))
        found.append(masks_of(model))
    assert_same_masks(found[1], found[0])
    assert_same_masks(found[2], found[0])


def test_n_of_m_prunes_by_the_score_of_the_selecting_method(make):
    scores = {}

    class Spy(DSnoT):
        def refine(self, layer, mask):
            scores[layer.name] = (layer.n_of_m, layer.score, layer.dense)
            return super().refine(layer, mask)

    stack(make(), Magnitude(pattern="2:4"), Spy())
    for pattern, score, dense in scores.values():
        assert pattern == (2, 4) and torch.equal(score, dense.abs())
    stack(make(), Wanda(sparsity=0.5), Spy())
    assert all(pattern is None for pattern, _, _ in scores.values())


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"max_cycle_time": "many"}, r"^method\.dsnot\.max_cycle_time=many: must be a whole number >= 0, or auto$"),
     ({"max_cycle_time": -1}, r"max_cycle_time=-1"), ({"max_cycle_time": 2.5}, r"max_cycle_time=2\.5"),
     ({"update_threshold": -0.1}, "update_threshold"), ({"pow_of_var_regrowing": -1}, "pow_of_var_regrowing"),
     ({"skip_layer": "mpl"}, "did you mean 'mlp'")],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused(options, reason):
    with pytest.raises(UserError, match=reason):
        DSnoT(**options)


def test_a_projection_that_the_model_lacks_is_refused(make):
    with pytest.raises(UserError, match=r"^method\.dsnot\.skip_sub_layer=w_proj: no such projection"):
        walk.check([("magnitude", Magnitude()), ("dsnot", DSnoT(skip_sub_layer="w_proj"))], make())


def test_auto_is_the_published_effort():
    assert [DSnoT(max_cycle_time="auto").cycles(width) for width in (16, 80, 512, 4096)] == [1, 1, 6, 51]
    assert DSnoT().cycles(96) == 50 and DSnoT(max_cycle_time=7).cycles(96) == 7
