"""GQSA: the invariants of its groups and grids, what its two stages may change, what is counted, what is refused."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn
from weight_models import WINDOWS, linears

from sparsebench import audits
from sparsebench.corpora.kjv import Kjv
from sparsebench.costs.storage import weight_bytes
from sparsebench.errors import UserError
from sparsebench.kernels.formats import GroupQuantised
from sparsebench.kernels.stored import stored_form
from sparsebench.kernels.swap import swapped
from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights import walk
from sparsebench.methods.weights.base import Layer
from sparsebench.methods.weights.gqsa import GQSA
from sparsebench.methods.weights.gqsa_groups import Grouped, Load, cut, decode, encode, grid, means, spread
from sparsebench.methods.weights.hessian import Hessian
from sparsebench.models.base import LoadedModel
from sparsebench.models.embedded import Ladder

ONE_SHOT = {"bqpo_enable": False, "e2e_enable": False}
QUICK = {"bqpo_lr_w": 1e-2, "bqpo_lr_q": 1e-3, "e2e_lr": 1e-3, "bqpo_epochs": 1}


def layer_of(weight, statistic=None):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight)
    return Layer("layer", module, statistic)


def random_weight(seed, rows=4, columns=8):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def hessian_of(inputs):
    found = Hessian()
    found.add(inputs[None], 1)
    return found


def apply(model, method, seed=0, windows=WINDOWS):
    stack = [("gqsa", method)]
    walk.check(stack, model)
    return walk.apply(stack, Surroundings(LoadedModel(model, None, "toy", 64), lambda: windows, seed))


def kept_groups(model, size):
    return {name: stored_form(layer, layer.weight) for name, layer in linears(model).items()}, {
        name: cut(layer.weight.detach(), size).abs().sum(2) > 0 for name, layer in linears(model).items()
    }


# 1: which groups go


@pytest.mark.parametrize("saliency", ["obs", "obs1", "wanda", "magnitude"])
def test_no_choice_of_as_many_groups_loses_less(saliency):
    inputs = torch.randn(60, 8, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 9)
    method = GQSA(group_size=4, sparsity=0.5, saliency=saliency)
    statistic = method.statistic()
    layer = layer_of(random_weight(0), hessian_of(inputs) if saliency.startswith("obs") else None)
    if saliency == "wanda":
        layer.statistic = statistic()
        layer.statistic.add(inputs[None], 1)
    scores = method.group_saliency(layer).flatten()
    removed = ~method.select(layer).view(4, 2, 4)
    assert (removed.all(2) == removed.any(2)).all() and int(removed.any(2).sum()) == 4
    lost = float(scores[removed.any(2).flatten()].sum())
    assert lost == pytest.approx(min(float(scores[list(one)].sum()) for one in combinations(range(8), 4)))


def test_with_equal_independent_inputs_the_obs_ranking_is_that_of_squared_weights():
    layer = layer_of(random_weight(2, 6, 16), hessian_of(torch.eye(16) * 4))
    expected = means(layer.weight**2, 4).flatten().argsort()
    for saliency in ("obs", "obs1"):
        assert torch.equal(GQSA(group_size=4, saliency=saliency).group_saliency(layer).flatten().argsort(), expected)


def test_the_inverse_is_that_of_the_damped_hessian():
    inputs = torch.randn(50, 8, generator=torch.Generator().manual_seed(5))
    inputs[:, 3] = 0  # never seen
    layer = layer_of(random_weight(3), hessian_of(inputs))
    hessian = layer.statistic.value.double()
    hessian[3, 3] = 1
    hessian += 0.01 * hessian.diag().mean() * torch.eye(8)
    inverse = torch.linalg.inv(hessian).diag()
    for saliency, power in (("obs", 2), ("obs1", 1)):
        expected = layer.weight.double() ** 2 / inverse**power
        expected[:, 3] = 0
        found = GQSA(group_size=4, saliency=saliency).element_saliency(layer)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("level", [0.25, 0.5, 0.7])
def test_rows_lose_the_same_number_and_layers_the_right_one(level):
    layer = layer_of(random_weight(4, 12, 40))
    for compare in ("row", "layer"):
        method = GQSA(group_size=4, sparsity=level, saliency="magnitude", compare=compare)
        removed = ~method.select(layer)[:, ::4]
        if compare == "row":
            assert (removed.sum(1) == round(level * 10)).all()
        assert int(removed.sum()) == (12 * round(level * 10) if compare == "row" else round(level * 120))


@pytest.mark.parametrize("compare", ["layer", "row", "global"])
@pytest.mark.parametrize("group_size", [8, 12])
def test_the_whole_model_loses_what_was_asked(make, compare, group_size):
    model, before = make(), audits.fingerprint(make())
    applied = apply(model, GQSA(group_size=group_size, sparsity=0.5, compare=compare, **QUICK))
    achieved = audits.count(model, applied)
    assert not achieved.missed and achieved.scope == pytest.approx(0.5, abs=0.01 if group_size == 8 else 0.14)
    assert all(check.held for check in audits.audit(model, applied, achieved, before, False))
    kept = sum(stored.kept for stored in kept_groups(model, group_size)[0].values())
    assert achieved.scope == pytest.approx(1 - kept / sum(layer.weight.numel() for layer in linears(model).values()))


def test_a_shorter_last_group_is_a_group():
    weight = torch.arange(1.0, 11.0).repeat(3, 1)
    assert means(weight, 4)[0].tolist() == [2.5, 6.5, 9.5]
    assert spread(torch.tensor([[True, False, True]]), 4, 10)[0].int().tolist() == [1] * 4 + [0] * 4 + [1] * 2
    grouped = Grouped(weight, torch.ones(3, 3, dtype=torch.bool), 4, 8)
    torch.testing.assert_close(grouped(weight), weight, rtol=0, atol=0.02)
    assert cut(weight, 4)[0, 2].tolist() == [9, 10, 9, 9]


# 2: storage


@pytest.mark.parametrize("kept", ["some", "all", "rows"])
def test_the_stored_form_is_the_weight_bit_for_bit(kept):
    weight = random_weight(6, 10, 48)
    chosen = torch.rand(10, 3, generator=torch.Generator().manual_seed(0)) < (2 if kept == "all" else 0.5)
    if kept == "rows":
        chosen[::2] = False
    grouped = Grouped(weight, chosen, 16, 4)
    grouped.freeze()
    with torch.no_grad():
        grouped.zero += 0.3  # as end-to-end tuning leaves it
        dense = grouped(weight)
    matrix = grouped.matrix()
    assert isinstance(matrix, GroupQuantised) and torch.equal(matrix.dense(), dense)
    assert torch.equal(matrix.row_ptr.diff(), chosen.sum(1).int())
    assert grouped.stored().nbytes == matrix.nbytes


def test_bits_per_weight_are_those_of_the_formula():
    weight = random_weight(7, 64, 64)
    half = torch.zeros(64, 4, dtype=torch.bool)
    half[:, ::2] = True
    straddling = weight.clone()
    straddling[:, ::16], straddling[:, 1::16] = -3.0, 3.0  # every zero point fits a code

    def bits(kept, size, wbits, dense=straddling):
        return Grouped(dense, kept, size, wbits).stored().bits / dense.numel()

    assert bits(half, 16, 4) == pytest.approx(3.125 + 32 * 65 / 64**2)
    assert bits(torch.ones(64, 4, dtype=torch.bool), 16, 4) == 5.25
    assert bits(torch.ones(64, 1, dtype=torch.bool), 64, 2) == pytest.approx(2 + 18 / 64)
    assert bits(half, 16, 4, weight.abs() + 1) == pytest.approx(0.5 * (4 + 48 / 16) + 32 * 65 / 64**2)
    assert bits(half, 16, 16, weight) == pytest.approx(0.5 * (32 + 1) + 32 * 65 / 64**2)


def test_a_model_takes_what_its_groups_take_and_runs_on_the_kernel(make):
    model = make()
    apply(model, GQSA(group_size=16, sparsity=0.25, exclude=("*v_proj",), **QUICK))
    sizes = {one["name"]: one for one in weight_bytes(model).per_layer}
    for name, layer in linears(model).items():
        if name.endswith("v_proj"):
            assert stored_form(layer, layer.weight) is None
        else:
            matrix = stored_form(layer, layer.weight).matrix
            assert sizes[name]["bytes"] == matrix.nbytes and sizes[name]["format"] == "4-bit groups"
            assert torch.equal(matrix.dense(), layer.weight)
    with torch.no_grad():
        right = model(input_ids=WINDOWS[:1, :1]).logits
        with swapped(model) as swap:
            assert {one.format for one in swap.layers} == {"4-bit groups"} and len(swap.layers) == 18
            got = model(input_ids=WINDOWS[:1, :1]).logits
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


# 3: grids


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("include_zero", [False, True])
def test_rounding_moves_at_most_half_a_step_and_gives_few_levels(bits, include_zero):
    groups = torch.randn(200, 16, generator=torch.Generator().manual_seed(bits)) + torch.linspace(-2, 2, 200)[:, None]
    scale, zero = grid(groups, bits, include_zero)
    codes = encode(groups, scale, zero, bits)
    rounded = decode(codes, scale, zero)
    # half a step, and another half at the ends of the range, from rounding the zero point
    assert ((rounded - groups).abs() <= scale * 1.0001).all()
    inside = (groups > groups.amin(1, keepdim=True) + scale / 2) & (groups < groups.amax(1, keepdim=True) - scale / 2)
    assert ((rounded - groups).abs()[inside] <= (scale.expand_as(groups) / 2 * 1.001 + 1e-6)[inside]).all()
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1
    assert max(len(row.unique()) for row in rounded) <= 2**bits
    if include_zero:
        assert (zero >= 0).all() and (zero <= 2**bits - 1).all()


def test_what_is_on_the_grid_stays():
    codes = torch.randint(0, 16, (50, 16), generator=torch.Generator().manual_seed(0)).float()
    codes[:, 0], codes[:, 1] = 0, 15
    groups = 2.0**-7 * (codes - torch.arange(50)[:, None] % 16)
    scale, zero = grid(groups, 4)
    assert torch.equal(decode(encode(groups, scale, zero, 4), scale, zero), groups)


def test_constant_groups_are_exact():
    groups = torch.tensor([0.0, 0.3, -0.3, 1e-9, -7e4, 123.456])[:, None].repeat(1, 8)
    scale, zero = grid(groups, 4)
    assert torch.equal(decode(encode(groups, scale, zero, 4), scale, zero)[[0, 1, 2, 4, 5]], groups[[0, 1, 2, 4, 5]])
    stored, zero = grid(groups[:3], 4, scale_bits=16)
    torch.testing.assert_close(decode(encode(groups[:3], stored, zero, 4), stored, zero), groups[:3].half().float())


def test_a_narrow_group_far_from_zero_keeps_a_zero_point_that_can_be_stored():
    groups = 5 + torch.linspace(0, 1e-5, 16)[None]
    scale, zero = grid(groups, 4, scale_bits=16)
    assert torch.isfinite(zero).all() and zero.abs().max() < 65504
    torch.testing.assert_close(decode(encode(groups, scale, zero, 4), scale, zero), groups, rtol=1e-3, atol=0)


# 4: the corners of the method


def test_without_sparsity_it_is_rounding_and_without_rounding_it_is_pruning(make):
    rounded, pruned, plain = make(), make(), make()
    apply(rounded, GQSA(sparsity=0, group_size=8, scale_bits=32, **ONE_SHOT))
    applied = apply(pruned, GQSA(sparsity=0.5, group_size=8, wbits=16, saliency="magnitude", **ONE_SHOT))
    for name, layer in linears(plain).items():
        groups = cut(layer.weight.detach(), 8).flatten(0, 1)
        scale, zero = grid(groups, 4)
        expected = decode(encode(groups, scale, zero, 4), scale, zero).view(layer.weight.shape)
        assert torch.equal(linears(rounded)[name].weight, expected)
        scores = means(layer.weight.abs(), 8)
        kept = scores > scores.flatten().sort().values[scores.numel() // 2 - 1]
        assert torch.equal(linears(pruned)[name].weight, layer.weight * spread(kept, 8, layer.weight.shape[1]))
    assert applied.notes["groups_quantised"] == 0 and "recovery_steps" not in applied.notes


# the two stages


@pytest.mark.parametrize("bqpo_input", ["compressed", "dense"])
@pytest.mark.parametrize("compare", ["layer", "global"])
def test_the_stages_keep_the_mask_and_the_second_keeps_the_codes(make, bqpo_input, compare):
    first, both, only = make(), make(), make()
    common = {"group_size": 8, "compare": compare, "saliency": "magnitude", "bqpo_input": bqpo_input} | QUICK
    stage_1 = GQSA(**common, e2e_enable=False)
    stages = GQSA(**common)
    apply(first, stage_1)
    applied = apply(both, stages)
    apply(only, GQSA(**{**common, **ONE_SHOT}))
    expected = kept_groups(only, 8)[1]
    for model in (first, both):
        for name, kept in kept_groups(model, 8)[1].items():
            assert torch.equal(kept, expected[name])
    for name, grouped in stage_1.progress.layers.items():
        assert torch.equal(grouped.codes, stages.progress.layers[name].codes)
        assert not torch.equal(linears(first)[name].weight, linears(only)[name].weight)
        assert not torch.equal(linears(first)[name].weight, linears(both)[name].weight)
    assert applied.notes["reconstruction_mse_after"] < applied.notes["reconstruction_mse_before"]
    assert applied.notes["recovery_steps"] == 3 * 3 + 3


def test_the_seed_decides_everything(make):
    found = []
    for seed in (0, 0, 1):
        model = make()
        apply(model, GQSA(group_size=8, **QUICK), seed)
        found.append(audits.fingerprint(model))
    assert found[0] == found[1] != found[2]


def test_gradients_stop_at_the_ends_of_the_range():
    grouped = Grouped(random_weight(8, 2, 8), torch.ones(2, 2, dtype=torch.bool), 4, 4)
    with torch.no_grad():
        grouped.values[0, 0] = 100.0
    grouped(torch.empty(0)).sum().backward()
    assert grouped.values.grad[0, 0] == 0
    torch.testing.assert_close(grouped.values.grad[1], torch.ones(4))
    assert grouped.scale.grad.abs().sum() > 0


def test_a_bfloat16_model_keeps_its_format_and_its_zeros(make):
    model = make().bfloat16()
    applied = apply(model, GQSA(group_size=8, **QUICK))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not audits.count(model, applied).missed


def test_each_stage_lowers_the_perplexity_of_a_trained_model():
    loaded, windows = Ladder(rung="tiny_100k").load(), known_text()
    losses = {}
    for name, options in {
        "one-shot": ONE_SHOT,
        "bqpo": {"e2e_enable": False, "bqpo_epochs": 3, "bqpo_lr_w": 1e-2, "bqpo_lr_q": 1e-3},
        "e2e": {"bqpo_epochs": 3, "bqpo_lr_w": 1e-2, "bqpo_lr_q": 1e-3, "e2e_lr": 1e-3, "e2e_epochs": 2},
    }.items():
        model = Ladder(rung="tiny_100k").load()
        walk.apply([("gqsa", GQSA(**options))], Surroundings(model, lambda: windows[:16], 0))
        losses[name] = loss_of(model.model, windows[16:])
    assert loss_of(loaded.model, windows[16:]) < losses["e2e"] < losses["bqpo"] < losses["one-shot"]


def known_text():
    """32 sequences of 96 tokens of the text that the model knows."""
    loaded = Ladder(rung="tiny_100k").load()
    return Kjv(nsamples=32, seqlen=96).windows(loaded.tokenizer, 1024, 0)


@torch.no_grad()
def loss_of(model, windows):
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


# sharing out


@pytest.mark.parametrize("workers", [1, 3, 7, 132])
@pytest.mark.parametrize("level", [0.1, 0.5, 0.95])
def test_equal_chunks_are_never_worse_than_rows(workers, level):
    for seed in range(20):
        kept = torch.rand(64, 16, generator=torch.Generator().manual_seed(seed)) > level
        load = Load.of(kept, workers)
        assert load.mean <= load.tasks <= load.rows
        assert load.tasks / load.mean <= 1 + workers / max(1, int(kept.sum()))
    assert Load.of(torch.zeros(5, 2, dtype=torch.bool), workers).rows == 0


def test_rows_that_lose_the_same_are_in_balance():
    kept = torch.zeros(12, 8, dtype=torch.bool)
    kept[:, :4] = True
    assert Load.of(kept, 4) == Load(12.0, 12.0, 12.0)
    kept[:3] = True  # the first worker's rows are full
    assert Load.of(kept, 4).rows == 24


# what it refuses


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("method.gqsa.group_size=64 model=tiny_100k", "method.gqsa.group_size=64: larger than the 48 inputs"),
        ("method.gqsa.group_size=32 method.gqsa.remainder=refuse model=tiny_100k", "32: does not divide the 48"),
        ("method.gqsa.group_size=2", "method.gqsa.group_size=2: must be a whole number >= 4"),
        ("method.gqsa.wbits=9", "method.gqsa.wbits=9: not a choice"),
        ("method.gqsa.wbits=1", "method.gqsa.wbits=1: not a choice"),
        ("method.gqsa.saliency=taylor", "method.gqsa.saliency=taylor: not a choice"),
        ("method.gqsa.kernel_workers=0", "method.gqsa.kernel_workers=0: must be a whole number >= 1"),
        ("sparsity=1", "sparsity=1"),
        ("pattern=2:4 model=tiny_100k", "pattern=2:4: not a choice"),
        ("method.gqsa.compare=global method.gqsa.allocation=erk model=tiny_100k", "allocation=erk: compare=global"),
        ("method=[gqsa,perp] model=tiny_100k", "method=[gqsa,perp]: gqsa recovers by itself"),
        ("method=[gqsa,wanda]", "method=[gqsa,wanda]: both select"),
    ],
)
def test_bad_input_is_one_line_and_nothing_starts(command, words, reason):
    words = words if "method=" in words else f"method=gqsa {words}"
    answer = command(*words.split(), "calibration.nsamples=2", "calibration.seqlen=16")
    assert answer.code == 2 and reason in answer.err and len(answer.err.strip().splitlines()) == 1
    assert not answer.records


def test_a_run_records_bits_imbalance_and_its_kernel(command):
    answer = command(
        *"method=gqsa model=tiny_100k calibration.nsamples=2 calibration.seqlen=32 kernel=auto".split(),
        *"method.gqsa.e2e_lr=1e-3 task=perplexity task.windows=2 task.context=64 threads=1".split(),
    )
    assert answer.code == 0, answer.err
    (record,) = answer.records
    assert record["status"] == "ok" and record["achieved"] == 0.5 and not record["flagged"]
    assert 3 < record["bits_per_weight"] < 4.5 and record["bytes_format"] == "4-bit groups"
    assert record["imbalance_tasks"] <= record["imbalance_rows"]
    assert record["kernel_layers"] == 14 and record["kernel_error"] < 1e-4 and record["latency"] == "measured"


def test_sixteen_bits_leave_nothing_for_the_second_stage(make):
    applied = apply(make(), GQSA(wbits=16, group_size=8, **QUICK))
    assert applied.warnings == ["gqsa: stage 2 trains nothing, 16-bit weights have no scales"]


def test_a_hessian_that_cannot_be_inverted_is_told_of():
    layer = layer_of(random_weight(9), hessian_of(torch.eye(8)))
    layer.statistic.value = torch.eye(8) - 0.02 * torch.ones(8, 8).fill_diagonal_(0) * 50
    with pytest.raises(UserError, match=r"^method\.gqsa\.percdamp=0\.001: "):
        GQSA(group_size=4, percdamp=0.001).select(layer)
    layer.statistic.value[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"^method=gqsa: .* not finite"):
        GQSA(group_size=4).select(layer)
