"""Layer-wise levels: the rules, a user's table, and every pruner that honours them."""

from __future__ import annotations

import json
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_models import assert_same_masks, linears, masks_of, prune

from sparsebench import audits
from sparsebench.errors import UserError
from sparsebench.methods.weights import allocation, walk
from sparsebench.methods.weights.magnitude import Magnitude
from sparsebench.methods.weights.random import Random
from sparsebench.methods.weights.sparsegpt import SparseGPT
from sparsebench.methods.weights.wanda import Wanda

PRUNERS = [Magnitude, Random, Wanda, SparseGPT]
SHAPES = st.lists(st.lists(st.integers(1, 60), min_size=2, max_size=4), min_size=1, max_size=6)


def total(shares, shapes):
    return sum(share * prod(shape) for share, shape in zip(shares, shapes, strict=True))


def test_a_small_network_by_hand():
    # raw 0.03 and 0.12; scale = 0.2 * 5500 / (150 + 60)
    assert allocation.er([(50, 100), (10, 50)], 0.2) == pytest.approx([0.15714286, 0.62857143])
    assert allocation.erk([(50, 100), (10, 50)], 0.2) == pytest.approx([0.15714286, 0.62857143])


def test_a_layer_that_would_exceed_density_1_is_dense_and_the_others_are_solved_again():
    first, last = allocation.erk([(50, 100), (10, 50)], 0.5)
    assert last == 1.0 and first == pytest.approx((0.5 * 5500 - 500) / 5000)


@settings(deadline=None, max_examples=150)
@given(
    SHAPES, st.floats(0.001, 1.0), st.sampled_from([allocation.er, allocation.erk]), st.sampled_from([0.5, 1.0, 2.0])
)
def test_densities_are_possible_and_meet_the_total(shapes, density, rule, power):
    found = rule(shapes, density, power)
    assert all(0 < one <= 1 for one in found)
    assert total(found, shapes) == pytest.approx(density * sum(map(prod, shapes)), rel=1e-6)


def test_equal_layers_get_exactly_the_asked_level():
    shapes = dict.fromkeys("abc", (32, 32))
    for rule in ("uniform", "er", "erk"):
        assert allocation.levels(rule, shapes, 0.7) == dict.fromkeys(shapes, 0.7)


def test_uniform_plus_in_both_forms():
    shapes = [(8, 3, 3, 3), (64, 32), (64, 64), (10, 64)]
    sizes = [prod(shape) for shape in shapes]
    assert allocation.uniform_plus(shapes, 0.5) == [1.0, 0.5, 0.5, 0.5]
    reference = allocation.uniform_plus(shapes, 0.1, "reference")
    corrected = allocation.uniform_plus(shapes, 0.1)
    assert (corrected[0], corrected[-1]) == (reference[0], reference[-1]) == (1.0, 0.2)
    assert total(reference, shapes) < total(corrected, shapes) == pytest.approx(0.1 * sum(sizes))
    assert min(allocation.uniform_plus(shapes, 0.01, "reference")) < 0
    with pytest.raises(UserError, match=r"^density=0\.01: too small"):
        allocation.uniform_plus(shapes, 0.01)


# a user's table


def table(tmp_path, content, name="levels.json"):
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(file)


def test_the_first_fitting_pattern_counts_and_the_rest_meets_the_total(tmp_path):
    shapes = {"a.q": (10, 10), "b.q": (10, 10), "a.up": (20, 10), "b.up": (20, 10)}
    yaml = table(tmp_path, "# by sensitivity\n'a.q': 0\n'*.q': 0.25\n", "levels.yaml")
    found = allocation.levels("table", shapes, 0.5, yaml)
    assert found == {"a.q": 0.0, "b.q": 0.25, "a.up": pytest.approx(0.6875), "b.up": pytest.approx(0.6875)}
    assert list(found) == list(shapes)
    assert sum(found[name] * prod(shape) for name, shape in shapes.items()) == pytest.approx(300)
    complete = table(tmp_path, {"*.q": 0.2, "*.up": 0.65})
    assert allocation.levels("table", shapes, 0.5, complete)["b.up"] == 0.65


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"*": 0.7}, "make a total of 0.7, asked is sparsity=0.5"),
        ({"*.q": 0.95, "c.up": 0.9}, "the other layers would need -"),
        ({"*.up": 0.0}, "the other layers would need 1.5"),
        ({"*.qq": 0.3}, "fits no layer in scope, such as a.q"),
        ({"*.q": 1.0}, "must be a number >= 0 and < 1"),
        ({"*.q": "half"}, "must be a number"),
        ({"*.q": True}, "must be a number"),
        ("'*.q': .nan", "must be a number"),
        ([0.5], "must map patterns"),
        ("", "must map patterns"),
        ("a: [", "not valid YAML or JSON"),
        ("\0", "not valid YAML or JSON"),
    ],
    ids=range(12),
)
def test_tables_that_do_not_fit_are_refused_in_one_line(tmp_path, content, reason):
    shapes = {"a.q": (10, 10), "b.q": (10, 10), "a.up": (10, 10), "b.up": (1, 100), "c.up": (2, 100)}
    if content == {"*.up": 0.0}:
        shapes = {"a.q": (10, 10), "a.up": (20, 10)}
    file = table(tmp_path, content)
    with pytest.raises(UserError, match=r"^table=.*levels\.json: ") as found:
        allocation.levels("table", shapes, 0.5, file)
    assert reason in str(found.value) and "\n" not in str(found.value)


