"""Weight methods on a small model: counts, scope, seeds, sparsity 0, outliers, stages of a stack."""

from __future__ import annotations

import pytest
import torch
from weight_models import WINDOWS, assert_same_masks, linears, masks_of, prune

from sparsebench import audits
from sparsebench.errors import UserError
from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights import walk
from sparsebench.methods.weights.base import Layer, WeightMethod
from sparsebench.methods.weights.dense import Dense
from sparsebench.methods.weights.given import Given
from sparsebench.methods.weights.magnitude import Magnitude
from sparsebench.methods.weights.random import Random
from sparsebench.methods.weights.walk import apply, scoped_layers
from sparsebench.methods.weights.wanda import Wanda
from sparsebench.models.base import LoadedModel
from sparsebench.models.outliers import inject_outliers


@pytest.mark.parametrize("kind", [Magnitude, Random, Wanda])
@pytest.mark.parametrize("level", [0.0, 0.37, 0.5, 0.9])
def test_a_global_ranking_prunes_exactly_the_rounded_count(make, kind, level):
    model = make()
    applied = prune(model, kind(sparsity=level, group="global"))
    total = sum(report.total for report in applied.layers)
    assert sum(report.pruned for report in applied.layers) == round(level * total)
    assert not audits.count(model, applied).missed


def test_a_global_ranking_has_one_threshold(make):
    model, before = make(), linears(make())
    prune(model, Magnitude(sparsity=0.5, group="global"))
    masks = masks_of(model)
    gone = max(float(before[name].weight.data.abs()[~masks[name]].max()) for name in masks)
    stay = min(float(before[name].weight.data.abs()[masks[name]].min()) for name in masks)
    assert gone <= stay
    assert len({float(mask.float().mean()) for mask in masks.values()}) > 1


@pytest.mark.parametrize("kind", [Magnitude, Random, Wanda])
def test_every_row_loses_its_count(make, kind):
    model = make()
    assert not audits.count(model, prune(model, kind(sparsity=0.3, group="row"))).missed
    for name, mask in masks_of(model).items():
        assert set((~mask).sum(dim=1).tolist()) == {int(mask.shape[1] * 0.3)}, name


@pytest.mark.parametrize(
    ("method", "more"),
    [(Magnitude(sparsity=0.3), 1), (Magnitude(sparsity=0.3, exact_count=True), 0), (Random(sparsity=0.3), 0),
     (Wanda(sparsity=0.3, group="layer"), 0)],
    ids=["magnitude", "exact_count", "random", "wanda"],
)  # fmt: skip
def test_every_matrix_loses_its_count(make, method, more):
    model = make()
    assert not audits.count(model, prune(model, method)).missed
    for name, mask in masks_of(model).items():
        assert int((~mask).sum()) == int(mask.numel() * 0.3) + more, name


@pytest.mark.parametrize("kind", [Magnitude, Random, Wanda])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_n_is_kept_of_every_m_inputs(make, kind, pattern):
    kept, size = map(int, pattern.split(":"))
    model = make()
    achieved = audits.count(model, prune(model, kind(pattern=pattern)))
    assert achieved.scope == achieved.asked == 1 - kept / size
    for mask in masks_of(model).values():
        assert bool((mask.unflatten(1, (-1, size)).sum(dim=2) == kept).all())


def test_a_remainder_is_refused_or_left_dense(make):
    model = make()
    with pytest.raises(UserError, match=r"^pattern=2:5: 5 does not divide the 32 inputs of model\.layers\.0"):
        walk.check([("magnitude", Magnitude(pattern="2:5"))], model)
    method = Magnitude(pattern="2:5", remainder="dense")
    walk.check([("magnitude", method)], model)
    achieved = audits.count(model, prune(model, method))
    assert achieved.scope < achieved.asked and not achieved.missed
    for mask in masks_of(model).values():
        whole = mask.shape[1] // 5 * 5
        assert bool(mask[:, whole:].all())
        assert bool((mask[:, :whole].unflatten(1, (-1, 5)).sum(dim=2) == 2).all())


def test_options_that_do_not_fit_are_refused(make):
    model = make()
    for method, reason in [
        (Magnitude(pattern="2:4", group="global"), "group=global"),
        (Wanda(use_variant=True, pattern="2:4"), "method.wanda.use_variant"),
        (Wanda(use_variant=True, group="layer"), "method.wanda.use_variant"),
        (Magnitude(include=("*nothing*",)), "include="),
    ]:
        with pytest.raises(UserError, match=reason) as found:
            walk.check([("method", method)], model)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize("kind", [Magnitude, Random, Wanda])
def test_only_the_layers_in_scope_change(make, kind):
    model, before = make(), audits.fingerprint(make())
    applied = prune(model, kind(sparsity=0.5, include=("*self_attn*", "*down_proj"), exclude=("*.0.*", "*v_proj")))
    after = audits.fingerprint(model)
    names = [f"model.layers.{i}.{n}" for i in (1, 2)
             for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")]  # fmt: skip
    assert [report.layer for report in applied.layers] == names
    assert {name for name in after if after[name] != before[name]} == applied.acts_on
    assert applied.acts_on == {f"{name}.weight" for name in names}


# compared within a row, as published: the transform scales whole rows of up_proj, which other groups do see
@pytest.mark.parametrize("level", [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}], ids=str)
def test_outliers_leave_the_masks_of_wanda_and_change_those_of_magnitude(make, level):
    plain, outliers = {}, {}
    for kind in (Wanda, Magnitude):
        for found, inject in ((plain, False), (outliers, True)):
            model = make()
            if inject:
                inject_outliers(model, 1.0)
            prune(model, kind(**level))
            found[kind] = masks_of(model)
    assert_same_masks(outliers[Wanda], plain[Wanda])
    changed = [name for name, mask in plain[Magnitude].items() if not torch.equal(mask, outliers[Magnitude][name])]
    assert all(any(part in name for name in changed) for part in ("q_proj", "gate_proj", "up_proj", "down_proj"))


