"""Essential sparsity: exact counts of its rankings, the random masks of the paper, and what does not go together."""

from __future__ import annotations

import pytest
import torch
from weight_models import assert_same_masks, linears, masks_of, prune

from sparsebench import audits
from sparsebench.errors import UserError
from sparsebench.methods.weights import allocation, walk
from sparsebench.methods.weights.essential_sparsity import EssentialSparsity
from sparsebench.methods.weights.magnitude import Magnitude

VARIANTS = ["global", "layer", "random", "erk_random"]


def pruned(make, seed=0, **options):
    model = make()
    method = EssentialSparsity(**options)
    walk.check([("essential_sparsity", method)], model)
    return model, audits.count(model, prune(model, method, seed))


@pytest.mark.parametrize("variant", ["global", "random"])
@pytest.mark.parametrize("level", [0.1, 0.33, 0.5, 0.9])
def test_exactly_the_rounded_count_goes(make, variant, level):
    model, achieved = pruned(make, sparsity=level, variant=variant)
    total = sum(layer.weight.numel() for layer in linears(model).values())
    assert sum(row["zeros"] for row in achieved.layers) == round(level * total) and not achieved.missed
    assert len({row["achieved"] for row in achieved.layers}) > 1


def test_global_is_one_ranking_and_layer_one_for_each_matrix(make):
    expected = make()
    prune(expected, Magnitude(sparsity=0.6, group="global"))
    assert_same_masks(masks_of(pruned(make, sparsity=0.6)[0]), masks_of(expected))
    model, achieved = pruned(make, sparsity=0.33, variant="layer")
    before = linears(make())
    for name, mask in masks_of(model).items():
        assert int((~mask).sum()) == round(0.33 * mask.numel())
        assert float(before[name].weight.data.abs()[~mask].max()) <= float(before[name].weight.data.abs()[mask].min())
    assert not achieved.missed


def test_random_masks_follow_the_seed(make):
    for variant in ("random", "erk_random"):
        first, again, other = (masks_of(pruned(make, seed, variant=variant)[0]) for seed in (0, 0, 1))
        assert_same_masks(first, again)
        assert all(not torch.equal(mask, other[name]) for name, mask in first.items())


def test_erk_random_keeps_each_weight_with_the_density_of_its_layer(make):
    model, achieved = pruned(make, sparsity=0.6, variant="erk_random")
    levels = allocation.levels("erk", {n: tuple(m.weight.shape) for n, m in linears(model).items()}, 0.6)
    assert not achieved.missed and achieved.asked == pytest.approx(0.6)
    for row in achieved.layers:
        deviation = (levels[row["layer"]] * (1 - levels[row["layer"]]) / row["total"]) ** 0.5
        assert row["asked"] == levels[row["layer"]]
        assert row["achieved"] == pytest.approx(row["asked"], abs=5 * deviation)


@pytest.mark.parametrize("variant", ["global", "layer"])
def test_n_of_m_is_magnitude_within_the_groups(make, variant):
    expected = make()
    prune(expected, Magnitude(pattern="1:4"))
    assert_same_masks(masks_of(pruned(make, pattern="1:4", variant=variant)[0]), masks_of(expected))


@pytest.mark.parametrize("variant", VARIANTS)
def test_sparsity_0_leaves_every_bit(make, variant):
    model, _ = pruned(make, sparsity=0.0, variant=variant)
    assert audits.fingerprint(model) == audits.fingerprint(make())


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"variant": "random", "pattern": "2:4"}, "method.essential_sparsity.variant=random"),
     ({"variant": "erk_random", "pattern": "2:4"}, "method.essential_sparsity.variant=erk_random"),
     ({"variant": "global", "allocation": "erk"}, "allocation=erk"),
     ({"variant": "random", "allocation": "er"}, "allocation=er"),
     ({"pattern": "2:5"}, "pattern=2:5")],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_together_is_refused(make, options, reason):
    with pytest.raises(UserError, match=f"^{reason}: "):
        pruned(make, **options)
