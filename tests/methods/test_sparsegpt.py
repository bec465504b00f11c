"""SparseGPT: the pseudo-code in plain loops, what the update must achieve, and every way out of a bad Hessian."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from weight_models import WINDOWS, linears, masks_of, prune

from sparsebench import audits
from sparsebench.errors import UserError
from sparsebench.methods.weights import walk
from sparsebench.methods.weights.base import Layer
from sparsebench.methods.weights.hessian import Hessian
from sparsebench.methods.weights.magnitude import Magnitude
from sparsebench.methods.weights.masks import keep_above_threshold
from sparsebench.methods.weights.sparsegpt import Grid, SparseGPT
from sparsebench.methods.weights.statistics import InputNorm
from sparsebench.methods.weights.wanda import Wanda

TOGETHER = [(0, 5, 1.0), (1, 3, 100.0), (2, 8, 0.01)]  # layers that share their inputs: seed, rows, scale
LEVELS = [{"sparsity": 0.3}, {"sparsity": 0.6}, {"pattern": "2:4"}, {"pattern": "1:4"}]


def layer_of(weight, statistic):
    module = nn.Linear(1, 1, bias=False)
    module.weight = nn.Parameter(weight)
    return Layer("layer", module, statistic)


def random_layer(seed, rows, columns, tokens=400):
    """A weight, and inputs (tokens, in) that are correlated and of unequal scale, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    shared = torch.randn(tokens, columns // 4 + 1, generator=generator)
    mixed = shared @ torch.randn(columns // 4 + 1, columns, generator=generator) / (columns // 4 + 1) ** 0.5
    own = torch.randn(tokens, columns, generator=generator) / 2
    return weight, (mixed + own) * torch.exp(torch.randn(columns, generator=generator))


def gathered(inputs, kind=Hessian):
    statistic = kind()
    statistic.add(inputs[None], 1)
    return statistic


def naive(weight, hessian, method):
    """The pseudo-code of the released code, one row and column at a time, in float64."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    rows, columns = weight.shape
    dead = hessian.diag() == 0
    hessian[dead, dead] = 1
    if method.wbits < 16:
        low, high = weight.amin(dim=1).clamp(max=0), weight.amax(dim=1).clamp(min=0)
        scale = (high - low) / (2**method.wbits - 1)
        zero = torch.round(-low / scale)
    weight[:, dead] = 0
    hessian += method.percdamp * hessian.diag().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    kept, group = method.n_of_m or (0, 0)
    for start in range(0, columns, method.blocksize):
        end = min(start + method.blocksize, columns)
        pruned = torch.zeros(rows, columns, dtype=torch.bool)
        if not group:
            score = weight[:, start:end] ** 2 / upper.diag()[start:end] ** 2
            threshold = sorted(score.flatten().tolist())[int(score.numel() * method.level)]
            pruned[:, start:end] = score <= threshold
        for j in range(start, end):
            if group and (j - start) % group == 0:
                for row in range(rows):
                    saliency = [float((weight[row, k] / upper[k, k]) ** 2) for k in range(j, j + group)]
                    for k in sorted(range(group), key=saliency.__getitem__)[: group - kept]:
                        pruned[row, j + k] = True
            for row in range(rows):
                value = 0.0 if pruned[row, j] else float(weight[row, j])
                if method.wbits < 16:
                    step = torch.clamp(torch.round(value / scale[row]) + zero[row], 0, 2**method.wbits - 1)
                    value = float(scale[row] * (step - zero[row]))
                error = (weight[row, j] - value) / upper[j, j]
                weight[row, j:] -= error * upper[j, j:]
                weight[row, j] = value
    return weight.float()


def lost(weight, updated, inputs):
    """|| (W - W') X ||_F"""
    return float(((weight - updated) @ inputs.t()).norm())


# the algorithm


@pytest.mark.parametrize(("rows", "columns", "blocksize"), [(5, 12, 128), (7, 40, 16), (6, 36, 8), (4, 76, 32)])
@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("wbits", [16, 3])
def test_it_is_the_pseudo_code_column_by_column(rows, columns, blocksize, level, wbits):
    weight, inputs = random_layer(rows * columns, rows, columns)
    method = SparseGPT(**level, blocksize=blocksize, wbits=wbits)
    hessian = gathered(inputs)
    mask, updated = method.solve(layer_of(weight, hessian))
    expected = naive(weight, hessian.value, method)
    assert torch.equal(mask, expected != 0)
    torch.testing.assert_close(updated, expected, rtol=1e-4, atol=1e-4)


def test_a_block_of_one_column_and_of_all_columns():
    weight, inputs = random_layer(3, 10, 30)
    for blocksize in (1, 30, 500):
        method = SparseGPT(sparsity=0.4, blocksize=blocksize)
        hessian = gathered(inputs)
        mask, updated = method.solve(layer_of(weight, hessian))
        torch.testing.assert_close(updated, naive(weight, hessian.value, method), rtol=1e-4, atol=1e-4)
        width = min(blocksize, 30)
        assert all(int((~part).sum()) == int(10 * width * 0.4) + 1 for part in mask.split(width, dim=1))


def test_the_last_weights_are_the_least_squares_solution():
    for seed in range(30):
        weight, inputs = random_layer(seed, 1, 4)
        hessian = gathered(inputs)
        mask, updated = SparseGPT(pattern="2:4").solve(layer_of(weight, hessian))
        damped = hessian.value.double() + 0.01 * hessian.value.diag().mean() * torch.eye(4)
        last = int((~mask[0]).nonzero().max())
        frozen, free = slice(0, last + 1), slice(last + 1, 4)
        error = (weight - updated).double()[0, frozen]
        best = weight.double()[0, free] + torch.linalg.solve(damped[free, free], damped[free, frozen] @ error)
        torch.testing.assert_close(updated.double()[0, free], best, rtol=1e-4, atol=1e-4)


# what the update is for


@pytest.mark.parametrize(
    "level", [{"sparsity": 0.5}, {"sparsity": 0.6}, {"sparsity": 0.7}, {"pattern": "2:4"}], ids=str
)
def test_less_is_lost_than_by_wanda_and_by_magnitude(level):
    for seed in range(5):
        weight, inputs = random_layer(seed, 48, 64)
        updated = SparseGPT(**level).solve(layer_of(weight, gathered(inputs)))[1]
        wanda = weight * Wanda(**level).select(layer_of(weight, gathered(inputs, InputNorm)))
        magnitude = weight * Magnitude(**level).select(layer_of(weight, None))
        assert lost(weight, updated, inputs) < lost(weight, wanda, inputs) < lost(weight, magnitude, inputs)


@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("blocksize", [4, 16, 128])
def test_the_update_is_never_worse_than_none_with_the_same_mask(level, blocksize):
    for seed in range(5):
        weight, inputs = random_layer(seed, 16, 48)
        mask, updated = SparseGPT(**level, blocksize=blocksize).solve(layer_of(weight, gathered(inputs)))
        assert lost(weight, updated, inputs) <= lost(weight, weight * mask, inputs)


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_independent_inputs_give_magnitude_in_every_block_and_no_update(scale):
    weight, _ = random_layer(1, 12, 40)
    mask, updated = SparseGPT(sparsity=0.5, blocksize=16).solve(layer_of(weight, gathered(torch.eye(40) * scale)))
    expected = torch.cat([keep_above_threshold(block.abs(), 0.5) for block in weight.split(16, dim=1)], dim=1)
    assert torch.equal(mask, expected)
    assert torch.equal(updated, weight * mask)
    mask, updated = SparseGPT(pattern="2:4").solve(layer_of(weight, gathered(torch.eye(40) * scale)))
    assert torch.equal(mask, Magnitude(pattern="2:4").select(layer_of(weight, None)))
    assert torch.equal(updated, weight * mask)


# quantisation


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_weights_lie_on_the_grid_of_the_dense_row_and_zero_is_on_it(bits):
    weight, inputs = random_layer(5, 8, 32)
    weight[3] = weight[3].abs()  # its grid begins at 0
    weight[4] = 0
    grid = Grid.of(weight, bits)
    updated = SparseGPT(sparsity=0.5, wbits=bits).solve(layer_of(weight, gathered(inputs)))[1]
    steps = updated / grid.scale + grid.zero
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert float(steps.min()) > -0.5 and float(steps.max()) < 2**bits - 0.5
    assert bool((updated[4] == 0).all()) and bool(torch.isfinite(updated).all())
    assert torch.equal(grid.round(torch.zeros(8, 1)), torch.zeros(8, 1))


def test_more_bits_lose_less():
    weight, inputs = random_layer(6, 24, 32)
    found = [
        lost(weight, SparseGPT(sparsity=0.5, wbits=bits).solve(layer_of(weight, gathered(inputs)))[1], inputs)
        for bits in (2, 4, 8, 16)
    ]
    assert found == sorted(found, reverse=True)


# Hessians that are not as they should be


def test_dead_inputs_lose_their_weights_and_the_record_says_so():
    weight, inputs = random_layer(7, 10, 40)
    inputs[:, [0, 7, 39]] = 0
    layer = layer_of(weight, gathered(inputs))
    mask, updated = SparseGPT(sparsity=0.3, blocksize=16).solve(layer)
    assert not bool(mask[:, [0, 7, 39]].any()) and bool(torch.isfinite(updated).all())
    assert layer.surplus == 0  # they count towards the level
    (warning,) = layer.warnings
    assert "zero in all calibration data" in warning


def test_more_dead_inputs_than_the_level():
    weight, inputs = random_layer(8, 10, 40)
    inputs[:, :20] = 0
    layer = layer_of(weight, gathered(inputs))
    mask, updated = SparseGPT(sparsity=0.3, blocksize=20).solve(layer)
    assert not bool(mask[:, :20].any()) and int((~mask[:, 20:]).sum()) == int(10 * 20 * 0.3) + 1
    assert layer.surplus == 200 - 61
    assert bool(torch.isfinite(updated).all())
    nothing = layer_of(weight, gathered(torch.zeros(3, 40)))
    assert not bool(SparseGPT(sparsity=0.3).solve(nothing)[0].any())


def indefinite(hessian):
    """Smallest eigenvalue about -0.03 of the mean diagonal: five times the damping of 0.01 mends it."""
    value = torch.eye(8)
    value[0, 1] = value[1, 0] = 1.03
    hessian.value, hessian.sequences = value, 1
    return hessian


def test_a_hessian_that_is_not_positive_definite_is_damped_more_and_the_record_says_so():
    layer = layer_of(torch.randn(4, 8), indefinite(Hessian()))
    _, updated = SparseGPT(sparsity=0.5).solve(layer)
    assert bool(torch.isfinite(updated).all())
    assert layer.warnings == ["Hessian not positive definite with percdamp=0.01, damped by 0.05"]
    other = layer_of(torch.randn(4, 8), indefinite(Hessian()))
    SparseGPT(sparsity=0.5, percdamp=0.05).solve(other)
    assert other.warnings == []


@pytest.mark.parametrize("features", [1, 5, 64, 65, 300, 700])
def test_the_factor_is_the_cholesky_factor_of_the_inverse(features):
    inputs = torch.randn(2 * features, features, dtype=torch.float64) * (1 + torch.arange(features) % 7)
    hessian = gathered(inputs.float())
    value = 2 * inputs.t() @ inputs
    torch.testing.assert_close(hessian.value.double(), value, rtol=1e-4, atol=1e-4 * float(value.max()))
    assert torch.equal(hessian.value, hessian.value.t())
    value.diagonal().add_(0.01 * value.diag().mean())
    right = torch.linalg.cholesky(value.inverse(), upper=True)
    factor = hessian.factor(0.01)
    assert torch.equal(factor, factor.triu()) and bool((factor.diag() > 0).all())
    torch.testing.assert_close(factor.double(), right, rtol=1e-3, atol=1e-4 * float(right.max()))


def test_hopeless_hessians_are_refused():
    hopeless = indefinite(Hessian())
    hopeless.value = -torch.eye(8) * 1.0 + 2 * torch.diag(torch.tensor([1.0] * 7 + [0.0]))
    with pytest.raises(UserError, match=r"^method\.sparsegpt\.percdamp=0\.001: .*calibration data"):
        SparseGPT(percdamp=0.001).solve(layer_of(torch.randn(4, 8), hopeless))
    _, inputs = random_layer(9, 4, 8)
    inputs[3, 2] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        SparseGPT().solve(layer_of(torch.randn(4, 8), gathered(inputs)))


class Indefinite(Hessian):
    """Its smallest eigenvalue is about -0.03 of the mean diagonal."""

    def add(self, inputs, sequences):
        super().add(inputs, sequences)
        shift = torch.linalg.eigvalsh(self.value).min() + 0.03 * self.value.diag().mean()
        self.value.diagonal().sub_(shift)


class Unlucky(SparseGPT):
    def statistic(self):
        return Indefinite


def test_the_walk_hands_on_warnings_of_many_layers_as_one_line(make):
    model = make()
    applied = prune(model, Unlucky(sparsity=0.5))
    assert applied.warnings
    assert all(text.startswith("Hessian not positive definite with percdamp=0.01") for text in applied.warnings)
    assert any(": model.layers.0.self_attn.q_proj, " in text and " more" in text for text in applied.warnings)
    assert set(applied.warnings) <= set(audits.findings(model, applied, audits.count(model, applied)))
    assert all(bool(torch.isfinite(layer.weight).all()) for layer in linears(model).values())


# the level that is reached


@pytest.mark.parametrize("blocksize", [16, 128])
@pytest.mark.parametrize("level", [0.1, 0.5, 0.77])
def test_every_block_loses_its_count_and_the_tolerance_is_that_count(make, level, blocksize):
    model = make()
    method = SparseGPT(sparsity=level, blocksize=blocksize)
    applied = prune(model, method)
    counts = total = 0
    for name, mask in masks_of(model).items():
        for part in mask.split(blocksize, dim=1):
            assert int((~part).sum()) == int(part.numel() * level) + 1, name
            counts, total = counts + int(part.numel() * level) + 1, total + part.numel()
    achieved = audits.count(model, applied)
    assert achieved.scope == counts / total and not achieved.missed
    assert applied.tolerance == pytest.approx(counts / total - level, abs=1e-8)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_n_of_m_is_met_exactly(make, pattern):
    model = make()
    applied = prune(model, SparseGPT(pattern=pattern))
    achieved = audits.count(model, applied)
    assert achieved.scope == achieved.asked and applied.tolerance < 1e-8


def test_dead_inputs_beyond_the_level_are_within_the_tolerance(make):
    model = make()
    model.model.layers[1].input_layernorm.weight.data[:24] = 0
    for method in (SparseGPT(sparsity=0.1), SparseGPT(pattern="7:8")):
        achieved = audits.count(model, prune(model, method))
        assert achieved.scope > achieved.asked + 0.01 and not achieved.missed


def test_rounding_to_a_coarse_grid_is_within_the_tolerance(make):
    model = make()
    applied = prune(model, SparseGPT(sparsity=0.3, wbits=2))
    achieved = audits.count(model, applied)
    assert achieved.scope > 0.31 and not achieved.missed


def test_a_remainder_is_left_dense(make):
    model = make()
    achieved = audits.count(model, prune(model, SparseGPT(pattern="2:5", remainder="dense", blocksize=20)))
    assert achieved.scope < achieved.asked and not achieved.missed
    for mask in masks_of(model).values():
        whole = mask.shape[1] // 5 * 5
        assert bool(mask[:, whole:].all())
        assert bool((mask[:, :whole].unflatten(1, (-1, 5)).sum(dim=2) == 2).all())


def test_sparsity_0_leaves_every_bit(make):
    model = make()
    before = audits.fingerprint(model)
    prune(model, SparseGPT(sparsity=0.0))
    assert audits.fingerprint(model) == before


def test_half_precision_stays(make):
    model = make().to(torch.bfloat16)
    applied = prune(model, SparseGPT(sparsity=0.5))
    assert not audits.count(model, applied).missed
    assert all(layer.weight.dtype == torch.bfloat16 for layer in linears(model).values())


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"percdamp": value}, "percdamp") for value in (0.0, -0.01, 1.5, float("nan"))]
    + [({"blocksize": 0}, "blocksize"), ({"wbits": 9}, "wbits"), ({"sparsity": 1.0}, "sparsity")],
    ids=str,
)
def test_values_out_of_range_are_refused(options, reason):
    with pytest.raises(UserError, match=f"^{reason}=") as found:
        SparseGPT(**options)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"pattern": "2:4", "blocksize": 10}, r"method\.sparsegpt\.blocksize=10"),
     ({"sparsity": 0.0, "wbits": 4}, r"method\.sparsegpt\.wbits=4"), ({"pattern": "2:5"}, "pattern=2:5")],
    ids=str,
)  # fmt: skip
def test_options_that_do_not_fit_the_model_are_refused(make, options, reason):
    with pytest.raises(UserError, match=f"^{reason}"):
        walk.check([("sparsegpt", SparseGPT(**options))], make())


