"""TEAL on small models: what is dropped, the greedy allocation, and the command line."""

from __future__ import annotations

import pytest
import torch
from gated_models import llama

from sparsebench.errors import UserError
from sparsebench.methods.activations import apply, check
from sparsebench.methods.activations.quantiles import exact, histogram
from sparsebench.methods.activations.teal import Teal
from sparsebench.methods.base import Surroundings
from sparsebench.models.base import LoadedModel

WINDOWS = torch.randint(2, 64, (8, 32), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(model, method):
    """(logits, what was counted) on the calibration windows themselves."""
    loaded = LoadedModel(model, None, "toy", 64)
    one = apply([("teal", method)], Surroundings(loaded, lambda: WINDOWS, 0)).attachments[0]
    with one.attached():
        found = model(input_ids=WINDOWS).logits
    return found, one.counted()


@pytest.fixture(scope="module")
def model():
    return llama(hidden=48, intermediate=96)


def test_nothing_asked_is_the_dense_model(model):
    for method in (Teal(sparsity=0.0), Teal(sparsity=0.0, mask_by="topk"), Teal(sparsity=0.0, allocation="greedy")):
        found, counted = run(model, method)
        with torch.no_grad():
            assert torch.equal(found, model(input_ids=WINDOWS).logits)
        assert counted.acted and counted.achieved == 0


@pytest.mark.parametrize("level", [0.25, 0.5, 0.8])
def test_the_level_is_reached_and_costs_follow(model, level):
    _, counted = run(model, Teal(sparsity=level, sparse_tail=1.0))
    assert counted.achieved == pytest.approx(level, abs=0.05)
    assert counted.columns["density_linear"] == pytest.approx(1 - counted.achieved)
    shares = counted.saving.linear
    assert len(shares) == 14 and all(share == pytest.approx(1 - level, abs=0.15) for share, _ in shares.values())


def test_masks_by_count_keep_exactly_as_many(model):
    _, counted = run(model, Teal(sparsity=0.5, mask_by="topk"))
    assert counted.achieved == 0.5
    assert {row["achieved"] for row in counted.rows} == {0.5}


def test_more_sparsity_is_further_from_the_dense_model(model):
    with torch.no_grad():
        dense = model(input_ids=WINDOWS).logits
    far = [float((run(model, Teal(sparsity=level))[0] - dense).norm()) for level in (0.25, 0.5, 0.75)]
    assert far == sorted(far) and far[0] > 0
    everywhere = float((run(model, Teal(sparsity=0.5, sparse_tail=1.0))[0] - dense).norm())
    assert everywhere > far[1]


def test_the_greedy_allocation_reaches_the_level_with_a_smaller_error(model):
    _, counted = run(
        model, Teal(sparsity=0.5, allocation="greedy", base_step=0.2, sparse_tail=1.0, mask_by="topk", windows=2)
    )
    assert counted.achieved == pytest.approx(0.5, abs=0.05)
    assert len({row["asked"] for row in counted.rows}) > 2
    assert counted.columns["allocation_error"] < counted.columns["allocation_error_uniform"]


def test_quantiles_of_known_distributions():
    normal = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    assert histogram(normal, 10_000, 0.01).quantile(0.5 + 0.6827 / 2) == pytest.approx(1.0, abs=0.03)
    assert exact(normal.abs()).quantile(0.6827) == pytest.approx(1.0, abs=0.03)
    few = histogram(torch.tensor([1.0, 2.0, 3.0]), 8, 0.01)
    assert few.quantile(2.0) == float(few.values[-1])
    assert exact(torch.tensor([0.0, 0.0, 1.0])).quantile(0.1) == 0.0


def test_projections_are_checked(model):
    with pytest.raises(UserError, match=r"^projections=x: [^\n]*valid: q, k[^\n]*$"):
        check([("teal", Teal(projections=("x",)))], model)
    _, counted = run(model, Teal(projections=("down",), sparsity=0.5))
    assert len(counted.rows) == 2


def test_from_the_command_line(command, small):
    answer = command("method=teal", *small, "calibration.nsamples=8", "calibration.seqlen=32")
    assert answer.code == 0, answer.err
    (record,) = answer.records
    assert record["achieved"] == pytest.approx(0.5, abs=0.05) and record["density_linear"] < 0.6
    assert record["flops_prefill"] < record["flops_prefill_dense"]
    assert record["bytes_decode"] < record["bytes_decode_dense"]
    assert command("method=teal", "method.teal.fitted_from=nowhere", *small).code == 2
