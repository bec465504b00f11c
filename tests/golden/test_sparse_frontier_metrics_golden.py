"""The metrics of the Sparse Frontier tasks against examples scored by the released code."""

from __future__ import annotations

import json
from functools import partial

import pytest

from sparsebench.tasks.base import Score
from sparsebench.tasks.sparse_frontier import metrics

SCORERS = {
    "ruler_niah": lambda one: partial(metrics.niah, answers=[tuple(pair) for pair in one["answers"]]),
    "ruler_vt": lambda one: partial(metrics.variables, gold=one["gold_answer"]),
    "ruler_cwe": lambda one: partial(metrics.common_words, gold=one["common_words"]),
    "story_retrieval": lambda one: partial(metrics.retrieval, gold=one["gold_answer"]),
    "story_multihop": lambda one: partial(metrics.multihop, gold=one["gold_answer"]),
    "story_filtering": lambda one: partial(metrics.chapters, gold=one["gold_answer"]),
    "qa/accuracy": lambda one: partial(metrics.letters, gold=one["gold_answer"]),
    "qa/f1": lambda one: partial(metrics.f1, golds=one["gold_answer"]),
}


def groups(task, found):
    """(scorer, examples, the name of the expected mean): the QA examples are of two kinds."""
    if task == "qa":
        for name, choice in (("accuracy", True), ("f1", False)):
            yield SCORERS[f"qa/{name}"], [one for one in found["examples"] if one["is_mcq"] is choice], name
    else:
        (name,) = (key for key in found["expected"] if not key.endswith("_variance"))
        yield SCORERS[task], found["examples"], name


@pytest.mark.golden("sparse_frontier", r"metrics_json")
def test_means_and_variances_are_the_released_ones(case):
    tasks = json.loads(str(case.arrays[case.key]))
    assert tasks
    for task, found in tasks.items():
        for scorer, examples, name in groups(task, found):
            values = [scorer(one)(one["pred"]) for one in examples]
            score = Score.mean([value for value in values if value is not None])
            variance = 0.0 if score.stderr is None else score.stderr**2 * score.n
            expected = found["expected"]
            assert (score.value, variance) == pytest.approx((expected[name], expected[f"{name}_variance"]), abs=1e-9)