# in the walk


def hessians(model, layers):
    """{name: H}, by whole forward passes of one sequence each."""
    found = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}

    def hook(name):
        def look(module, args):
            x = args[0].reshape(-1, module.in_features)
            found[name] += 2 / len(WINDOWS) * x.t() @ x

        return look

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for window in WINDOWS:
            model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("true_sequential", [False, True])
def test_the_walk_is_a_plain_loop_over_whole_forward_passes(make, true_sequential):
    model, reference = make(), make()
    method = SparseGPT(sparsity=0.5, true_sequential=true_sequential)
    prune(model, method)
    parts = (("k_proj", "v_proj", "q_proj"), ("o_proj",), ("up_proj", "gate_proj"), ("down_proj",))
    for block in range(3):
        in_block = {n: m for n, m in linears(reference).items() if n.startswith(f"model.layers.{block}.")}
        stages = [{n: m for n, m in in_block.items() if n.endswith(part)} for part in parts]
        for stage in stages if true_sequential else [in_block]:
            for name, hessian in hessians(reference, stage).items():
                stage[name].weight.data = naive(stage[name].weight.data, hessian, method)
    for name, layer in linears(model).items():
        torch.testing.assert_close(layer.weight, linears(reference)[name].weight, rtol=1e-3, atol=1e-3)


