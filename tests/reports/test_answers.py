"""The report's tables of answer lengths and collapse points, on answers made by formula."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas
import pytest

from sparsebench.reports import answers


def rows(right: int, kind: str) -> list[dict[str, Any]]:
    """Ten answers of 10 to 19 tokens, the shortest ones right."""
    return [
        {"sample": f"{kind}/{k}", "task": kind, "correct": float(k < right), "tokens": 10 + k, "truncated": k == 9}
        for k in range(10)
    ]


@pytest.fixture
def found() -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Of ten answers 10, 6, 3 and 0 are right: sums at 0, .25, .5, .75; the rules hold longer."""
    samples, runs = {}, []
    for level, sums, rules in ((None, 10, 10), (0.25, 6, 9), (0.5, 3, 8), (0.75, 0, 7)):
        run_id = f"run{level}"
        samples[run_id] = rows(sums, "sums") + rows(rules, "rules")
        method = "dense" if level is None else "sparsegpt"
        runs.append(
            {"model_label": "m", "task_label": "reasoning", "method_label": method, "level": level, "run_id": run_id,
             "achieved": level or 0.0}
        )  # fmt: skip
    samples["other"] = [{"sample": "window/0", "nll": 2.0}]
    runs.append({**runs[0], "task_label": "perplexity", "run_id": "other"})
    return answers.levels(SimpleNamespace(samples=samples), pandas.DataFrame(runs))  # type: ignore[arg-type]


def test_lengths_by_level_and_kind(found: Any) -> None:
    table = answers.spent(found)
    assert len(table) == 8 and set(table["task"]) == {"reasoning"}
    half = table[(table["kind"] == "sums") & (table["requested"] == 0.5)].iloc[0]
    assert (half["accuracy"], half["tokens"], half["correct"], half["wrong"]) == (0.3, 14.5, 11, 16)
    assert (half["per_correct"], half["cut"], half["n"]) == (pytest.approx(145 / 3), 0.1, 10)
    assert half["rho"] < 0
    none = table[(table["kind"] == "sums") & (table["requested"] == 0.75)].iloc[0]
    assert pandas.isna(none["correct"]) and pandas.isna(none["per_correct"]) and pandas.isna(none["rho"])
    bins = answers.by_length(found)
    own = bins[(bins["kind"] == "sums") & (bins["requested"] == 0.5)]
    assert own["accuracy"].tolist() == [1, 0.5, 0, 0, 0] and own["from"].tolist() == [10, 12, 14, 16, 18]


def test_bins_are_as_many_as_the_task_says(found: Any) -> None:
    assert {named["bins"] for named, _ in found} == {5}
    run = {
        "model_label": "m",
        "task_label": "t",
        "method_label": "dense",
        "level": None,
        "run_id": "r",
        "achieved": 0.0,
    }
    sweep: Any = SimpleNamespace(samples={"r": rows(5, "sums")})
    asked = answers.levels(sweep, pandas.DataFrame([{**run, "task.len_bins": 2}]))
    assert answers.by_length(asked)["accuracy"].tolist() == [1, 0]


def test_collapse_points(found: Any) -> None:
    quantised = [({**named, "method": "rtn"}, own) for named, own in found if named["method"] == "dense"]
    both = answers.collapses(answers.spent([*found, *quantised]))
    assert both["kind"].tolist() == ["sums", "rules"], "what collapses first; a method that makes no zeros is no curve"
    table = answers.collapses(answers.spent(found)).set_index("kind")
    assert table.loc["sums", "collapse"] == 0.5 and table.loc["sums", "dense"] == 1
    assert pandas.isna(table.loc["rules", "collapse"]) and table.loc["rules", "up_to"] == 0.75
    sparse = answers.spent([one for one in found if one[0]["method"] != "dense"])
    assert answers.collapses(sparse).empty