def test_a_missing_table_is_refused(make, tmp_path):
    for options, reason in [
        ({"allocation": "table"}, r"allocation=table: name the file with table="),
        ({"allocation": "table", "table": str(tmp_path / "none")}, r"table=.*none: cannot be read \(No such file"),
        ({"allocation": "table", "table": str(tmp_path)}, r"table=.*: cannot be read \(Is a directory"),
        ({"table": "some.yaml"}, r"table=some\.yaml: goes with allocation=table, not uniform"),
    ]:
        with pytest.raises(UserError, match=f"^{reason}"):
            walk.check([("magnitude", Magnitude(**options))], make())


# the pruners


@pytest.mark.parametrize("kind", PRUNERS)
@pytest.mark.parametrize("rule", ["er", "erk", "table"])
def test_every_layer_has_its_own_level_and_the_total_meets_the_request(make, tmp_path, kind, rule):
    more = {"table": table(tmp_path, {"*.v_proj": 0.0, "*down_proj": 0.75})} if rule == "table" else {}
    method = kind(sparsity=0.6, allocation=rule, **more)
    model = make()
    walk.check([("method", method)], model)
    applied = prune(model, method)
    levels = allocation.levels(rule, {n: tuple(m.weight.shape) for n, m in linears(model).items()}, 0.6, method.table)
    assert len(set(levels.values())) > 1
    achieved = audits.count(model, applied)
    assert achieved.asked == pytest.approx(0.6) and not achieved.missed
    for row in achieved.layers:
        assert row["asked"] == levels[row["layer"]]
        assert row["achieved"] == pytest.approx(row["asked"], abs=1 / 32)
    narrow, wide = levels["model.layers.0.self_attn.v_proj"], levels["model.layers.0.mlp.down_proj"]
    assert narrow < wide


def test_the_variant_of_wanda_and_the_exact_count_follow_the_levels(make):
    for method in (
        Wanda(sparsity=0.6, use_variant=True, allocation="erk"),
        Magnitude(sparsity=0.6, exact_count=True, allocation="erk"),
    ):
        model = make()
        achieved = audits.count(model, prune(model, method))
        assert achieved.scope == pytest.approx(0.6, abs=0.01)
        assert len({row["asked"] for row in achieved.layers}) > 1


@pytest.mark.parametrize("kind", PRUNERS)
def test_uniform_is_what_there_is_without_an_allocation(make, kind):
    plain, uniform = make(), make()
    prune(plain, kind(sparsity=0.5))
    prune(uniform, kind(sparsity=0.5, allocation="uniform"))
    assert_same_masks(masks_of(uniform), masks_of(plain))


@pytest.mark.parametrize("kind", PRUNERS)
def test_sparsity_0_leaves_every_layer_under_any_rule(make, kind):
    model = make()
    before = audits.fingerprint(model)
    prune(model, kind(sparsity=0.0, allocation="erk"))
    assert audits.fingerprint(model) == before


@pytest.mark.parametrize("kind", PRUNERS)
def test_patterns_and_global_rankings_take_no_allocation(make, kind):
    options = [{"pattern": "2:4"}] + ([{"group": "global"}] if kind is not SparseGPT else [])
    for one in options:
        with pytest.raises(UserError, match=r"^allocation=erk: "):
            walk.check([("method", kind(allocation="erk", **one))], make())
    with pytest.raises(UserError, match=r"^allocation=erg: not a choice; did you mean"):
        kind(allocation="erg")
