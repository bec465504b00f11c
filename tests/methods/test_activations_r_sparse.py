"""R-Sparse on small models: the budget, its two ends, recipes and the search."""

from __future__ import annotations

import pytest
import torch
from gated_models import llama

from sparsebench.errors import UserError
from sparsebench.methods.activations import apply, check
from sparsebench.methods.activations.evolution import search, search_in_groups
from sparsebench.methods.activations.low_rank import budget, factors
from sparsebench.methods.activations.r_sparse import RSparse, _nll, places
from sparsebench.methods.activations.sites import gated_blocks
from sparsebench.methods.base import Surroundings
from sparsebench.models.base import LoadedModel

WINDOWS = torch.randint(2, 64, (8, 32), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(model, method):
    loaded = LoadedModel(model, None, "toy", 64)
    one = apply([("r_sparse", method)], Surroundings(loaded, lambda: WINDOWS, 0)).attachments[0]
    with one.attached():
        found = model(input_ids=WINDOWS).logits
    return found, one.counted()


@pytest.fixture(scope="module")
def model():
    return llama(hidden=48, intermediate=96)


def test_the_budget_is_never_exceeded(model):
    for _, linear in places(gated_blocks(model)):
        outputs, inputs = linear.module.weight.shape
        for level in (0.2, 0.5, 0.9):
            for alpha in (0.3, 0.6, 0.9, 1.0):
                found = budget(linear, level, alpha, compat=False, least=0)
                assert found.channels * outputs + found.rank * (inputs + outputs) <= inputs * outputs * (1 - level)


def test_kept_and_dropped_channels_through_a_full_rank_are_the_whole_layer(model):
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    parts = factors(weight, torch.float32)
    torch.testing.assert_close(parts.left @ parts.right.T, weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(parts.scale, weight.norm(dim=0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("alpha", [1.0, 0.8, 0.5, 0.0])
def test_the_level_is_reached_whatever_the_budget_is_spent_on(model, alpha):
    _, counted = run(model, RSparse(sparsity=0.5, alpha=alpha, sparse_tail=1.0, compat=False))
    assert counted.achieved == pytest.approx(0.5, abs=0.05)  # rank alone leaves the weights of one channel unspent
    assert counted.columns["alpha_mean"] == alpha
    assert (counted.columns["activation_sparsity"] == 1) == (alpha == 0)


def test_rank_helps_over_nothing_and_channels_over_rank_alone(model):
    with torch.no_grad():
        dense = model(input_ids=WINDOWS).logits
    far = {a: float((run(model, RSparse(alpha=a, sparse_tail=1.0))[0] - dense).norm()) for a in (0.0, 0.9, 1.0)}
    assert max(far[0.9], far[1.0]) < far[0.0]


def test_the_tail_is_rounded_as_in_the_release():
    assert [RSparse().sparse_tokens(tokens) for tokens in (20, 9, 1)] == [2, 1, 1]
    assert RSparse(sparse_tail=1.0).sparse_tokens(7) == 7
    assert RSparse(sparse_tail=0.0).sparse_tokens(7) == 0


def test_nothing_asked_is_the_dense_model(model):
    found, counted = run(model, RSparse(sparsity=0.0))
    with torch.no_grad():
        torch.testing.assert_close(found, model(input_ids=WINDOWS).logits)
    assert counted.achieved == pytest.approx(0, abs=1e-6)


def test_a_recipe_gives_each_layer_its_own(model, tmp_path):
    file = tmp_path / "recipe.txt"
    file.write_text("\n".join(["1.0 0.5", "0.7 0.5"] * 7), encoding="utf-8")
    _, counted = run(model, RSparse(sparsity=0.5, recipe=str(file)))
    assert counted.columns["alpha_mean"] == pytest.approx(0.85) and counted.columns["alpha_least"] == 0.7
    wrong = [
        ("1.0 0.5 0.7", {}, "pairs of alpha"),
        ("1.0 0.5", {}, "1 pairs of alpha and sparsity; this model has 14"),
        ("1.0 0.5\n" * 14, {"sparsity": 0.6}, r"run it with sparsity=0\.5"),
        ("a b", {}, "not a text file of numbers"),
    ]
    for text, more, reason in wrong:
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=rf"^method\.r_sparse\.recipe=[^\n]*{reason}[^\n]*$"):
            check([("r_sparse", RSparse(recipe=str(file), **more))], model)
    with pytest.raises(UserError, match=r"^method\.r_sparse\.search=true: a recipe was given[^\n]*$"):
        check([("r_sparse", RSparse(recipe=str(file), search=True))], model)


def test_the_search_is_no_worse_than_what_it_starts_from(model):
    settings = {"sparsity": 0.5, "sparse_tail": 1.0, "windows": 4}
    method = RSparse(search=True, population=5, generations=2, alpha=0.9, **settings)
    _, counted = run(model, method)
    assert counted.columns["search_nll"] <= counted.columns["search_nll_channels"]
    loaded = LoadedModel(model, None, "toy", 64)
    uniform = apply([("r", RSparse(alpha=0.9, **settings))], Surroundings(loaded, lambda: WINDOWS, 0)).attachments[0]
    with uniform.attached(), torch.no_grad():
        assert counted.columns["search_nll"] <= _nll(model, WINDOWS[:4]) + 1e-6
    assert run(model, method)[1].columns == counted.columns  # the seed decides


def test_groups_are_searched_one_after_another(model):
    settings = {"sparsity": 0.5, "sparse_tail": 1.0, "windows": 4, "alpha": 0.9}
    method = RSparse(search=True, population=3, generations=2, groups=2, **settings)
    columns = run(model, method)[1].columns
    assert columns["search_nll"] <= columns["search_nll_channels"]
    with pytest.raises(UserError, match=r"^method\.r_sparse\.groups=3: this model has 2 blocks$"):
        check([("r_sparse", RSparse(search=True, groups=3))], model)


def test_a_group_alone_changes_while_it_is_searched():
    seen = []

    def distance(vector):
        seen.append(vector)
        return float((vector - 0.5).abs().sum())

    ones, groups = torch.ones(4, dtype=torch.float64), [torch.tensor([0, 1]), torch.tensor([2, 3])]
    done = []
    best, value = search_in_groups(
        distance, [ones, 0.9 * ones], groups, population=6, generations=3, seed=0, progress=lambda *at: done.append(at)
    )  # fmt: skip
    first = seen[2 : 2 + len(done) // 2]
    assert value == distance(best) < distance(0.9 * ones) and len(done) == 2 * (6 + 2 + 2)
    assert all(torch.equal(one[2:], 0.9 * ones[2:]) for one in first) and any(one[0] != first[0][0] for one in first)
    assert all(at[1] == 36 for at in done)


def test_evolution_finds_a_known_optimum():
    wanted = torch.linspace(0, 1, 6, dtype=torch.float64)
    first = [torch.ones(6, dtype=torch.float64)]

    def distance(vector):
        return float((vector - wanted).square().sum())

    best, value = search(
        distance, first, population=24, generations=30, seed=0, progress=lambda done, total: None
    )  # fmt: skip
    assert value == distance(best) < 0.1 < distance(first[0])
    assert best.min() >= 0 and best.max() <= 1


def test_a_rank_larger_than_the_layer_is_said():
    narrow = llama(hidden=64, intermediate=96, heads=8, kv_heads=1)
    _, counted = run(narrow, RSparse(sparsity=0.3, alpha=0.1))
    (warning,) = counted.warnings
    assert warning.startswith("the budget gives a rank larger than the layer") and "k_proj" in warning
    assert not run(narrow, RSparse(sparsity=0.3, alpha=0.1, compat=False))[1].warnings


def test_from_the_command_line(command, small):
    answer = command(
        "method=r_sparse", "method.r_sparse.alpha=0.9", *small, "calibration.nsamples=8", "calibration.seqlen=32"
    )
    assert answer.code == 0, answer.err
    assert answer.records[0]["achieved"] == pytest.approx(0.5, abs=0.12)