def test_random_masks_follow_the_seed_and_differ_by_layer(make):
    found = []
    for seed in (0, 0, 1):
        model = make()
        prune(model, Random(sparsity=0.5), seed)
        found.append(masks_of(model))
    assert_same_masks(found[0], found[1])
    assert all(not torch.equal(mask, found[2][name]) for name, mask in found[0].items())
    of_one_shape = [mask for name, mask in found[0].items() if name.endswith(("q_proj", "o_proj"))]
    assert all(not torch.equal(a, b) for i, a in enumerate(of_one_shape) for b in of_one_shape[:i])


def test_magnitude_and_wanda_do_not_depend_on_the_seed(make):
    for kind in (Magnitude, Wanda):
        one, two = make(), make()
        prune(one, kind(sparsity=0.5), 0)
        prune(two, kind(sparsity=0.5), 1)
        assert audits.fingerprint(one) == audits.fingerprint(two)


@pytest.mark.parametrize(
    "method",
    [Dense(), Given(), Magnitude(sparsity=0.0), Random(sparsity=0.0), Magnitude(sparsity=0.0, group="global"),
     Magnitude(sparsity=0.0, exact_count=True), Magnitude(sparsity=0.0, group="row"), Wanda(sparsity=0.0),
     Wanda(sparsity=0.0, use_variant=True), Wanda(sparsity=0.0, group="global"), Wanda(sparsity=0.0, group="layer")],
    ids=range(11),
)  # fmt: skip
def test_sparsity_0_leaves_every_bit(make, method):
    model = make()
    linears(model)["model.layers.0.mlp.up_proj"].weight.data[0, :2] = torch.tensor([0.0, -0.0])
    before = audits.fingerprint(model)
    prune(model, method)
    assert audits.fingerprint(model) == before


def test_given_counts_the_zeros_of_the_checkpoint(make):
    model = make()
    prune(model, Magnitude(sparsity=0.4, group="global"))
    before = audits.fingerprint(model)
    applied = prune(model, Given())
    total = sum(report.total for report in applied.layers)
    assert sum(report.pruned for report in applied.layers) == round(0.4 * total)
    assert audits.fingerprint(model) == before and audits.count(model, applied).asked is None


def test_dead_features_go_first(make):
    model = make()
    dead = [3, 17, 30]
    model.model.layers[1].input_layernorm.weight.data[dead] = 0
    prune(model, Wanda(sparsity=0.1))
    for name in ("q_proj", "k_proj", "v_proj"):
        mask = linears(model)[f"model.layers.1.self_attn.{name}"].weight != 0
        assert not bool(mask[:, dead].any())
        assert int((~mask).sum()) == 3 * mask.shape[0]  # int(32 * 0.1): nothing but the dead columns


@pytest.mark.parametrize("use_variant", [False, True])
def test_no_layer_of_the_variant_or_the_method_is_far_from_its_level(make, use_variant):
    model = make()
    achieved = audits.count(model, prune(model, Wanda(sparsity=0.5, use_variant=use_variant)))
    assert not achieved.missed
    assert all(row["achieved"] == pytest.approx(0.5, abs=0.01) for row in achieved.layers)


# the stages of a stack


class Swaps(WeightMethod):
    """Refines: prunes the largest kept weight of a row instead of its last pruned one."""

    stage = "refine"

    def refine(self, layer, mask):
        mask = mask.clone()
        for row, kept in zip(layer.weight, mask, strict=True):
            largest = int((row.abs() * kept).argmax())
            revived = int((~kept).nonzero()[-1])
            kept[largest], kept[revived] = False, True
        return mask


class Doubles(WeightMethod):
    """Recovers: doubles what is left, and looks at the inputs of the pruned block."""

    stage = "recover"

    def observe(self, run):
        return run()

    def recover(self, block, layers, seen, run):
        assert sum(len(one) for one in seen) == len(WINDOWS)
        assert not any(torch.equal(dense, pruned) for dense, pruned in zip(seen, run(), strict=True))
        for layer in layers:
            layer.weight.mul_(2)


@pytest.mark.parametrize("group", ["row", "global"])
def test_select_refine_and_recover_act_in_turn(make, group):
    model, plain, before = make(), make(), linears(make())
    around = Surroundings(LoadedModel(model, None, "toy", 64), lambda: WINDOWS, 0)
    applied = apply([("wanda", Wanda(group=group)), ("swaps", Swaps()), ("doubles", Doubles())], around)
    prune(plain, Wanda(group=group))
    first = scoped_layers(model, Wanda(), 0)[0][0].name
    assert torch.equal(masks_of(model)[first], Swaps().refine(Layer(first, before[first]), masks_of(plain)[first]))
    for name, mask in masks_of(model).items():
        assert torch.equal(linears(model)[name].weight, before[name].weight * mask * 2)
    assert audits.count(model, applied).scope == pytest.approx(0.5)
