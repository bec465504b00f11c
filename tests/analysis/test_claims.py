"""The claim schema: what loads, what is refused and how, and which planned runs a claim selects."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebench.analysis.claim_list import load_claims
from sparsebench.analysis.claims import Claim, check_selects
from sparsebench.analysis.expressions import Call, parse
from sparsebench.errors import UserError

WHERE = "sweeps/wanda.yaml: claims"

EXAMPLE = """
- id: wanda.beats_magnitude_50
  paper: wanda
  place: Table 3
  sentence: With half of the weights removed, Wanda keeps a lower perplexity than magnitude pruning.
  select: {model: tiny_1m, model.outliers: true, task: perplexity, task.corpus: kjv, sparsity: 0.5,
           pattern: unstructured}
  left:  nll(method=magnitude)
  relation: ">"
  right: nll(method=wanda)
  margin: 0.0
  for_each: []
  quantifier: all
  unit: samples+seeds
  min: {samples: 30, seeds: 1}
  tags: {tiny_scale: "yes"}
  kind: main
  published: {metric: perplexity, model: LLaMA-7B, left: 17.29, right: 7.26}
"""
COMMON = {
    "model": "tiny_1m",
    "model.outliers": True,
    "task": "perplexity",
    "task.corpus": "kjv",
    "sparsity": 0.5,
    "pattern": "unstructured",
}


def claim(**changes: Any) -> Claim:
    """The worked example with some keys changed (None removes one)."""
    item = {**yaml.safe_load(EXAMPLE)[0], **changes}
    return load_claims([{key: value for key, value in item.items() if value is not None}], WHERE)[0]


def problems(**changes: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        claim(**changes)
    return str(caught.value).split("\n")


def plan(*methods: str, levels: tuple[float, ...] = (0.5,), seeds: tuple[int, ...] = (0,)) -> list[dict[str, Any]]:
    """Planned runs of the example's model and task; dense and magnitude have no seed."""
    points: list[dict[str, Any]] = []
    for method in methods:
        own = {"method": method, **COMMON}
        if method == "dense":
            points.append({k: v for k, v in own.items() if k not in ("sparsity", "pattern")})
        elif method == "magnitude":
            points += [{**own, "sparsity": level, "seed": None} for level in levels]
        else:
            points += [{**own, "sparsity": level, "seed": seed} for level in levels for seed in seeds]
    return points


def test_the_worked_example_loads() -> None:
    assert load_claims(yaml.safe_load(EXAMPLE), WHERE) == [
        Claim(
            id="wanda.beats_magnitude_50",
            paper="wanda",
            place="Table 3",
            sentence="With half of the weights removed, Wanda keeps a lower perplexity than magnitude pruning.",
            left=Call("nll", {"method": "magnitude"}),
            relation=">",
            right=Call("nll", {"method": "wanda"}),
            tiny_scale="yes",
            select=COMMON,
            published={"metric": "perplexity", "model": "LLaMA-7B", "left": 17.29, "right": 7.26},
        )
    ]


def test_no_claims() -> None:
    assert load_claims(None, WHERE) == load_claims([], WHERE) == []


def test_defaults_are_the_example_s() -> None:
    removed: Any = dict.fromkeys(["margin", "for_each", "quantifier", "unit", "min", "kind"])
    assert claim(**removed) == claim()


@pytest.mark.parametrize(("margin", "expected"), [(0.1, (0.1, False)), (2, (2.0, False)), ("5%", (0.05, True))])
def test_margins(margin: Any, expected: tuple[float, bool]) -> None:
    loaded = claim(margin=margin)
    assert (loaded.margin, loaded.margin_relative) == expected


