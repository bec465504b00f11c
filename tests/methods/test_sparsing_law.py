"""CETT by hand, its pitfalls, and the metrics of Sparsing Law as sparsifiers of small models."""

from __future__ import annotations

import math

import pytest
import torch
from gated_models import llama
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebench.errors import UserError
from sparsebench.methods.activations import apply, check
from sparsebench.methods.activations.cett import Neurons, Probe, Search, WeakNeurons, bisect, common_cett, cut
from sparsebench.methods.activations.sites import gated_blocks
from sparsebench.methods.activations.sparsing_law import LargestGates, SparsingLaw
from sparsebench.methods.base import Surroundings
from sparsebench.models.base import LoadedModel

WINDOWS = torch.randint(2, 64, (4, 32), generator=torch.Generator().manual_seed(1))
TOL = 1e-4  # fewer steps of the bisection


@pytest.fixture(scope="module")
def silu():
    return llama(hidden=48, intermediate=96)


@pytest.fixture(scope="module")
def relu():
    return llama(hidden=48, intermediate=96, hidden_act="relu")


def fitted(model, method):
    loaded = LoadedModel(model, None, "toy", 64)
    return apply([("sparsing_law", method)], Surroundings(loaded, lambda: WINDOWS, 0)).attachments[0]


@torch.no_grad()
def run(model, **options):
    one = fitted(model, SparsingLaw(tol=TOL, **options))
    with one.attached():
        found = model(input_ids=WINDOWS).logits
    return found, one.counted()


def test_cett_by_hand():
    neurons = Neurons(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.eye(2))
    assert neurons.cett(3.0) == pytest.approx((3 / 5 + 2 / 2) / 2)  # a mean of ratios, not a ratio of means
    assert neurons.cett(4.0) == 1 and neurons.cett(-1.0) == 0


def test_column_norms_scale_the_magnitude():
    neurons = Neurons(torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
    assert neurons.magnitude.tolist() == [[5, 1]]
    assert torch.equal(cut(2.0, neurons.norms), torch.tensor([0.4, 2.0]))


def test_a_token_without_output_loses_nothing():
    neurons = Neurons(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.eye(2))
    assert neurons.cett(0.5) == 0 and neurons.cett(2.0) == 0.5
    assert math.isfinite(neurons.threshold(0.1))


def test_the_search_does_not_wrap_around():
    """Every threshold loses more than is asked: the smallest one, not the last of the grid."""
    neurons = Neurons(torch.tensor([[1.0, 1.0], [1.0, 2.0]]), torch.eye(2), Search(grid=64))
    assert neurons.threshold(0.0) == float(neurons.grid[0]) == 1.0
    assert neurons.threshold(1.0) == float(neurons.grid[-2])


def test_columns_without_norm_are_dropped_and_equality_is_kept(silu):
    block = gated_blocks(llama(hidden=8, intermediate=4, heads=2))[0]
    block.linears["down"].module.weight.data = torch.eye(8)[:, :4] * torch.tensor([1.0, 1.0, 1.0, 0.0])
    x = torch.tensor([[[0.5, 0.25, -0.5, 9.0]]])
    assert WeakNeurons(block, 0.5)(x)[1].tolist() == [[[True, False, True, False]]]
    assert WeakNeurons(block, 0.0)(x * 0)[1].tolist() == [[[True, True, True, False]]]  # 0 < 0 is false


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 0.9))
def test_a_threshold_holds_its_error_and_the_next_one_does_not(seed, target):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(12, 10, generator=generator)
    neurons = Neurons(hidden, torch.randn(6, 10, generator=generator), Search(grid=512, hi_quantile=1.0))
    threshold = neurons.threshold(target)
    at = int((neurons.grid == threshold).nonzero()[0])
    assert at == 0 or neurons.cett(threshold) <= target
    # the search takes the error for rising; where it is, the next threshold loses too much
    errors = [neurons.cett(float(t)) for t in neurons.grid[: at + 2]]
    if errors == sorted(errors) and at + 2 < len(neurons.grid):
        assert errors[-1] > target


def test_bisection_ends_beside_the_jump():
    assert bisect(lambda x: float(x >= 0.3), 0.5, 1e-6) == pytest.approx(0.3, abs=1e-6)
    assert bisect(lambda x: 0.0, 0.5, 1e-3) > 0.999 and bisect(lambda x: 1.0, 0.5, 1e-3) < 1e-3


@pytest.mark.parametrize("metric", ["cett", "fat", "topk"])
def test_sparsity_is_solved_for(silu, metric):
    _, counted = run(silu, metric=metric, sparsity=0.6)
    assert counted.achieved == pytest.approx(0.6, abs=0.01) == counted.columns["activation_sparsity"]
    assert counted.columns["activation_ratio"] == pytest.approx(0.4, abs=0.01)
    assert counted.columns["ppl_ratio"] > 0 and not counted.warnings
    spared = {row["layer"].rsplit(".", 1)[-1] for row in counted.rows}
    assert spared == ({"down_proj"} if metric == "cett" else {"up_proj", "down_proj"})
    assert ("cett_realised" in counted.columns) == (metric == "cett")


