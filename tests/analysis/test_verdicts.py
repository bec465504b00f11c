"""Verdicts: the worked examples through records and claims, quantifiers, and every way to be untested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import exp
from typing import Any

import numpy
import pytest
from claim_examples import correct_a, correct_b, correct_sparse, equivalent, nll_of_magnitude, nll_of_wanda

from sparsebench.analysis.claim_list import load_claims
from sparsebench.analysis.claims import Claim
from sparsebench.analysis.expressions import parse
from sparsebench.analysis.leaves import evaluated
from sparsebench.analysis.measures import Evidence
from sparsebench.analysis.statistics import Array
from sparsebench.analysis.verdicts import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, UNTESTED, Verdict, judge, test

test.__test__ = False  # type: ignore[attr-defined]  # a function under test, not a test

BETTER = {"perplexity": "lower", "accuracy": "higher"}


def claim(left: str, relation: str, right: Any = None, **changes: Any) -> Claim:
    item = {
        "id": "wanda.example", "paper": "wanda", "place": "Table 3", "sentence": "A sentence.",
        "select": {"model": "tiny_1m"}, "left": left, "relation": relation, "right": right,
        "tags": {"tiny_scale": "yes"},
    }  # fmt: skip
    item |= changes
    return load_claims([{key: value for key, value in item.items() if value is not None}], "claims")[0]


class Lab:
    """Makes runs: points, their records and their per-sample rows."""

    def __init__(self) -> None:
        self.points: list[dict[str, Any]] = []
        self.records: dict[str, dict[str, Any]] = {}
        self.samples: dict[str, list[dict[str, Any]]] = {}
        self.trouble: dict[str, str] = {}

    def add(self, method: str, outcomes: Array | Sequence[float], task: str = "perplexity", **columns: Any) -> str:
        """The runs of one method: ``outcomes`` (seeds, samples), or (samples,) of a run without a seed."""
        values = numpy.asarray(outcomes, float)
        seeds: list[Any] = [None] if values.ndim == 1 else list(range(len(values)))
        run_id = ""
        for seed, row in zip(seeds, numpy.atleast_2d(values), strict=True):
            run_id = f"run{len(self.points)}"
            level = {} if method == "dense" else {"sparsity": 0.5}
            point = {"method": method, "model": "tiny_1m", "task": task, **level, "seed": seed, **columns}
            self.points.append({**point, "run_id": run_id})
            nll = task == "perplexity"
            score = {"perplexity": exp(row.mean()), "nll": row.mean()} if nll else {"accuracy": row.mean()}
            metric = "perplexity" if nll else "accuracy"
            self.records[run_id] = {
                "run_id": run_id, "status": "ok", "metric": metric, "achieved": point.get("sparsity"), **point, **score
            }  # fmt: skip
            column = "nll" if nll else "correct"
            self.samples[run_id] = [{"sample": f"document/{k}", column: x} for k, x in enumerate(row.tolist())]
        return run_id

    def evidence(self) -> Evidence:
        return Evidence(self.points, self.records, self.samples, BETTER, {}, self.trouble)

    def verdict(self, one: Claim) -> Verdict:
        return judge([(one, self.evidence())])[0]


def pruned() -> Lab:
    lab = Lab()
    lab.add("magnitude", nll_of_magnitude())
    lab.add("wanda", [nll_of_wanda()])
    return lab


def accurate() -> Lab:
    lab = Lab()
    lab.add("a", correct_a(), "tinyworld")
    lab.add("b", correct_b(), "tinyworld")
    lab.add("sparse", correct_sparse(), "tinyworld")
    lab.add("dense", correct_a()[0], "tinyworld")
    return lab


def test_scores_that_never_differ_are_not_known_to_be_equal() -> None:
    """Shares of right answers are bounded as right and wrong are; an NLL below 1 is not, and equal is equal there."""
    lab = Lab()
    for name in ("a", "b"):
        lab.add(name, numpy.full(40, 0.75), "tinyworld")
        lab.add(name, numpy.full(40, 0.75))
    found = lab.verdict(claim("acc(method=a)", ">=", "acc(method=b)", select={"task": "tinyworld"}))
    assert (found.verdict, found.low, found.high) == (INCONCLUSIVE, -3 / 40, 3 / 40)
    found = lab.verdict(claim("nll(method=a)", ">=", "nll(method=b)", select={"task": "perplexity"}))
    assert (found.verdict, found.low, found.high) == (REPRODUCED, 0, 0)


BEATS = claim("nll(method=magnitude)", ">", "nll(method=wanda)")


def test_example_one_seed() -> None:
    found = pruned().verdict(BEATS)
    assert (found.verdict, found.samples, found.seeds, found.df) == (REPRODUCED, 40, 1, pytest.approx(39))
    assert found.scope == "this model, this calibration"
    assert (found.estimate, found.low, found.high) == pytest.approx((0.23, 0.2258653, 0.2341347), rel=1e-6)
    assert found.p_for == pytest.approx(6.4e-51, rel=0.01) and found.p_for_adjusted == found.p_for
    part = found.parts[0]
    assert (part.boot_low, part.boot_high) == pytest.approx((found.low, found.high), abs=5e-4)
    wrong = pruned().verdict(claim("nll(method=magnitude)", "<", "nll(method=wanda)"))
    assert wrong.verdict == NOT_REPRODUCED and wrong.estimate == pytest.approx(-0.23)


def test_example_three_seeds() -> None:
    found = accurate().verdict(claim("acc(method=a)", ">", "acc(method=b)"))
    assert (found.verdict, found.samples, found.seeds, found.scope) == (INCONCLUSIVE, 60, 3, "over 3 seeds")
    assert (found.estimate, found.low, found.high) == pytest.approx((0.0166667, -0.0230086, 0.0563419), rel=3e-6)
    assert found.p_for == pytest.approx(0.197436, rel=3e-6) and found.df == pytest.approx(24.519, abs=5e-4)
    assert found.mde == pytest.approx(0.0558411, rel=1e-5)
    assert "an effect of 0.056 would have been detected; more seeds would decide, not more samples" in found.why


def loss() -> Claim:
    return claim("acc(method=sparse)", ">=", "acc(method=a)", margin=0.01)


def test_example_of_a_loss() -> None:
    found = accurate().verdict(loss())
    assert found.verdict == NOT_REPRODUCED
    assert (found.estimate, found.low, found.high) == pytest.approx((-0.1733333, -0.2647434, -0.0819233), rel=1e-6)
    assert found.p_against == pytest.approx(2.0116e-4, rel=3e-5) and found.df == pytest.approx(45.95, abs=5e-4)


def test_example_holm() -> None:
    one, three = pruned().evidence(), accurate().evidence()
    second = replace(claim("acc(method=a)", ">", "acc(method=b)"), id="wanda.second")
    found = judge([(BEATS, one), (second, three), (replace(loss(), id="wanda.third"), three)])
    assert [x.p_for_adjusted for x in found] == [
        pytest.approx(1.9e-50, rel=0.02), pytest.approx(0.39487, rel=1e-5), pytest.approx(0.99980, rel=1e-5),
    ]  # fmt: skip
    assert [x.p_against_adjusted for x in found] == [1, 1, pytest.approx(6.03e-4, rel=1e-3)]
    assert [x.verdict for x in found] == [REPRODUCED, INCONCLUSIVE, NOT_REPRODUCED]
    assert "after Holm over 3 claims" in found[0].why


def test_families() -> None:
    """Claims are corrected with those of their paper and kind; sanity claims and untested ones with none."""
    evidence = accurate().evidence()
    base = claim("acc(method=a)", ">", "acc(method=b)")
    kinds = ["main", "main", "secondary", "sanity"]
    claims = [replace(base, id=f"wanda.{at}", kind=kind) for at, kind in enumerate(kinds)]
    other = replace(base, id="teal.x", paper="teal")
    gone = replace(claim("acc(method=a)", ">", "acc(method=gone)"), id="wanda.gone")
    found = judge([(one, evidence) for one in [*claims, other, gone]])
    ratios = [one.p_for_adjusted / one.p_for for one in found if one.p_for and one.p_for_adjusted]
    assert ratios == pytest.approx([2, 2, 1, 1, 1])


@pytest.mark.parametrize(("margin", "verdict"), [(0.005, REPRODUCED), (0.001, INCONCLUSIVE), (0.0003, NOT_REPRODUCED)])
def test_example_equivalence(margin: float, verdict: str) -> None:
    lab = Lab()
    for method, values in zip("ab", equivalent(), strict=True):
        lab.add(method, values)
    found = lab.verdict(claim("nll(method=b)", "~", "nll(method=a)", margin=margin))
    assert found.verdict == verdict
    assert (found.estimate, found.low, found.high) == pytest.approx((0.002, 0.000376, 0.003624), abs=5e-7)


def test_example_no_record() -> None:
    lab = Lab()
    lab.add("magnitude", nll_of_magnitude())
    found = lab.verdict(BEATS)
    assert (found.verdict, found.estimate, found.p_for) == (UNTESTED, None, None)
    assert found.why == "no record: model=tiny_1m, method=wanda (the nearest run has method=magnitude)"


def test_relative_margins() -> None:
    relation = ("nll(method=wanda)", "<", "nll(method=magnitude)")
    assert pruned().verdict(claim(*relation, margin="5%")).verdict == REPRODUCED  # 2.11 against 2.34: 9.8% lower
    assert pruned().verdict(claim(*relation, margin="12%")).verdict == NOT_REPRODUCED
    assert (
        pruned().verdict(claim("nll(method=wanda)", "~", "nll(method=magnitude)", margin="12%")).verdict == REPRODUCED
    )
    assert (
        pruned().verdict(claim("nll(method=wanda)", "~", "nll(method=magnitude)", margin="5%")).verdict
        == NOT_REPRODUCED
    )


def test_expressions_are_tested_whole() -> None:
    lab = pruned()
    ratio = lab.verdict(claim("nll(method=magnitude) / nll(method=wanda)", ">", 1.1))
    assert ratio.verdict == REPRODUCED
    assert ratio.estimate == pytest.approx(nll_of_magnitude().mean() / nll_of_wanda().mean() - 1.1)
    log = lab.verdict(claim("log(nll(method=magnitude))", ">", "log(nll(method=wanda))"))
    assert log.verdict == REPRODUCED and log.df == pytest.approx(39)
    same = lab.verdict(claim("score(method=magnitude)", ">", "nll(method=wanda)"))
    assert same.estimate == pytest.approx(0.23)  # the score of perplexity is its logarithm


def test_what_is_not_smooth_is_bootstrapped() -> None:
    lab = pruned()
    one = lab.verdict(claim("max(nll(method=magnitude), nll(method=wanda))", ">", "nll(method=wanda)"))
    assert one.verdict == REPRODUCED and one.p_for == pytest.approx(1 / 10_001)
    three = accurate().verdict(claim("min(acc(method=a), acc(method=b))", ">", 0.1))
    assert three.verdict == INCONCLUSIVE and "what is not smooth needs 1 or at least 8 seeds, not 3" in three.why


def test_drop_is_a_loss_whichever_direction_is_better() -> None:
    lab = accurate()
    found = lab.verdict(claim("drop(method=sparse)", ">", 0.0))
    assert found.verdict == REPRODUCED and found.estimate == pytest.approx(0.7 - correct_sparse().mean())
    lab = pruned()
    lab.add("dense", nll_of_wanda() - 0.1)
    assert lab.verdict(claim("drop(method=wanda)", ">", 0.05)).estimate == pytest.approx(0.05)


def levels(scores: Mapping[float, float], seeds: int = 1) -> Lab:
    """A method at several sparsities: accuracies of 200 samples that differ little between levels."""
    lab = Lab()
    order = numpy.random.default_rng(3).permutation(200)
    for level, score in scores.items():
        row = (order < round(score * 200)).astype(float)
        if level:
            lab.add("wanda", [row] * seeds, "tinyworld", sparsity=level)
        else:
            lab.add("dense", row, "tinyworld")
    return lab


CURVE = dict(
    zip([s / 10 for s in range(10)], [0.80, 0.80, 0.80, 0.79, 0.79, 0.78, 0.70, 0.55, 0.40, 0.30], strict=True)
)


@pytest.mark.parametrize(
    ("rule", "knee"), [("tolerance", 0.4), ("breakpoint", 0.5), ("hinge", 0.532), ("chord", 0.5), ("collapse", 0.9)]
)
def test_knees(rule: str, knee: float) -> None:
    found = levels(CURVE).verdict(claim(f"knee.{rule}(method=wanda)", ">", 0.0))
    assert found.estimate == pytest.approx(knee)


def test_a_knee_is_tested() -> None:
    lab = levels(CURVE)
    assert lab.verdict(claim("knee.hinge(method=wanda)", ">", 0.4)).verdict == REPRODUCED
    assert lab.verdict(claim("knee.hinge(method=wanda)", ">", 0.7)).verdict == NOT_REPRODUCED
    few = levels({0.0: 0.8, 0.5: 0.7})
    assert "runs at 1 sparsities, a knee needs 3" in few.verdict(claim("knee.hinge(method=wanda)", ">", 0.4)).why


def test_a_collapse_that_never_comes_lies_beyond_the_last_level() -> None:
    lab = levels({0.0: 0.8, 0.25: 0.7, 0.5: 0.6, 0.75: 0.5})
    assert lab.verdict(claim("knee.collapse(method=wanda)", ">", 0.75)).estimate == pytest.approx(0.25)
    perplexities = Lab()
    for level in (0.0, 0.25, 0.5, 0.75):
        perplexities.add(
            "wanda" if level else "dense", nll_of_wanda() + level, **({"sparsity": level} if level else {})
        )
    found = perplexities.verdict(claim("knee.collapse(method=wanda)", ">", 0.5))
    assert found.verdict == UNTESTED and "better when lower" in found.why


def test_tokens_of_right_and_of_wrong_answers() -> None:
    """60 answers: every third one is wrong, and wrong ones are 5 tokens longer."""
    lab = Lab()
    correct = (numpy.arange(60) % 3 > 0).astype(float)
    tokens = 20 + numpy.arange(60) % 4 + 5 * (1 - correct)
    run_id = lab.add("wanda", correct, "reasoning")
    for row, count in zip(lab.samples[run_id], tokens.tolist(), strict=True):
        row["tokens"] = count
    right, wrong = tokens[correct > 0].mean(), tokens[correct == 0].mean()
    lab.records[run_id] |= {"tokens": tokens.mean(), "tokens_correct": right, "tokens_wrong": wrong}
    longer = claim("tokens.wrong(method=wanda)", ">", "tokens.correct(method=wanda)")
    found = lab.verdict(longer)
    assert found.verdict == REPRODUCED and found.estimate == pytest.approx(wrong - right)
    assert lab.verdict(claim("tokens.mean(method=wanda)", ">", 30)).verdict == NOT_REPRODUCED
    exact = lab.verdict(replace(longer, unit="none"))
    assert exact.estimate == pytest.approx(wrong - right)
    del lab.records[run_id]["tokens"]
    assert "counts no tokens" in lab.verdict(longer).why


def per_level(effects: Mapping[float, float]) -> Lab:
    lab = Lab()
    noise, gap = numpy.random.default_rng(0).normal(0, 0.1, (2, 100))
    gap -= gap.mean()
    for level, effect in effects.items():
        lab.add("magnitude", 2 + effect + noise + gap, sparsity=level)
        lab.add("wanda", [2 + noise], sparsity=level)
    return lab


def each(**changes: Any) -> Claim:
    return claim("nll(method=magnitude)", ">", "nll(method=wanda)", for_each=["sparsity"], **changes)


@pytest.mark.parametrize(
    ("quantifier", "effects", "verdict", "at"),
    [
        ("all", (0.5, 0.2, 0.4), REPRODUCED, 0.6),
        ("all", (0.5, 0.0, 0.4), INCONCLUSIVE, 0.6),
        ("all", (0.5, -0.2, 0.4), NOT_REPRODUCED, 0.6),
        ("any", (-0.5, 0.2, -0.4), REPRODUCED, 0.6),
        ("any", (-0.5, -0.2, -0.4), NOT_REPRODUCED, 0.6),
        ("any", (-0.5, 0.0, -0.4), INCONCLUSIVE, 0.6),
        ("mean", (0.5, -0.2, 0.4), REPRODUCED, None),
        ({"at_least": 2}, (0.5, -0.2, 0.4), REPRODUCED, 0.7),
        ({"at_least": 2}, (0.5, -0.2, -0.4), NOT_REPRODUCED, 0.6),
        ({"at_least": 2}, (0.5, 0.0, -0.4), INCONCLUSIVE, 0.6),
    ],
)
def test_quantifiers(quantifier: Any, effects: tuple[float, ...], verdict: str, at: float | None) -> None:
    lab = per_level(dict(zip((0.5, 0.6, 0.7), effects, strict=True)))
    found = lab.verdict(each(quantifier=quantifier))
    assert found.verdict == verdict and found.at.get("sparsity") == at
    assert len(found.parts) == (1 if quantifier == "mean" else 3)


def test_that_one_of_several_components_fails_is_corrected_for_their_number() -> None:
    lab = per_level({0.5: 0.4, 0.6: -0.025, 0.7: 0.4})
    found = lab.verdict(each())
    assert found.p_against == pytest.approx(3 * min(part.p_against for part in found.parts))


@pytest.mark.parametrize(
    ("effects", "relation", "verdict"),
    [
        ((0.0, 0.1, 0.3), "monotone_up", REPRODUCED),
        ((0.0, 0.1, 0.3), "monotone_down", NOT_REPRODUCED),
        ((0.0, 0.3, 0.1), "monotone_up", NOT_REPRODUCED),
        ((0.0, 0.0, 0.0), "monotone_up", INCONCLUSIVE),
        ((0.3, 0.1), "monotone_down", REPRODUCED),
    ],
)
def test_monotone(effects: tuple[float, ...], relation: str, verdict: str) -> None:
    lab = Lab()
    generator = numpy.random.default_rng(1)
    for level, effect in zip((0.5, 0.6, 0.7), effects, strict=False):
        lab.add("wanda", [2 + effect + generator.normal(0, 0.1, 100)], sparsity=level)
    found = lab.verdict(claim("nll(method=wanda)", relation, for_each=["sparsity"]))
    assert found.verdict == verdict


def test_exact_claims_have_no_p_value() -> None:
    lab = pruned()
    exact = claim("achieved(method=wanda)", "~", 0.5, unit="none", kind="sanity")
    found = lab.verdict(exact)
    assert (found.verdict, found.p_for, found.samples) == (REPRODUCED, None, None) and "exact" in found.why
    lab.records["run1"]["achieved"] = 0.4999
    assert lab.verdict(exact).verdict == NOT_REPRODUCED
    assert lab.verdict(claim("nll(method=wanda)", "<", "nll(method=magnitude)", unit="none")).verdict == REPRODUCED
    assert lab.verdict(claim("nll(method=wanda)", ">", "nll(method=wanda)", unit="none")).verdict == NOT_REPRODUCED
    assert lab.verdict(claim("nll(method=wanda)", ">=", "nll(method=wanda)", unit="none")).verdict == REPRODUCED


def test_an_exact_claim_must_hold_in_every_seed() -> None:
    lab = Lab()
    lab.add("a", correct_a(), "tinyworld")
    lab.add("b", correct_a() - numpy.array([[0.1], [0.1], [-0.1]]), "tinyworld")
    assert lab.verdict(claim("acc(method=a)", ">", "acc(method=b)", unit="none")).verdict == NOT_REPRODUCED


def test_costs() -> None:
    lab = pruned()
    for run, flops in (("run0", 3.0e5), ("run1", 2.0e5)):
        lab.records[run] |= {"flops_prefill": flops, "flops_decode": 1.0, "bytes_weights": 10, "latency": "simulated"}
    assert (
        lab.verdict(claim("cost.flops(method=magnitude) / cost.flops(method=wanda)", ">=", 1.5, unit="none")).verdict
        == REPRODUCED
    )
    assert lab.verdict(claim("cost.bytes(method=wanda)", "<", 11, unit="none")).verdict == REPRODUCED
    found = lab.verdict(claim("cost.ms(method=wanda)", "<", 11, unit="none"))
    assert found.verdict == UNTESTED and "simulated: no kernel was timed" in found.why
    found = lab.verdict(claim("cost.bytes(method=wanda)", "<", 11))
    assert found.why == "unit=samples+seeds: none of its calls has per-sample outcomes; write unit: none"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"status": "failed", "error": "out of memory"}, "failed record: method=wanda, model=tiny_1m, sparsity=0.5, "),
        ({"status": "lost", "error": "cancelled"}, "seed=0: cancelled"),
        ({"status": "running"}, "no record: method=wanda, model=tiny_1m, sparsity=0.5, task=perplexity, seed=0 (still"),
        ({"flagged": True, "achieved": 0.42}, "achieved sparsity is off: method=wanda, "),
        ({"achieved": 0.48}, "unfair pair: The achieved sparsities differ: 0.48 (wanda) to 0.5 (magnitude)."),
        ({"context": 512}, "unfair pair: The context lengths differ: "),
        ({"nll": 2.5, "perplexity": exp(2.5)}, "its per-sample outcomes give 2.11, its record says 2.5"),
        ({"metric": "bits"}, "unfair pair: The metrics differ: bits (wanda), perplexity (magnitude)."),
    ],
)
def test_records_that_cannot_be_used(change: dict[str, Any], why: str) -> None:
    lab = pruned()
    lab.records["run1"] |= change
    found = lab.verdict(BEATS)
    assert found.verdict == UNTESTED and why in found.why


def test_one_unfair_component_is_named() -> None:
    lab = per_level({0.5: 0.4, 0.6: 0.4})
    lab.records["run3"]["achieved"] = 0.594
    found = lab.verdict(each())
    assert found.why == "unfair pair at sparsity=0.6: The achieved sparsities differ: 0.594 (wanda) to 0.6 (magnitude)."


def test_a_run_that_was_not_made_yet() -> None:
    lab = pruned()
    del lab.records["run1"]
    assert "(planned, not run yet)" in lab.verdict(BEATS).why


def test_an_old_version() -> None:
    lab = pruned()
    lab.trouble["run1"] = "made by version 1 of wanda, which is now 2"
    assert lab.verdict(BEATS).why.endswith("seed=0: made by version 1 of wanda, which is now 2")


def test_missing_outcomes() -> None:
    lab = pruned()
    lab.samples["run1"][3]["nll"] = None
    assert "1 of 40 lack the column 'nll'" in lab.verdict(BEATS).why
    lab.samples["run1"] = lab.samples["run1"][:30]
    assert "1 of 30 lack" in lab.verdict(BEATS).why
    lab.samples["run1"] = [row for row in pruned().samples["run1"] if row["sample"] != "document/3"]
    assert "its samples are not those of the other runs (0 only here, 1 only there)" in lab.verdict(BEATS).why
    del lab.samples["run1"]
    assert "its per-sample outcomes are missing" in lab.verdict(BEATS).why


def test_both_sides_need_the_same_seeds() -> None:
    lab = accurate()
    lab.points = [point for point in lab.points if (point["method"], point["seed"]) != ("b", 1)]
    found = lab.verdict(claim("acc(method=a)", ">", "acc(method=b)"))
    assert "no record: method=b, " in found.why and "seed=1 (both sides need the same seeds)" in found.why


def test_several_records() -> None:
    lab = pruned()
    lab.add("wanda", [nll_of_wanda()], sparsity=0.6)
    found = lab.verdict(BEATS)
    assert found.verdict == UNTESTED
    assert found.why.startswith(
        "2 records match nll(method=wanda) for one seed: (sparsity=0.5, run_id=run1) (sparsity=0.6"
    )
    assert found.why.endswith("name in its select what tells them apart")


def test_minimum() -> None:
    lab = pruned()
    assert lab.verdict(replace(BEATS, min_samples=41)).why == "40 samples, at least 41 are needed"
    assert lab.verdict(replace(BEATS, min_seeds=3)).why == "1 seed, at least 3 are needed"
    assert lab.verdict(replace(BEATS, unit="seeds")).why == "1 seed, at least 2 are needed"


def test_a_task_without_the_score_that_is_asked_for() -> None:
    assert "its task tinyworld has no NLL" in accurate().verdict(claim("nll(method=a)", ">", "nll(method=b)")).why
    assert "its task perplexity has no accuracy" in pruned().verdict(claim("acc(method=wanda)", ">", 0.5)).why


def test_no_value() -> None:
    lab = pruned()
    found = lab.verdict(claim("log(nll(method=wanda) - nll(method=magnitude))", ">", 0.0))
    assert found.verdict == UNTESTED and "the expression has no value" in found.why


def test_no_component() -> None:
    assert "no planned run gives sparsity a value" in Lab().verdict(each()).why


def test_a_record_without_a_seed_is_one_replicate() -> None:
    lab = Lab()
    generator = numpy.random.default_rng(0)
    wanda = 2 + generator.normal(0, 0.1, (3, 60))
    lab.add("magnitude", 2.02 + generator.normal(0, 0.1, 60))
    lab.add("wanda", wanda)
    found = lab.verdict(BEATS)
    assert (found.seeds, found.samples) == (3, 60)
    named = lab.verdict(claim("nll(method=wanda, seed=0)", "~", "nll(method=wanda, seed=1)", margin=0.2))
    assert named.seeds == 1 and named.verdict == REPRODUCED


def test_answers_of_a_document_count_as_one_sample_and_tasks_alike() -> None:
    lab = Lab()
    for method, right in (("a", 1.0), ("b", 0.5)):
        run = lab.add(method, [right], "tinyworld")
        lab.samples[run] = [
            {"sample": f"copy/{i}/{q}", "task": "copy", "correct": float(q < 2 * right)}
            for i in range(40)
            for q in range(2)
        ]
        lab.samples[run] += [{"sample": f"two_hop/{i}/0", "task": "two_hop", "correct": 1.0} for i in range(10)]
        lab.records[run]["accuracy"] = (right + 1) / 2
    found = lab.verdict(claim("acc(method=a)", ">", "acc(method=b)"))
    assert (found.samples, found.estimate) == (50, pytest.approx(0.25))


def test_windows_of_one_passage_are_one_cluster() -> None:
    lab = Lab()
    for method, values in zip(("magnitude", "wanda"), numpy.random.default_rng(0).normal(2, 0.1, (2, 40)), strict=True):
        run_id = lab.add(method, values)
        for row in lab.samples[run_id]:
            row["sample"] = row["sample"].replace("document", "window")
    found = lab.verdict(BEATS)
    assert found.df == pytest.approx(3) and found.samples == 40


def test_other_models_are_other_samples() -> None:
    """Windows of a text depend on the tokenizer: two models outside the ladder are not paired."""
    lab = Lab()
    for model, shift in (("one", 0.0), ("two", 0.5)):
        lab.add("wanda", [nll_of_wanda() + shift], model=model)
    found = lab.verdict(claim("nll(model=two)", ">", "nll(model=one)", select={"method": "wanda"}))
    assert found.verdict == REPRODUCED and found.samples == 80 and found.df == pytest.approx(78)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_method_against_itself_is_inconclusive(seeds: int) -> None:
    """The A/A guard through records and claims: labels swapped within samples, at most 5% are reproduced."""
    generator = numpy.random.default_rng(seeds)
    base = 2.5 + generator.normal(0, 0.3, 60)
    claimed = replace(BEATS, min_seeds=1)
    found = []
    for _ in range(30):
        lab = Lab()
        pair = base + generator.normal(0, 0.1, (2, seeds, 60))
        lab.add("magnitude", pair[0])
        lab.add("wanda", pair[1])
        found.append(lab.verdict(claimed).verdict)
    assert found.count(REPRODUCED) <= 2 and found.count(INCONCLUSIVE) >= 27


@pytest.mark.parametrize(
    "text",
    [
        "-nll(method=a) * 2 - log(nll(method=b)) / (1 - mean(1, nll(method=a), 0.5)) + min(1, nll(method=b))",
        "max(1, 2, nll(method=a)) - 1",
        "min(nll(method=a), nll(method=b), 4) / 3",
        "7",
    ],
)
def test_arrays_follow_the_arithmetic_of_expressions(text: str) -> None:
    side = parse(text, "left")
    columns = {"a": numpy.array([3.0, 4.0, 0.5]), "b": numpy.array([5.0, 0.25, 2.0])}
    found = evaluated(side, {call: columns[str(call.select["method"])] for call in side.calls()})
    for at in range(3):
        one = side.evaluate(lambda leaf: columns[leaf.select["method"]][at])  # type: ignore[union-attr,index]  # noqa: B023
        assert numpy.broadcast_to(found, (3,))[at] == pytest.approx(one, rel=1e-15)
