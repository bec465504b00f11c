"""Which comparisons are refused, which are marked, and what stands under the table."""

from __future__ import annotations

from typing import Any

import pytest

from sparsebench.analysis.fairness import Finding, Methods, Policy, check, declared, missing_baselines, of_sweep, refuse
from sparsebench.config import Workspace
from sparsebench.errors import UserError

LABELS = ["dense", "random", "magnitude", "wanda", "sparsegpt", "wanda+dsnot", "magnitude+perp", "rtn"]


@pytest.fixture(scope="module")
def methods() -> Methods:
    return declared(Workspace(), LABELS)


def row(method: str, **columns: Any) -> dict[str, Any]:
    calibrated = method not in ("dense", "random", "magnitude")
    return {
        "run_id": method, "method": method, "model": "tiny_1m", "model.outliers": True, "model.device": "auto",
        "task": "perplexity", "task.corpus": "kjv", "task.split": "test", "context": 512, "metric": "perplexity",
        "calibration": "kjv" if calibrated else None, "calibration.nsamples": 128 if calibrated else None,
        "sparsity": None if method == "dense" else 0.5, "pattern": "unstructured", "achieved": 0.5, "status": "ok",
        "flagged": False, "seed": 0 if calibrated else None, "bytes_weights_dense": 1000, "dtype": "float32",
        "latency": "simulated", **columns,
    }  # fmt: skip


def table(**changes: Any) -> list[dict[str, Any]]:
    """Dense, random, magnitude and wanda in three seeds; ``changes`` are made to the run of wanda's first seed."""
    seeds = [row("wanda", run_id=f"wanda{seed}", seed=seed) for seed in range(3)]
    seeds[0] |= changes
    return [row("dense", achieved=0.0), row("random"), row("magnitude"), *seeds]


def rules(findings: list[Finding]) -> dict[str, str]:
    return {one.rule: one.severity for one in findings}


def test_a_fair_table(methods: Methods) -> None:
    assert check(table(), methods) == []


def test_what_is_only_quantised_counts_no_zeros_that_could_differ(methods: Methods) -> None:
    rows = [*table(), row("rtn", calibration=None, sparsity=None, achieved=0.0, seed=None)]
    assert "denominator" not in rules(check(rows, methods))
    assert "denominator" in rules(check([*rows, row("random", **{"method.random.exclude": ["*q_proj"]})], methods))


@pytest.mark.parametrize(
    ("changes", "rule", "sentence"),
    [
        (
            {"model": "tiny_400k"},
            "checkpoint",
            "tiny_1m outliers=true (dense, random, magnitude, 2 runs of wanda), tiny_400k outliers=true (wanda).",
        ),
        ({"model.outliers": False}, "checkpoint", "outliers=false (wanda)"),
        ({"task.corpus": "tinyworld"}, "data", "corpus=tinyworld split=test (wanda)"),
        ({"task.split": "validation"}, "data", "split=validation (wanda)"),
        ({"metric": "accuracy"}, "metric", "accuracy (wanda)"),
        ({"context": 256}, "context", "256 (wanda), 512 (dense"),
        ({"bytes_weights_dense": 500}, "reference", "500 bytes float32 (wanda)"),
        ({"denominator": "all linear layers"}, "denominator", "all linear layers (wanda), weights (random"),
        ({"method.wanda.exclude": ["q_proj"]}, "denominator", "exclude ['q_proj'] (wanda)"),
        ({"achieved": 0.51}, "sparsity", "0.5 (random) to 0.51 (wanda)"),
        ({"calibration.file": "a.txt", "task.file": "a.txt"}, "leak", "read the same text: wanda."),
        ({"status": "failed"}, "failed", "Runs without a result: wanda."),
    ],
)
def test_refused(methods: Methods, changes: dict[str, Any], rule: str, sentence: str) -> None:
    found = check(table(**changes), methods)
    assert found[0].severity == "refused" and "wanda0" in found[0].runs
    assert rules(found)[rule] == "refused"
    assert any(one.rule == rule and sentence in one.sentence for one in found), found


def test_calibration_on_the_text_that_is_evaluated(methods: Methods) -> None:
    rows = [one | {"task.split": "train"} for one in table()]
    assert rules(check(rows, methods)) == {"leak": "refused"}


