"""Answers to questions, the tokens that each took, and what both come to.

``tokens`` are those that the model writes after the prompt, the thought included and the end of text not: the decode
steps that an answer costs. An answer that reaches the limit is truncated: it counts with its length, and as wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import Any

from sparsebench.errors import UserError
from sparsebench.models.base import LoadedModel
from sparsebench.tasks.base import Evaluation, Outcome, Score
from sparsebench.tasks.decoding import Sampler, Stream, likeliest
from sparsebench.tasks.reasoning.lengths import BINS, accuracy_by_length


@dataclass(frozen=True)
class Question:
    """``name``: stable, ``<kind>/<number>``; ``ids``: the prompt, thought opened; ``score``: a generated text's
    ``correct`` and further scores; ``steps``: of a right thought, where that is known."""

    name: str
    kind: str
    ids: list[int]
    score: Callable[[str], dict[str, float]]
    steps: int | None = None


@dataclass(frozen=True)
class Decoding:
    """``max_new``: most tokens of an answer; ``temperature`` 0 is greedy; ``runs``: answers to each question."""

    max_new: int
    temperature: float
    top_p: float
    runs: int
    seed: int

    def __post_init__(self) -> None:
        if self.runs > 1 and self.temperature == 0:
            raise UserError(f"task.runs={self.runs}: greedy answers are all alike; give task.temperature above 0")

    def check(self, questions: Sequence[Question], model: LoadedModel) -> None:
        """UserError when a prompt and its answer may not fit the model."""
        longest = max(len(one.ids) for one in questions)
        if longest + self.max_new > model.context:
            raise UserError(
                f"task.max_new_tokens={self.max_new}: with prompts of {longest} tokens that is beyond the context of "
                f"{model.name} ({model.context})"
            )


def evaluate(
    model: LoadedModel, how: Evaluation, questions: Sequence[Question], decoding: Decoding, len_bins: int = BINS
) -> Outcome:
    """One row an answer (``sample``, ``task`` (the kind), ``correct``, ``tokens``, ``truncated``, ``steps``, further
    scores), the scores of ``summary``, and ``by_length`` in ``len_bins`` bins."""
    asked = [(question, run) for run in range(decoding.runs) for question in questions]
    asked.sort(key=lambda one: -len(one[0].ids))  # rows of a batch as alike as can be
    longest = len(asked[0][0].ids) + decoding.max_new
    size = max(1, how.batch_size * 512 // longest)
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for start in range(0, len(asked), size):
        batch = asked[start : start + size]
        for (question, run), ids in zip(batch, _written(model, batch, decoding), strict=True):
            found[question.name, run] = _row(model, question, ids, decoding, run)
        how.progress(len(found), len(asked))
    rows = [found[question.name, run] for question in questions for run in range(decoding.runs)]
    notes = {"max_new_tokens": decoding.max_new, "accuracy_by_length": by_length(rows, len_bins)}
    return Outcome(summary(rows), rows, notes)


def _written(model: LoadedModel, batch: Sequence[tuple[Question, int]], decoding: Decoding) -> list[list[int]]:
    choose: Callable[..., list[int]] = likeliest
    if decoding.temperature > 0:
        rngs = [Random(f"reasoning/{decoding.seed}/{question.name}/{run}") for question, run in batch]
        choose = Sampler(rngs, decoding.temperature, decoding.top_p)
    return Stream(model).feed([question.ids for question, _ in batch]).write(decoding.max_new, choose=choose)


def _row(model: LoadedModel, question: Question, ids: list[int], decoding: Decoding, run: int) -> dict[str, Any]:
    # special tokens stay in the text: the closing think tag is one of them in some tokenizers
    scores = question.score(str(model.tokenizer.decode(ids, skip_special_tokens=False)))
    truncated = len(ids) == decoding.max_new
    if truncated:
        scores = dict.fromkeys(scores, 0.0)
    name = question.name if decoding.runs == 1 else f"{question.name}/{run}"
    row: dict[str, Any] = {"sample": name, "question": question.name, "task": question.kind, **scores}
    row |= {"tokens": len(ids), "truncated": truncated}
    return row if question.steps is None else {**row, "steps": question.steps}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Score]:
    """``accuracy`` (the mean over kinds), ``f1`` and ``contains`` where there are any, ``tokens`` a question, both also
    by kind; ``tokens_correct`` and ``tokens_wrong``: the mean over right and over wrong answers, where there are any;
    ``tokens_per_correct``: all tokens over right answers; ``truncated``: share of answers.

    Answers to one question are averaged before standard errors are taken, but for right and wrong ones apart."""
    kinds = list(dict.fromkeys(str(row["task"]) for row in rows))
    scores: dict[str, Score] = {}
    columns = {"accuracy": "correct", "f1": "f1", "contains": "contains", "tokens": "tokens", "truncated": "truncated"}
    for name, column in columns.items():
        if any(column not in row for row in rows):
            continue
        each = {kind: _mean([row for row in rows if row["task"] == kind], column) for kind in kinds}
        scores[name] = Score.average([*each.values()])
        if len(kinds) > 1 and name in ("accuracy", "tokens"):
            scores |= {f"{name}/{kind}": score for kind, score in each.items()}
    for name, right in (("tokens_correct", 1.0), ("tokens_wrong", 0.0)):
        own = [float(row["tokens"]) for row in rows if row["correct"] == right]
        if own:
            scores[name] = Score.mean(own)
    correct = sum(row["correct"] for row in rows)
    if correct:
        scores["tokens_per_correct"] = Score(sum(row["tokens"] for row in rows) / correct, None, len(rows))
    return scores


def by_length(rows: Sequence[dict[str, Any]], bins: int) -> list[str]:
    """Accuracy by length, kind by kind: ``rules 7-9: 0.95 of 20`` says that 95% of the 20 answers to rules that have 7
    to 9 tokens are right."""
    said = []
    for kind in dict.fromkeys(str(row["task"]) for row in rows):
        own = [row for row in rows if row["task"] == kind]
        found = accuracy_by_length([row["tokens"] for row in own], [row["correct"] for row in own], bins)
        said += [f"{kind} {one.low:g}-{one.high:g}: {one.accuracy:.3g} of {one.n}" for one in found]
    return said


def _mean(rows: Sequence[dict[str, Any]], column: str) -> Score:
    by_question: dict[str, list[float]] = {}
    for row in rows:
        by_question.setdefault(row["question"], []).append(float(row[column]))
    return Score.mean([fmean(values) for values in by_question.values()])