@pytest.mark.parametrize("metric", ["cett", "topk"])
def test_nothing_asked_is_the_dense_model(silu, metric):
    found, counted = run(silu, metric=metric, sparsity=0.0)
    with torch.no_grad():
        assert torch.equal(found, silu(input_ids=WINDOWS).logits)
    assert counted.achieved == 0 and counted.columns["ppl_ratio"] == 1


def test_more_error_is_fewer_neurons(silu):
    found = [run(silu, cett=cett)[1] for cett in (0.05, 0.2, 0.5)]
    assert found[0].achieved < found[1].achieved < found[2].achieved
    assert [one.columns["cett"] for one in found] == [0.05, 0.2, 0.5]
    # the first layer sees the dense model's activations, later ones what is left: errors compound
    assert found[1].columns["cett_realised"] == pytest.approx(0.2, abs=0.05)


def test_pplp_finds_its_ratio_and_falls_with_p(silu):
    probe = Probe(silu, WINDOWS)
    means = []
    for p in (0.01, 0.05):
        cett = common_cett([probe], p, TOL)
        reached = probe.run(probe.gates(cett))
        assert 1 + p - 0.01 <= reached.ratio <= 1 + p + 0.01
        means.append(reached.mean)
        counted = run(silu, metric="pplp", p=p)[1]
        assert counted.columns["cett"] == cett and counted.achieved == pytest.approx(1 - reached.mean)
    assert means[0] >= means[1]
    both = common_cett([probe, probe], 0.01, TOL)
    assert both == common_cett([probe], 0.01, TOL)


def test_relu_drops_zeros_alone(relu, silu):
    found, counted = run(relu, metric="relu")
    with torch.no_grad():
        torch.testing.assert_close(found, relu(input_ids=WINDOWS).logits)
    assert 0.3 < counted.achieved < 0.7 and counted.columns["ppl_ratio"] == pytest.approx(1, abs=1e-6)
    assert run(relu, metric="fat", fat_eps=0.0)[1].achieved == counted.achieved
    assert run(relu, metric="topk", topk_ratio=1.0)[1].achieved == pytest.approx(counted.achieved)
    with pytest.raises(UserError, match=r"^method\.sparsing_law\.metric=relu: the MLP's SiLU[^\n]*$"):
        check([("sparsing_law", SparsingLaw(metric="relu"))], silu)


def test_any_activation_function():
    model = llama(hidden=48, intermediate=96, hidden_act="gelu_pytorch_tanh")
    assert run(model, sparsity=0.5)[1].achieved == pytest.approx(0.5, abs=0.01)


def test_top_k_by_hand(silu):
    block = gated_blocks(silu)[0]
    x = torch.tensor([[[1.0, -9.0, 0.0, 8.0], [2.0, 3.0, 0.0, 4.0]]])
    assert LargestGates(block, 0.5, False)(x)[1].tolist() == [[[False, True, False, True], [False, True, False, True]]]
    assert LargestGates(block, 0.25, True)(x)[1].tolist() == [
        [[False, True, False, False], [False, False, False, True]]
    ]
    assert LargestGates(block, 1.0, True)(x)[1].sum() == 6  # zeros are never active
    together = LargestGates(block, 0.5, False)(torch.cat([x, 100 * x]))[1]
    assert torch.equal(together[0], together[1])  # a sequence does not depend on its batch


def test_a_level_out_of_reach_is_said(silu):
    _, counted = run(silu, sparsity=0.95, hi_quantile=0.5)
    assert counted.warnings and counted.warnings[0].startswith("asked sparsity 0.95, found 0.")


@pytest.mark.parametrize(("options", "says"), [
    ({"metric": "fat", "p": 0.01}, r"method\.sparsing_law\.p=0\.01: goes with metric=pplp, not fat"),
    ({"metric": "pplp", "cett": 0.1}, r"method\.sparsing_law\.cett=0\.1: goes with metric=cett, not pplp"),
    ({"metric": "relu", "topk_ratio": 0.1}, r"method\.sparsing_law\.topk_ratio=0\.1: goes with metric=topk, not relu"),
    ({"metric": "pplp"}, r"method\.sparsing_law\.metric=pplp: its level is p[^\n]*p=0\.01[^\n]*"),
])  # fmt: skip
def test_levels_belong_to_metrics(silu, options, says):
    with pytest.raises(UserError, match=rf"^{says}$"):
        check([("sparsing_law", SparsingLaw(**options))], silu)


def test_what_was_fitted_is_read_back_for_the_same_level_only(silu, tmp_path):
    from safetensors.torch import save_file

    one = fitted(silu, SparsingLaw(metric="pplp", p=0.05, tol=TOL))
    file = tmp_path / "fitted.safetensors"
    save_file(one.fitted(), file)
    again = fitted(silu, SparsingLaw(metric="pplp", p=0.05, tol=TOL, fitted_from=str(file)))
    assert all(torch.equal(again.fitted()[name], value) for name, value in one.fitted().items())
    with pytest.raises(UserError, match=r"^method\.sparsing_law\.fitted_from=[^\n]*lacks pplp\.p\.0\.01\.found[^\n]*$"):
        check([("sparsing_law", SparsingLaw(metric="pplp", p=0.01, tol=TOL, fitted_from=str(file)))], silu)