def test_a_deliberately_mismatched_pair_is_refused(methods: Methods) -> None:
    pair = [row("wanda"), row("sparsegpt", model="tiny_400k", achieved=0.6)]
    found = check(pair, methods)
    assert {one.rule for one in found if one.severity == "refused"} == {"checkpoint", "sparsity"}
    with pytest.raises(UserError, match=r"report x: an unfair comparison: The base models differ: .*allow_unfair=true"):
        refuse(found, "report x")
    refuse(check(table(), methods), "report x")
    insisted = check(pair, methods, policy=Policy(allow_unfair=True))
    assert rules(insisted)["checkpoint"] == "watermark"
    refuse(insisted, "report x")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"pattern": "2:4"}, "granularity"),
        ({"calibration.nsamples": 64}, "calibration"),
        ({"calibration": "c4"}, "calibration"),
        ({"ms_prefill": 1.5}, "latency"),
        ({"seed": 7}, "none"),
    ],
)
def test_warnings(methods: Methods, changes: dict[str, Any], rule: str) -> None:
    assert rules(check(table(**changes), methods)) == ({} if rule == "none" else {rule: "warning"})


def test_flagged_runs_are_marked(methods: Methods) -> None:
    found = check(table(flagged=True), methods)
    assert rules(found) == {"flagged": "watermark"} and found[0].runs == ("wanda0",)


def test_seeds(methods: Methods) -> None:
    rows = [*table()[:4], row("sparsegpt", seed=1)]
    found = check(rows, methods)
    assert rules(found) == {"seeds": "warning", "unequal_seeds": "warning"}
    assert "nothing is known of their spread: sparsegpt, wanda" in found[0].sentence
    assert "sparsegpt [1], wanda [0]" in found[1].sentence


def test_retraining_is_compared_only_beside_its_cost(methods: Methods) -> None:
    rows = [*table(), *(row("magnitude+perp", seed=seed, calibration="kjv") for seed in range(3))]
    assert rules(check(rows, methods))["retraining"] == "refused"
    for one in rows:
        one["seconds_sparsify"] = 2.0
    assert rules(check(rows, methods))["retraining"] == "warning"
    rows[-1]["recovery_steps"], rows[-2]["recovery_steps"] = 100, 50
    assert rules(check(rows, methods))["budget"] == "warning"


def test_axes_and_what_the_comparison_is_about(methods: Methods) -> None:
    rows = [one | {"model": model} for model in ("tiny_400k", "tiny_1m") for one in table()]
    assert rules(check(rows, methods))["checkpoint"] == "refused"
    assert check(rows, methods, axes=["model"]) == check(rows, methods, ignore=["model"]) == []
    levels = [one | {"sparsity": s, "achieved": s} for s in (0.5, 0.6) for one in table()]
    assert check(levels, methods, axes=["sparsity"]) == []
    assert rules(check(levels, methods)) == {"sparsity": "refused"}


def test_a_finding_that_recurs_is_said_once(methods: Methods) -> None:
    timed = table(ms_prefill=2.0)
    rows = [one | {"sparsity": s, "run_id": f"{one['run_id']}/{s}"} for s in (0.5, 0.6) for one in timed]
    found = check(rows, methods, axes=["sparsity"])
    assert [one.rule for one in found] == ["latency"] and found[0].runs == ("wanda0/0.5", "wanda0/0.6")


def test_one_entry_more_or_less_is_no_difference(methods: Methods) -> None:
    rows = table(achieved=0.51, numel=90)
    rows[1] |= {"numel": 90}
    assert check(rows, methods) == []


def test_baselines(methods: Methods) -> None:
    assert missing_baselines(["wanda"], methods) == ["dense", "magnitude", "random"]
    assert missing_baselines(["wanda+dsnot", "dense", "random"], methods) == ["magnitude"]
    assert missing_baselines(LABELS, methods) == missing_baselines(["dense"], methods) == []
    found = check(table()[2:], methods)
    assert [one.sentence for one in found] == ["Baselines are missing: dense, random."]


def test_baselines_of_a_sweep() -> None:
    found = of_sweep(Workspace(), ["wanda", "magnitude", "dense"])
    assert [(one.severity, one.sentence) for one in found] == [("warning", "Baselines are missing: random.")]
    assert of_sweep(Workspace(), ["wanda", "magnitude", "dense", "random"]) == []


def test_a_method_that_is_not_known_any_more(methods: Methods) -> None:
    assert declared(Workspace(), ["gone+wanda"])["gone+wanda"][0].name == "wanda"
    assert declared(Workspace(), ["gone"]) == {"gone": []}
    assert "granularity" not in rules(check([*table(), row("gone", seed=None, calibration=None)], methods))