def test_layers_with_one_input_share_one_factor(make, monkeypatch):
    made = []
    cholesky = torch.cholesky_inverse
    monkeypatch.setattr(torch, "cholesky_inverse", lambda lower: made.append(lower) or cholesky(lower))
    prune(make(), SparseGPT(sparsity=0.5))
    assert len(made) == 3 * 4  # q, k and v share one; gate and up share one


@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("wbits", [16, 3])
def test_layers_solved_together_are_layers_solved_alone(level, wbits):
    """Each keeps its own threshold and level, also a level of 0, whatever its neighbours are."""
    inputs = random_layer(3, 4, 40)[1]
    inputs[:, 7] = 0
    statistic = gathered(inputs)
    method = SparseGPT(**level, wbits=wbits, blocksize=16)
    layers = [layer_of(random_layer(seed, rows, 40)[0] * scale, statistic) for seed, rows, scale in TOGETHER]
    for layer, name, its in zip(layers, "qkv", (None, 0.0, 0.75), strict=True):
        layer.name, layer.level = name, None if method.n_of_m else its
    found = method.solve_together(layers)
    together = [(list(layer.warnings), layer.surplus) for layer in layers]
    for layer, (mask, weight), told in zip(layers, found, together, strict=True):
        layer.warnings.clear()
        alone, alone_weight = method.solve(layer)
        assert torch.equal(mask, alone)
        torch.testing.assert_close(weight, alone_weight, rtol=1e-4, atol=1e-5)
        assert told == (layer.warnings, layer.surplus)
