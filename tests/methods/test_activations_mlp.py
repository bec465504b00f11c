"""The methods of the MLP's activations on small models: CATS, exact top-k, statistical top-k."""

from __future__ import annotations

import pytest
import torch
from gated_models import llama

from sparsebench.errors import UserError
from sparsebench.methods.activations import apply, check
from sparsebench.methods.activations.cats import Cats, bin_edges, count_bins, left_edge
from sparsebench.methods.activations.gating import top_k
from sparsebench.methods.activations.sites import gated_blocks
from sparsebench.methods.activations.statistical_topk import StatisticalGate, StatisticalTopK, threshold
from sparsebench.methods.activations.topk import TopK, TopKGate
from sparsebench.methods.base import Surroundings
from sparsebench.models.base import LoadedModel

WINDOWS = torch.randint(2, 64, (8, 32), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(model, method):
    loaded = LoadedModel(model, None, "toy", 64)
    one = apply([("method", method)], Surroundings(loaded, lambda: WINDOWS, 0)).attachments[0]
    with one.attached():
        found = model(input_ids=WINDOWS).logits
    return found, one.counted()


@pytest.fixture(scope="module")
def model():
    return llama(hidden=48, intermediate=96)


@pytest.fixture(scope="module")
def dense(model):
    with torch.no_grad():
        return model(input_ids=WINDOWS).logits


NOTHING = [Cats(sparsity=0.0), Cats(sparsity=0.0, threshold="exact"), TopK(sparsity=0.0), TopK(k=96),
           TopK(k=96, site="hidden"), StatisticalTopK(sparsity=0.0)]  # fmt: skip


@pytest.mark.parametrize("method", NOTHING, ids=str)
def test_nothing_asked_is_the_dense_model(model, dense, method):
    found, counted = run(model, method)
    assert torch.equal(found, dense)
    assert counted.acted and counted.achieved == 0


@pytest.mark.parametrize("level", [0.3, 0.5, 0.7])
def test_cats_reaches_its_level_and_leaves_the_gate_projection_dense(model, level):
    for kind, within in (("histogram", 0.04), ("exact", 0.04)):
        _, counted = run(model, Cats(sparsity=level, threshold=kind))
        assert counted.achieved == pytest.approx(level, abs=within) == counted.columns["activation_sparsity"]
        assert {row["layer"].rsplit(".", 1)[-1] for row in counted.rows} == {"up_proj", "down_proj"}
        mlp, everything = 2 * 96 * 48, 3 * 96 * 48 + 3 * 48 * 48
        assert counted.columns["density_linear"] == pytest.approx(1 - counted.achieved * mlp / everything)
        assert not counted.warnings


def test_cats_warns_where_its_histogram_saturates(model):
    _, counted = run(model, Cats(sparsity=0.9, reach=0.05))
    assert counted.achieved < 0.9
    assert counted.warnings == ["the threshold saturates at the histogram's range of 0.05 in model.layers.0, "
                                "model.layers.1"]  # fmt: skip


def test_the_statistical_estimate_of_the_first_blocks_alone(model):
    _, counted = run(model, StatisticalTopK(sparsity=0.7, blocks=1))
    assert {row["layer"].split(".")[2] for row in counted.rows} == {"0"}
    assert counted.columns["density_linear"] > run(model, StatisticalTopK(sparsity=0.7))[1].columns["density_linear"]
    with pytest.raises(UserError, match=r"^method\.statistical_topk\.blocks=3: this model has 2 blocks$"):
        check([("s", StatisticalTopK(blocks=3))], model)


def test_cats_fine_tunes_under_its_thresholds(tmp_path):
    from safetensors.torch import save_file

    model = llama(hidden=48, intermediate=96)
    pruned = gated_blocks(model)[0].linears["up"].module.weight
    pruned.data[:, ::2] = 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"sparsity": 0.7, "lora_rank": 4, "lr": 0.01, "batch_size": 8, "grad_accum": 1}
    plain = run(model, Cats(sparsity=0.7))[0]
    loaded = LoadedModel(model, None, "toy", 64)
    one = apply([("cats", Cats(finetune_steps=20, **options))], Surroundings(loaded, lambda: WINDOWS, 0)).attachments[0]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with one.attached(), torch.no_grad():
        inside = gated_blocks(model)[0].linears["up"].module.weight
        assert bool((inside[:, ::2] == 0).all()) and not torch.equal(inside, pruned)
        tuned = model(input_ids=WINDOWS).logits
    assert gated_blocks(model)[0].linears["up"].module.weight is pruned
    columns = one.counted().columns
    assert columns["finetune_loss_last"] < columns["finetune_loss_first"] - 0.05
    assert not torch.equal(plain, tuned) and not one.counted().warnings
    file = tmp_path / "fitted.safetensors"
    save_file(one.fitted(), file)
    assert torch.equal(run(model, Cats(finetune_steps=20, fitted_from=str(file), **options))[0], tuned)
    with pytest.raises(UserError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.A"):
        save_file({name: one.fitted()[name] for name in one.fitted() if not name.endswith(".A")}, file)
        check([("cats", Cats(finetune_steps=20, fitted_from=str(file), **options))], model)


def test_the_threshold_is_right_sided():
    edges = bin_edges(999, 1.0)
    values = torch.tensor([0.25, 0.75])
    counts = count_bins(values, edges)
    assert counts.sum() == 2 and counts[0] == 0
    below, above = (float(edges[edges <= value][-1]) for value in values)
    assert left_edge(counts, edges, 0.0) == below  # not -inf
    assert left_edge(counts, edges, 0.5) == above
    assert left_edge(count_bins(torch.tensor([5.0]), edges), edges, 0.5) == pytest.approx(1.0)


def test_top_k_by_hand():
    v = torch.tensor([3, -1, 2, 2.5, 0.5], requires_grad=True)
    a = v.relu()
    kept = a * top_k(a, 2)
    assert kept.tolist() == [3, 0, 0, 2.5, 0]
    assert (a * top_k(a, 4)).tolist() == [3, 0, 2, 2.5, 0.5]
    kept.sum().backward()
    assert v.grad.tolist() == [1, 0, 0, 1, 0]


def test_top_k_never_counts_zeros_as_kept(model):
    gate = TopKGate(gated_blocks(model)[0], None, 3, magnitude=True)
    found, keep = gate(torch.tensor([[[3.0, 0, 0, 2.5, 0]]]))
    assert found.tolist() == [[[3, 0, 0, 2.5, 0]]] and keep.sum() == 2


def test_a_random_relu_layer_is_half_active():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 128, generator=generator)
    a = (x @ torch.randn(128, 4096, generator=generator)).relu()
    assert float((a > 0).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_top_k_keeps_k_of_every_token(model):
    _, counted = run(model, TopK(k=24))
    assert counted.achieved == 0.75
    _, hidden = run(model, TopK(k=24, site="hidden"))
    assert hidden.achieved == 0.75 and len(hidden.rows) == 2
    assert hidden.columns["density_linear"] > counted.columns["density_linear"]
    by_value = run(model, TopK(k=24, rank_by="value"))[0]
    assert not torch.equal(by_value, run(model, TopK(k=24))[0])
    with pytest.raises(UserError, match=r"^method\.topk\.k=97: the MLP has 96[^\n]*$"):
        check([("topk", TopK(k=97))], model)


def test_the_estimate_is_close_on_gaussian_scores():
    x = torch.randn(16, 4096, generator=torch.Generator().manual_seed(0))
    for sparsity in (0.5, 0.92):
        count = (x > threshold(x, sparsity)).sum(dim=-1).float()
        assert ((count / (4096 * (1 - sparsity)) - 1).abs() < 0.1).all()
        assert float(count.mean()) == pytest.approx(4096 * (1 - sparsity), rel=0.05)
    soft = (x - threshold(x, 0.9)).relu()
    torch.testing.assert_close((x + 3 - threshold(x + 3, 0.9)).relu(), soft, atol=1e-4, rtol=0)
    torch.testing.assert_close((2 * x - threshold(2 * x, 0.9)).relu(), 2 * soft, atol=1e-4, rtol=0)


def test_the_operator_has_the_right_gradient(model):
    gate = StatisticalGate(gated_blocks(model)[0], 0.6, True, False)
    x = torch.randn(1, 1, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def soft(values):
        cut = values.mean(-1, keepdim=True) + values.std(-1, keepdim=True, unbiased=False) * 0.2533471031357997
        return (values - cut).relu()

    assert torch.autograd.gradcheck(soft, (x,))
    (found,) = torch.autograd.grad(gate(x.float())[0].square().sum(), x)
    (wanted,) = torch.autograd.grad(soft(x).square().sum(), x)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_the_record_has_the_distance_from_the_exact_top_k(model):
    _, counted = run(model, StatisticalTopK(sparsity=0.7, soft=False))
    assert counted.achieved == pytest.approx(0.7, abs=0.1)
    columns = counted.columns
    assert 0 < columns["topk_count_error"] < 0.5
    assert 0.5 < columns["topk_recall"] < 1
    assert 0 < columns["topk_output_error"] < 0.5
    again = run(model, StatisticalTopK(sparsity=0.7, soft=True))[1].columns
    assert again["topk_count_error"] > 0  # another first context counts anew
    assert run(model, StatisticalTopK(sparsity=0.7, unbiased_std=True))[1].achieved != counted.achieved


@pytest.mark.parametrize("method", ["cats", "topk", "statistical_topk"])
def test_from_the_command_line(command, small, method):
    answer = command(f"method={method}", "sparsity=0.6", *small, "calibration.nsamples=8", "calibration.seqlen=32")
    assert answer.code == 0, answer.err
    assert answer.records[0]["achieved"] == pytest.approx(0.6, abs=0.1)
    assert answer.records[0]["density_linear"] < 1