def test_at_least() -> None:
    loaded = claim(
        for_each=["model"], select={"task": "perplexity"}, quantifier={"at_least": 2}, min={"seeds": 3}, right=0.5
    )
    assert (loaded.quantifier, loaded.at_least) == ("at_least", 2)
    assert (loaded.min_samples, loaded.min_seeds) == (30, 3)
    assert loaded.right == parse("0.5", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relaton": ">"}, "relaton: unknown key; did you mean 'relation'?"),
        ({"paper": None}, "paper: missing"),
        ({"tags": None}, "tags: missing"),
        ({"right": None}, "right: missing"),
        ({"left": None}, "left: missing"),
        ({"place": 3}, "place=3: must be a text (put it in quotes)"),
        ({"sentence": " "}, "sentence= : must be a text"),
        ({"id": "beats"}, "id=beats: must be wanda.<what>"),
        ({"id": "teal.beats"}, "id=teal.beats: must be wanda.<what>"),
        ({"id": "wanda.Beats"}, "id=wanda.Beats: must be wanda.<what>"),
        ({"relation": ""}, "relation='': put it in quotes"),
        ({"relation": "=="}, "relation===: not a choice"),
        ({"relation": "monotone"}, "relation=monotone: not a choice; did you mean 'monotone_up'?"),
        ({"relation": ["<"]}, "not a choice"),
        ({"relation": "<>"}, "relation=<>: put it in quotes"),
        ({"margin": -1}, 'margin=-1: must be a number >= 0 in units of the expression, or "5%" of the right side'),
        ({"margin": "five"}, "margin=five: must be a number"),
        ({"margin": True}, "margin=True: must be a number"),
        ({"margin": float("nan")}, "margin=nan: must be a number"),
        ({"margin": 10**400}, "must be a number"),
        ({"for_each": "sparsity"}, "for_each=sparsity: must be a list of keys"),
        ({"for_each": [1]}, "for_each=[1]: must be a list of keys"),
        ({"for_each": ["seed"]}, "never seed"),
        ({"for_each": ["model", "model"], "select": {}}, "every key once"),
        ({"for_each": ["sparsity"]}, "sparsity is fixed in select"),
        ({"for_each": ["method"]}, "no record call leaves all of these keys open"),
        ({"quantifier": "some"}, "quantifier=some: must be all, any, mean or {at_least: k}"),
        ({"quantifier": "at_least"}, "must be all, any, mean or {at_least: k}"),
        ({"quantifier": {"at_least": 0}}, "must be all, any, mean or {at_least: k}"),
        ({"quantifier": {"at_least": True}}, "must be all, any, mean or {at_least: k}"),
        ({"quantifier": "any"}, "quantifier=any: needs for_each"),
        ({"unit": "seed"}, "unit=seed: not a choice; did you mean 'seeds'?"),
        ({"min": 3}, "min=3: must be such as {samples: 30, seeds: 1}"),
        ({"min": {"seed": 3}}, "min.seed: unknown key; did you mean 'seeds'?"),
        ({"min": {"seeds": 0}}, "min.seeds=0: must be a whole number >= 1"),
        ({"tags": {"tiny_scale": True}}, 'tags.tiny_scale=True: YAML reads a bare yes as a boolean: quote it, "yes"'),
        ({"tags": {"tiny_scale": False}}, 'YAML reads a bare no as a boolean: quote it, "no"'),
        ({"tags": {"tiny_scale": "maybe"}}, "tags.tiny_scale=maybe: not a choice"),
        ({"tags": {}}, "tags={}: must be such as"),
        ({"tags": {"tiny_scale": "no", "size": 1}}, "tags.size: unknown key"),
        ({"kind": "minor"}, "kind=minor: not a choice"),
        ({"select": ["model"]}, "select=['model']: must be a mapping"),
        ({"select": {"model": {"outliers": True}}}, "write nested keys with dots"),
        ({"select": {"sparsity": [0.5]}}, "select.sparsity=[0.5]: must be one text, number, true, false or null"),
        ({"select": {1: 2}}, "select.1: a key is a word"),
        ({"published": "7.26"}, "published=7.26: must be a mapping"),
        ({"left": "nll(wanda)"}, "left: character 5 of 'nll(wanda)': nll takes key=value only"),
        ({"left": "1", "right": 2}, "neither side looks at a record"),
        ({"relation": "~"}, "margin=0.0: ~ needs a margin > 0"),
        ({"relation": "monotone_up", "right": None}, "monotone_up needs one key: its axis"),
        ({"relation": "monotone_up", "for_each": ["method.wanda.norm"]}, "monotone_up takes only left"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    found = problems(**changes)
    assert any(message in line for line in found), found
    assert all(line.startswith(f"{WHERE}[0]") for line in found)


def test_a_null_relation_is_an_unquoted_tilde() -> None:
    item = yaml.safe_load(EXAMPLE.replace('">"', "~"))
    with pytest.raises(UserError, match="relation=None: put it in quotes"):
        load_claims(item, WHERE)


def test_all_errors_of_all_claims_at_once() -> None:
    good = yaml.safe_load(EXAMPLE)[0]
    bad = {**deepcopy(good), "id": "wanda.other", "unit": "x", "margin": "y", "right": "1 ** 2"}
    with pytest.raises(UserError) as caught:
        load_claims([good, bad, "text", good], WHERE)
    lines = str(caught.value).split("\n")
    assert len(lines) == 5
    assert {line.split(": ")[1] for line in lines} == {
        "claims[1] (wanda.other)",
        "claims[2]",
        "claims[3] (wanda.beats_magnitude_50)",
    }
    assert "claims[0] has the same id" in lines[-1]


@pytest.mark.parametrize("items", ["text", {"id": "a.b"}, 3])
def test_a_list_is_needed(items: Any) -> None:
    with pytest.raises(UserError, match="must be a list of claims"):
        load_claims(items, WHERE)


_junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(["5%", ">"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=4,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*yaml.safe_load(EXAMPLE)[0], "other"]), _junk, max_size=4))
def test_junk_raises_only_user_errors(changes: dict[str, Any]) -> None:
    try:
        load_claims([{**yaml.safe_load(EXAMPLE)[0], **changes}], WHERE)
    except UserError as error:
        assert all(line.startswith(f"{WHERE}[0]") for line in str(error).split("\n"))


