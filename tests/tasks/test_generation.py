"""Greedily generated answers: what is right, in batches and one by one, and with a method of decoding."""

from __future__ import annotations

import pytest

from sparsebench.errors import UserError
from sparsebench.models.embedded import Ladder
from sparsebench.tasks.base import Evaluation
from sparsebench.tasks.generation import Generation
from sparsebench.tasks.tinyworld import TinyworldTask


@pytest.fixture(scope="module")
def tiny():
    return Ladder("tiny_100k", device="cpu").load()


def test_accuracy_is_that_of_the_gold_prefix_for_single_tokens(tiny):
    """With one token to generate, feeding tokens back changes nothing."""
    how = Evaluation(8)
    generated = Generation(("retrieval_single", "common_words"), 128, 6)
    scored = TinyworldTask(("retrieval_single", "common_words"), 128, 6, items=16)
    one = generated.evaluate(tiny, how, generated.prepare(tiny, None))
    other = scored.evaluate(tiny, how, scored.prepare(tiny, None))
    assert {row["sample"]: row["correct"] for row in one.samples} == {
        row["sample"]: row["correct"] for row in other.samples
    }
    assert one.scores["accuracy"].value == pytest.approx(other.scores["accuracy"].value)


def test_batches_do_not_matter_and_longer_answers_are_no_easier(tiny):
    task = Generation(("copy",), 128, 6, items=4)
    prepared = task.prepare(tiny, None)
    together = task.evaluate(tiny, Evaluation(64), prepared)
    single = task.evaluate(tiny, Evaluation(1), prepared)
    assert together.samples == single.samples
    assert all(len(question.answer) == 4 for question in prepared)
    assert together.notes == {"length": 128}


def test_documents_that_do_not_fit_are_refused(tiny):
    with pytest.raises(UserError, match=r"^task\.tasks=nothing: unknown tinyworld task"):
        Generation(("nothing",)).prepare(tiny, None)
    with pytest.raises(UserError, match=r"^task\.length=4096"):
        Generation(length=4096).prepare(tiny, None)


def test_sirius_decodes_the_task(command):
    words = ["model=tiny_100k", "task=generation", "task.samples=4", "task.length=96", "task.items=8"]
    words += ["method=sirius", "method.sirius.period=4", "method.sirius.tree_width=2", "sparsity=0.5"]
    answer = command(*words)
    assert answer.code == 0, answer.err
    (record,) = answer.records
    assert record["achieved"] == 0.5
    assert 1 <= record["advance"] <= 4
    assert 0 < record["density_draft"] < 1
    assert 0 <= record["accuracy"] <= 1
