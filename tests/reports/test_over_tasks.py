"""Analyses over several tasks: means, equal costs, safe levels, the law with an axis held out, small figures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest

from sparsebench.analysis import curves
from sparsebench.analysis.laws import heldout
from sparsebench.analysis.laws.compare import LeftOut
from sparsebench.reports import length_law, multiples, over_tasks
from sparsebench.reports.style import drawing, looks

SIZES = {"small": 1e5, "middle": 4e5, "large": 1.6e6}
LENGTHS = (256, 512, 1024)
LEVELS = (0.0, 0.5, 0.75, 0.875)
DELTA = {"needle": 1.0, "words": 0.0}


def accuracy(task: str, model: str, length: int, level: float) -> float:
    """The law itself: alpha 0.9, beta -0.5, gamma -0.8."""
    logit = -7 + DELTA[task] + 0.9 * np.log(SIZES[model]) - 0.5 * np.log(length) - 0.8 * np.log(1 / (1 - level))
    return float(1 / (1 + np.exp(-logit)))


def points() -> pandas.DataFrame:
    """The levels as the notebook has them."""
    rows: list[dict[str, Any]] = []
    for task in DELTA:
        for length in LENGTHS:
            for model, size in SIZES.items():
                for level in LEVELS:
                    score = accuracy(task, model, length, level)
                    rows.append(
                        {
                            "model": model, "task": f"{task} length={length}", "method": "lines" if level else "dense",
                            "base": "lines", "pattern": "unstructured", "requested": level or np.nan, "achieved": level,
                            "quality": score, "score": score, "se": 0.03, "ci_low": score - 0.06,
                            "ci_high": score + 0.06, "interval": "normal", "n": 50, "seeds": 1, "hollow": False,
                            "flags": "", "metric": "score", "better": "higher", "run_ids": [f"{task}{length}{level}"],
                            "flops_prefill": 2 * size + 1000 * length * (1 - level),
                        }
                    )  # fmt: skip
    return pandas.DataFrame(rows)


def test_the_mean_over_tasks_stands_for_what_every_task_has() -> None:
    table = points()
    table.loc[(table["task"] == "words length=256") & (table["requested"] == 0.75), "hollow"] = True
    found = over_tasks.pooled(table, ["flops_prefill"])
    assert found["task"].unique().tolist() == [f"length={length}" for length in LENGTHS]
    assert 0.75 not in found[found["task"] == "length=256"]["requested"].tolist()
    row = found[(found["task"] == "length=512") & (found["model"] == "small") & (found["requested"] == 0.5)].iloc[0]
    both = [accuracy(task, "small", 512, 0.5) for task in DELTA]
    assert row["quality"] == pytest.approx(np.mean(both)) and row["se"] == pytest.approx(0.03 / np.sqrt(2))
    assert (row["tasks"], row["n"], len(row["run_ids"])) == (2, 100, 2)
    assert (row["ci_high"] - row["ci_low"]) / 2 == pytest.approx(1.96 * row["se"])
    sure = table["task"].str.startswith("needle")
    flat = table.assign(
        se=np.where(sure, 0, table["se"]), ci_low=np.where(sure, table["score"] - 0.06, table["ci_low"])
    )
    flat = flat.assign(ci_high=np.where(sure, table["score"], table["ci_high"]))
    own = over_tasks.pooled(flat, []).iloc[0]
    assert own["score"] - own["ci_low"] == pytest.approx(np.hypot(1.96 * 0.03, 0.06) / 2), "no spread is not no doubt"
    assert own["ci_high"] - own["score"] == pytest.approx(1.96 * 0.03 / 2), "what is full cannot be more"
    few = over_tasks.pooled(flat.assign(ci_low=flat["ci_low"].mask(sure)), [])
    assert set(few["interval"]) == {"unknown"} and few["ci_low"].isna().all()
    logged = table.assign(metric="perplexity", better="lower", quality=-table["score"], score=np.exp(table["score"]))
    pair = over_tasks.pooled(logged, []).iloc[0]
    assert np.log(pair[["ci_low", "score", "ci_high"]].astype(float)).diff().iloc[1:].tolist() == pytest.approx(
        [1.96 * pair["se"]] * 2
    )
    assert pair["score"] == pytest.approx(np.exp(-pair["quality"]))
    assert over_tasks.pooled(table.assign(metric=np.where(table["task"] < "o", "score", "perplexity")), []).empty
    assert over_tasks.setting_of("words") == "all tasks"


def test_a_large_sparse_model_at_the_cost_of_a_small_dense_one() -> None:
    table = over_tasks.pooled(points(), ["flops_prefill"])
    found = over_tasks.equal_costs(table, "flops_prefill", list(SIZES)).set_index(["task", "model"])
    assert found["method"].isna().sum() == 5, "elsewhere the linear layers alone cost the larger more"
    row = found.loc[("length=1024", "small")]
    assert (row["method"], row["achieved"]) == ("lines", 0.75)
    assert row["cheapest"] == pytest.approx((8e5 + 128e3) / (2e5 + 1024e3))
    cheap = table.assign(flops_prefill=1e6 * (1 - table["achieved"]))
    row = over_tasks.equal_costs(cheap, "flops_prefill", list(SIZES)).iloc[0]
    assert (row["method"], row["cheapest"], row["larger"]) == ("dense", 0.125, "middle")
    assert over_tasks.equal_costs(table.assign(flops_prefill=1.0), "flops_prefill", list(SIZES)).empty
    assert not over_tasks.saves(table.assign(same=1.0), "same") and over_tasks.saves(table, "flops_prefill")


def test_safe_levels_over_tasks_name_the_worst_task() -> None:
    safe = pandas.DataFrame(
        {
            "model": "m", "method": "lines", "task": ["needle length=256", "words length=256"], "n": [50.0, 50.0],
            "not_worse": [0.75, 0.5], "largest_passing": [0.75, 0.875], "non_inferior": [0.5, np.nan], "says": "",
        }
    )  # fmt: skip
    row = over_tasks.safe_over_tasks(safe).iloc[0]
    assert (row["setting"], row["tasks"]) == ("length=256", 2)
    assert (row["not_worse_minimum"], row["not_worse_task"], row["not_worse_mean"]) == (0.5, "words", 0.625)
    assert (row["largest_passing_minimum"], row["largest_passing_task"]) == (0.75, "needle")
    assert (row["non_inferior_minimum"], row["non_inferior_task"]) == (0.0, "words")


def safe_cells() -> pandas.DataFrame:
    """Cells as ``levels.safe`` has them: one safe up to .5, one that fails at every level, one with too few samples by
    ``non_inferior`` itself, one that was not tested."""
    dense, lost = np.ones(2000), np.repeat([1.0, 0.0], 1000)
    few = curves.non_inferior(np.ones(50), [(0.5, np.ones(50)), (0.75, np.ones(50))])
    assert few.level is None and few.says.startswith("n too small")
    found = {
        "copy": curves.non_inferior(dense, [(0.5, dense), (0.75, lost)]),
        "count": curves.non_inferior(dense, [(0.5, lost), (0.75, lost)]),
        "recall": few,
    }
    assert (found["copy"].level, found["count"].level) == (0.5, None)
    rows: list[dict[str, Any]] = [
        {"task": name, "not_worse": one.level, "largest_passing": one.level, "non_inferior": one.level, "n": one.n,
         "says": one.says}
        for name, one in found.items()
    ]  # fmt: skip
    rows.append({"task": "words", "says": "a level has no per-sample outcomes"})
    table = pandas.DataFrame(rows).assign(model="m", method="lines")
    return table.astype(dict.fromkeys(["not_worse", "largest_passing", "non_inferior", "n"], float))


def test_too_few_samples_to_tell_are_not_a_safe_level_of_zero() -> None:
    safe = safe_cells()
    row = over_tasks.safe_over_tasks(safe).iloc[0]
    assert (row["tasks"], row["decided"]) == (3, 2)
    assert (row["non_inferior_mean"], row["non_inferior_minimum"], row["non_inferior_task"]) == (0.25, 0.0, "count")
    assert row["not_worse_mean"] == pytest.approx(0.5 / 3), "that rule always tells"
    assert over_tasks.safe_minimum(safe).to_dict("records") == [
        {"method": "lines", "mean": 0.25, "min": 0.0, "decided": 2, "cells": 4}
    ]
    few = safe[safe["task"] == "recall"]
    row = over_tasks.safe_over_tasks(few).iloc[0]
    assert (row["decided"], row["non_inferior_task"]) == (0, "")
    assert np.isnan([row[f"non_inferior_{name}"] for name in ("mean", "std", "minimum")]).all()
    (row,) = over_tasks.safe_minimum(few).to_dict("records")
    assert np.isnan([row["mean"], row["min"]]).all() and (row["decided"], row["cells"]) == (0, 1)


def counted() -> tuple[Any, pandas.DataFrame]:
    """A sweep with two phases, as far as the law looks at it, and its runs."""
    kinds = {name: SimpleNamespace(phase=phase) for name, phase in (("lines", "prefill"), ("pages", "decode"))}
    catalogue = SimpleNamespace(found={"method": kinds})
    sweep = SimpleNamespace(workspace=SimpleNamespace(catalogue=catalogue), naive=["window"])
    rows = []
    for one in points().to_dict("records"):
        task, length = one["task"].split(" length=")
        size = {"bytes_weights_dense": 4 * SIZES[one["model"]], "dtype": "float32", "task.length": int(length)}
        for name, protocol in (("lines", "windows"), ("pages", "continuation")):
            method = name if one["achieved"] else "dense"
            own = {"method": method, "method_label": method, "task.protocol": protocol, "task": task}
            rows.append({**one, **size, **own})
    rows.append({**rows[5], "method": "lines", "method_label": "window", "score": 0.0})
    return sweep, pandas.DataFrame(rows)


def test_the_law_of_each_phase_predicts_what_was_held_out() -> None:
    results, reasons = length_law.fits(*counted())
    assert not reasons
    assert [one.name for one in results] == [
        f"frontier {phase} {loss}" for phase in ("prefill", "decode") for loss in ("binomial", "ols")
    ]
    for one in results:
        params = one.fit.params
        assert [params[name] for name in ("alpha", "beta", "gamma")] == pytest.approx([0.9, -0.5, -0.8], abs=1e-4)
    table = length_law.table(results)
    assert set(table["left_out"]) == {"length", "size", "compression"} and set(table["task"]) == {"all", *DELTA}
    assert table["mae"].max() < 1e-4 and table["r2"].min() > 0.999
    lowest = table.drop_duplicates("left_out").set_index("left_out")["lowest"]
    assert lowest.to_dict() == {"length": 1024, "size": 1.6e6, "compression": 8}
    predicted = length_law.predictions(results[0])
    assert len(predicted[predicted["left_out"] == "size"]) == 2 * 3 * 4
    with drawing("heldout"):
        assert len(multiples.heldout(predicted, "law").marks) == 6


def test_an_axis_with_one_value_left_is_not_held_out() -> None:
    sweep, rows = counted()
    results, reasons = length_law.fits(sweep, rows[rows["task.length"] > 256])
    assert not reasons and set(length_law.table(results)["left_out"]) == {"size", "compression"}
    why = "Length is not held out, because only L = 512 is left, which does not determine what L does"
    assert length_law.not_held(results) == [f"{why}."]
    assert length_law.not_held([results[0], *length_law.fits(*counted())[0]]) == [f"{why} (frontier prefill binomial)."]


def test_too_few_sizes_give_a_reason_and_no_fit() -> None:
    sweep, rows = counted()
    results, reasons = length_law.fits(sweep, rows[rows["model"] == "small"])
    assert not results and reasons == [
        f"frontier {phase}: too few different values of size 1 of 2" for phase in ("prefill", "decode")
    ]
    assert length_law.fits(sweep, rows.drop(columns="task.length")) == ([], [])


def test_agreement_on_a_slice() -> None:
    left = LeftOut("L", 512.0, 4, 0.1, "", (0.1, 0.4, 0.6, 0.9), (0.2, 0.3, 0.7, 0.8))
    whole, first, second = heldout.by_category(left, ["a", "a", "b", "b"])
    assert whole["r2"] == pytest.approx(1 - 0.04 / 0.34) and whole["spearman"] == pytest.approx(1.0)
    assert [whole["mae"], first["mae"]] == pytest.approx([0.1, 0.1])
    assert first["r2"] is None and second["spearman"] is None and second["n"] == 2
    assert heldout.by_category(LeftOut("L", None, 0, None, "no"), []) == []


def test_small_multiples_and_the_map_of_safe_levels() -> None:
    table = points()
    own = table[table["task"].str.startswith("needle")].assign(setting=lambda rows: rows["task"].str.slice(7))
    look = looks(["dense", "lines"], [])
    with drawing("tradeoffs"):
        drawn = multiples.tradeoffs(own, look)
    assert len(drawn.figure.axes) == 9 and len(drawn.marks) == 9
    safe = pandas.DataFrame(
        {
            "model": ["m", "m"], "method": "lines", "name": ["needle", "words"], "setting": "length=256", "n": 50.0,
            "not_worse": [0.75, np.nan], "non_inferior": [0.5, np.nan],
        }
    )  # fmt: skip
    with drawing("safe"):
        texts = [one.get_text() for one in multiples.safe_map(safe, look).figure.axes[0].texts]
    assert texts == [".50 / .75", "- / -"]