def test_calls_merge_select_values_and_their_own_keys() -> None:
    loaded = claim(
        select={"model": "tiny_1m", "sparsity": 0.5},
        left="acc(method=wanda, sparsity=0.7) - acc(method=wanda, sparsity=0.7)",
        right="acc(method=dense, model__outliers=true)",
        for_each=["task"],
    )
    assert loaded.calls({"task": "copy"}) == [
        {"model": "tiny_1m", "sparsity": 0.7, "task": "copy", "method": "wanda"},
        {"model": "tiny_1m", "sparsity": 0.5, "task": "copy", "method": "dense", "model.outliers": True},
    ]


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in COMMON.items() if key not in keys}


def test_components_are_sorted_and_distinct() -> None:
    loaded = claim(select=without("sparsity"), for_each=["sparsity"])
    points = plan("dense", "wanda", levels=(0.7, 0.3, 0.1 + 0.2), seeds=(0, 1)) + plan("magnitude", levels=(0.7, 0.9))
    assert [x["sparsity"] for x in loaded.components(points)] == pytest.approx([0.3, 0.7, 0.9])
    assert claim().components(points) == [{}]


def test_components_of_methods_leave_out_dense() -> None:
    loaded = claim(select=without("sparsity"), left="nll()", right="nll(method=dense)", for_each=["method", "sparsity"])
    points = plan("dense", "wanda", "magnitude", levels=(0.3, 0.5))
    assert [tuple(x.values()) for x in loaded.components(points)] == [
        ("magnitude", 0.3),
        ("magnitude", 0.5),
        ("wanda", 0.3),
        ("wanda", 0.5),
    ]
    assert check_selects(loaded, points, [0]) == []


def test_one_run_per_seed_is_right() -> None:
    assert check_selects(claim(), plan("magnitude", "wanda", seeds=(0, 1, 2)), [0, 1, 2]) == []


def test_dense_is_found_at_any_sparsity() -> None:
    loaded = claim(right="nll(method=dense)")
    points = plan("dense", "magnitude")
    assert check_selects(loaded, points, [0, 1]) == []
    points[0]["sparsity"] = 0.0
    assert check_selects(loaded, points, range(2)) == []


def test_no_run() -> None:
    assert check_selects(claim(), plan("magnitude"), [0]) == [
        "wanda.beats_magnitude_50: nll(method=wanda): 0 planned runs (the nearest run has method=magnitude)"
    ]
    found = check_selects(claim(), plan("magnitude", "wanda", levels=(0.6,)), [0])
    assert len(found) == 2 and all("(the nearest run has sparsity=0.6)" in line for line in found)
    assert "(the plan is empty)" in check_selects(claim(), [], [0])[0]


def test_a_misspelt_key() -> None:
    found = check_selects(claim(left="nll(method=magnitude, sparcity=0.5)"), plan("magnitude", "wanda"), [0])
    assert found == [
        "wanda.beats_magnitude_50: nll(method=magnitude, sparcity=0.5): 0 planned runs "
        "(no planned run has the key 'sparcity'; did you mean 'sparsity'?)"
    ]


def test_a_missing_seed() -> None:
    found = check_selects(claim(), plan("magnitude", "wanda", seeds=(0, 2)), [0, 1, 2, 3])
    assert found == ["wanda.beats_magnitude_50: nll(method=wanda): 0 planned runs for seed 1, 3"]


def test_several_runs_are_listed_by_what_differs() -> None:
    loaded = claim(select=without("sparsity"))
    found = check_selects(loaded, plan("magnitude", levels=(0.5, 0.7)) + plan("wanda", seeds=(0, 1)), [0, 1])
    assert found == [
        "wanda.beats_magnitude_50: nll(method=magnitude): 2 planned runs for seed 0, one is needed: "
        "(sparsity=0.5) (sparsity=0.7)"
    ]


def test_true_is_not_one_and_a_gap_is_null() -> None:
    points = plan("magnitude", "wanda")
    for point in points:
        point["model.outliers"] = 1
        point["calibration"] = float("nan")
    assert "model.outliers=1" in check_selects(claim(), points, [0])[0]
    loaded = claim(select={**without("model.outliers"), "calibration": None})
    assert check_selects(loaded, points, [0]) == []


def test_a_pinned_seed() -> None:
    points = plan("wanda", seeds=(0, 1, 2))
    loaded = claim(left="nll(method=wanda, seed=0)", right="nll(method=wanda, seed=1)", relation="~", margin=0.1)
    assert check_selects(loaded, points, [0, 1, 2]) == []
    assert "0 planned runs" in check_selects(loaded, points[:1], [0])[0]


def test_drop_needs_its_dense_run() -> None:
    loaded = claim(left="drop(method=wanda)", right=0.1, relation="<")
    assert check_selects(loaded, plan("wanda", "dense"), [0]) == []
    found = check_selects(loaded, plan("wanda"), [0])
    assert len(found) == 1 and "drop(method=wanda), its dense run: 0 planned runs" in found[0]
    several = claim(
        left="drop(method=wanda)", right=0.1, relation="<", select=without("sparsity"), for_each=["sparsity"]
    )
    assert len(check_selects(several, plan("wanda", levels=(0.3, 0.5, 0.7)), [0])) == 1


def test_a_knee_needs_a_curve() -> None:
    loaded = claim(left="knee.hinge(method=wanda)", right=0.4, select=without("sparsity"))
    assert check_selects(loaded, plan("wanda", "dense", levels=(0.3, 0.5, 0.7), seeds=(0, 1)), [0, 1]) == []
    assert "3 or more sparsities" in check_selects(loaded, plan("wanda", "dense", levels=(0.3, 0.5)), [0])[0]
    doubled = plan("wanda", levels=(0.3, 0.5, 0.7)) + plan("wanda", "dense", levels=(0.7,))
    assert "2 planned runs for seed 0" in check_selects(loaded, doubled, [0])[0]


def test_monotone_along_an_axis() -> None:
    loaded = claim(
        left="nll(method=wanda)",
        right=None,
        relation="monotone_up",
        for_each=["sparsity"],
        select=without("sparsity"),
    )
    assert loaded.right is None
    assert check_selects(loaded, plan("wanda", levels=(0.3, 0.5)), [0]) == []
    assert "at least two numbers along sparsity" in check_selects(loaded, plan("wanda"), [0])[0]
    assert "no planned run gives it a value" in check_selects(loaded, plan("magnitude"), [0])[0]


def test_at_least_more_than_there_is() -> None:
    loaded = claim(select=without("sparsity"), for_each=["sparsity"], quantifier={"at_least": 3})
    found = check_selects(loaded, plan("magnitude", "wanda", levels=(0.3, 0.5)), [0])
    assert found == ["wanda.beats_magnitude_50: quantifier at_least 3: only 2 components are planned"]


def test_fitted_constants_select_no_runs() -> None:
    loaded = claim(left="fit.power.alpha", right=0.1, select=None, fit={"x": "parameters", "value": "nll"})
    assert loaded.calls() == [] and check_selects(loaded, [], [0]) == []
