"""Reasoning tasks: tokens counted exactly, cut answers, sampling, the tiny questions, local sets, bad input."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import Command

from sparsebench.errors import UserError
from sparsebench.models import reasoner
from sparsebench.models.base import LoadedModel
from sparsebench.models.tiny_reasoner import TinyReasoner
from sparsebench.tasks.base import Evaluation
from sparsebench.tasks.decoding import Sampler
from sparsebench.tasks.page import Page
from sparsebench.tasks.reasoning import answering, extraction, sets
from sparsebench.tasks.reasoning.answering import Decoding, Question
from sparsebench.tasks.reasoning.benchmark import ReasoningSetTask
from sparsebench.tasks.reasoning.task import Reasoning

END = 0


class Scripted(torch.nn.Module):
    """Says after each prompt what its script has for it, then the end of text; the cache is how far it is."""

    generation_config = None

    def __init__(self, scripts: dict[tuple[int, ...], list[int]], size: int) -> None:
        super().__init__()
        self.scripts, self.size = scripts, size
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Any, past_key_values: Any = None, **_: Any) -> Any:
        rows, at = past_key_values or ([tuple(x for x in row if x != END) for row in input_ids.tolist()], 0)
        said = [(self.scripts[row] + [END] * 99)[at] for row in rows]
        logits = torch.nn.functional.one_hot(torch.tensor(said), self.size).float()[:, None] * 50
        return SimpleNamespace(logits=logits, past_key_values=(rows, at + 1))


def scripted(texts: dict[str, str]) -> tuple[LoadedModel, list[Question]]:
    """A model with an answer for each question, which asks for 7."""
    tokenizer = reasoner.tokenizer()
    encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    scripts = {tuple(encode(question)): encode(answer) for question, answer in texts.items()}
    score = partial(extraction.score_integer, golds=["7"])
    questions = [Question(f"sum/{k}", "sum", encode(text), score) for k, text in enumerate(texts)]
    return LoadedModel(Scripted(scripts, len(tokenizer)), tokenizer, "scripted", 64), questions  # type: ignore[arg-type]


TEXTS = {
    "add a3 <think>": "a 3 . </think> 7",
    "add a4 b5 <think>": "a 4 . b 5 = 9 . </think> 9",
    "add a1 <think>": "7 7 7 7 7 7 7 7 7 7 7 7 7 7 7",
    "add b2 <think>": "7",
}


def test_tokens_are_those_after_the_prompt() -> None:
    model, questions = scripted(TEXTS)
    outcome = answering.evaluate(model, Evaluation(), questions, Decoding(12, 0.0, 1.0, 1, 0))
    rows = {row["sample"]: row for row in outcome.samples}
    assert [rows[f"sum/{k}"]["tokens"] for k in range(4)] == [5, 10, 12, 1]
    assert [rows[f"sum/{k}"]["correct"] for k in range(4)] == [1, 0, 0, 1]
    assert [rows[f"sum/{k}"]["truncated"] for k in range(4)] == [False, False, True, False]
    values = {name: score.value for name, score in outcome.scores.items()}
    assert values == {
        "accuracy": 0.5, "tokens": 7, "truncated": 0.25, "tokens_correct": 3, "tokens_wrong": 11,
        "tokens_per_correct": 14,
    }  # fmt: skip
    greedy = Decoding(12, 0.0, 1.0, 1, 0)
    alone = [answering.evaluate(model, Evaluation(), [one], greedy).samples[0] for one in questions]
    assert alone == outcome.samples, "a question's answer depends on what it is asked with"


def test_an_answer_that_ends_at_the_limit_counts_as_cut() -> None:
    model, questions = scripted({"add a3 <think>": "a 3 . </think> 7"})
    found = [
        answering.evaluate(model, Evaluation(), questions, Decoding(most, 0.0, 1.0, 1, 0)).samples[0] for most in (5, 6)
    ]
    assert [(row["tokens"], row["truncated"], row["correct"]) for row in found] == [(5, True, 0), (5, False, 1)]


def test_accuracy_by_length_has_as_many_bins_as_asked() -> None:
    model, questions = scripted(TEXTS)
    for bins, says in (
        (2, ["sum 1-5: 1 of 2", "sum 10-12: 0 of 2"]),
        (3, ["sum 1-5: 1 of 2", "sum 10-10: 0 of 1", "sum 12-12: 0 of 1"]),
    ):
        outcome = answering.evaluate(model, Evaluation(), questions, Decoding(12, 0.0, 1.0, 1, 0), bins)
        assert outcome.notes["accuracy_by_length"] == says
    rows = [{"task": kind, "tokens": 3, "correct": float(kind == "b")} for kind in "aab"]
    assert answering.by_length(rows, 5) == ["a 3-3: 0 of 2", "b 3-3: 1 of 1"]
    assert Reasoning().len_bins == ReasoningSetTask().len_bins == 5


def test_runs_are_averaged_by_question() -> None:
    rows = [
        {"sample": f"a/{k}/{run}", "question": f"a/{k}", "task": "a", "correct": float(k == 0), "tokens": 2 + run,
         "truncated": False}
        for k in (0, 1) for run in (0, 1)
    ]  # fmt: skip
    scores = answering.summary(rows)
    assert (scores["accuracy"].value, scores["accuracy"].n) == (0.5, 2)
    assert scores["accuracy"].stderr == pytest.approx(0.5)
    assert (scores["tokens"].value, scores["tokens"].stderr) == (2.5, 0)


def test_sampling() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(2, 1)
    draws = lambda p, t=1.0, seed="s": [  # noqa: E731
        Sampler([Random(f"{seed}{k}"), Random(k)], t, p)(logits)[0] for k in range(300)
    ]
    assert set(draws(1.0)) == {0, 1, 2, 3} and set(draws(0.79)) == {0, 1} and set(draws(0.5)) == {0}
    assert draws(1.0).count(0) == pytest.approx(150, abs=40)
    assert draws(1.0, t=0.05).count(0) == 300
    assert draws(1.0) == draws(1.0) != draws(1.0, seed="other")


def test_the_shipped_model_answers(command: Command) -> None:
    answer = command("method=dense", "model=tiny_reasoner", "task=reasoning", "task.samples=12", "model.device=cpu")
    assert answer.code == 0, answer.err
    record = answer.records[0]
    assert all(record[f"accuracy/{kind}"] > 0.7 for kind in ("arithmetic", "rules", "temporal", "facts"))
    assert record["accuracy_n"] == 48 and 8 < record["tokens"] < 20
    rows = answer.store.details("samples", record["run_id"], record["attempt"])
    assert len(rows) == 48 and all(row["tokens"] > 0 and row["steps"] >= 1 for row in rows)
    assert record["tokens"] == pytest.approx(sum(row["tokens"] for row in rows) / 48)


def test_questions_are_the_same_for_every_method_and_facts_come_once() -> None:
    model = TinyReasoner().load()
    task = Reasoning(samples=144, kinds=("facts", "rules"))
    first, second = task.prepare(model, None), task.prepare(model, None)
    assert [one.ids for one in first] == [one.ids for one in second]
    assert len({tuple(one.ids) for one in first if one.kind == "facts"}) == 144


ROWS: dict[str, list[dict[str, Any]]] = {
    "aime": [{"problem": "What is 3 + 4?", "answer": "007"}],
    "folio": [
        {"premises": ["All cats purr.", "Tom is a cat."], "conclusion": "Tom purrs.", "label": "True"},
        {"premises": "Some cats purr.", "conclusion": "Tom purrs.", "label": "Uncertain"},
    ],
    "temporal": [{"input": "When could Ann go?\nOptions:\n(A) 1pm\n(B) 2pm", "target": "(B)"}],
    "musique": [{"question": "On which river lies Ulm?", "answer": "Danube", "answer_aliases": ["Donau"]}],
}


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("name", "answer"),
    [("aime", "\\boxed{7}"), ("folio", "true"), ("temporal", "It is (B)."), ("musique", "The answer is Donau.")],
)
def test_prompts_and_scores_of_the_sets(name: str, answer: str, tmp_path: Path) -> None:
    (first, *_) = sets.load(name, str(written(tmp_path, name, ROWS[name])))
    assert sets.SETS[name].score(f"hm (A) 9 false </think> {answer}", first.golds)["correct"] == 1
    assert sets.SETS[name].score("no idea </think> hm", first.golds)["correct"] == 0
    stated = ROWS[name][0].get("problem") or ROWS[name][0].get("question")
    assert first.text == stated if name == "aime" else first.text.count("*" * 7) == (4 if name == "folio" else 0)


CONFIGS = {"aime": "aime_2024", "folio": "folio", "temporal": "bbh_temporal", "musique": "musique"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_local_set_is_run(name: str, tmp_path: Path, command: Command) -> None:
    file = written(tmp_path, name, ROWS[name])
    answer = command(
        "method=dense", "model=tiny_100k", f"task={CONFIGS[name]}", f"task.file={file}", "task.max_new_tokens=8",
        "task.runs=2", "model.device=cpu",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    (record,) = answer.records
    assert record["accuracy_n"] == len(ROWS[name]) and 0 < record["tokens"] <= 8
    assert ("f1" in record) is (name == "musique")
    rows = answer.store.details("samples", record["run_id"], record["attempt"])
    assert len(rows) == 2 * len(ROWS[name]) and rows[0]["sample"] == f"{name}/0/0"


def test_the_prompt_opens_a_thought() -> None:
    model = TinyReasoner().load()
    model.tokenizer.chat_template = "{{ messages[0]['content'] }} = <think>\n"
    page = Page(model.tokenizer, 64, opening="\n<think>\n")
    assert page.ids("add a3") == model.tokenizer("add a3 = <think>")["input_ids"]
    plain = Page(model.tokenizer, 64, chat=False, opening="\n<think>\n")
    assert plain.ids("add a3") == model.tokenizer("add a3 <think>")["input_ids"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["task=aime_2024"], "task.name=aime: give its data with task.file=, or have a network"),
        (["task=aime_2024", "task.file=missing.jsonl"], "task.file=missing.jsonl: cannot be read"),
        (["task=aime_2024", "task.temperature=0"], "task.runs=3: greedy answers are all alike"),
        (["task=folio", "task.file=FILE"], "is no folio question (KeyError: 'premises'); fields: premises, conclusion"),
        (["task=aime_2024", "task.file=FILE", "task.samples=9"], "task.samples=9: aime has 1 questions"),
        (["task=aime_2024", "task.file=FILE"], "task.max_new_tokens=32768: with prompts of"),
        (["task=reasoning"], "tiny_100k does not speak its language; give model=tiny_reasoner"),
        (["task=reasoning", "model=tiny_reasoner", "task.samples=145"], "of kind facts there are 144 questions"),
        (["task=reasoning", "model=tiny_reasoner", "task.max_new_tokens=128"], "beyond the context"),
        (["task=reasoning", "model=tiny_reasoner", "task.kinds=[sums]"], "not a choice"),
        (["task=reasoning_long_sums", "model=tiny_reasoner", "task.steps=5"], "kind arithmetic have 2 to 4"),
        (["task=reasoning", "model=tiny_reasoner", "task.len_bins=1"], "task.len_bins=1: must be a whole number >= 2"),
    ],
)
def test_bad_input(words: list[str], says: str, tmp_path: Path, command: Command) -> None:
    file = written(tmp_path, "rows", ROWS["aime"])
    given = [word.replace("FILE", str(file)) for word in words]
    model = [] if any(word.startswith("model=") for word in words) else ["model=tiny_100k"]
    answer = command("method=dense", *model, *given)
    assert answer.code == 2 and says in answer.err and len(answer.err.strip().splitlines()) == 1, answer.err


@pytest.mark.parametrize(
    ("name", "row"),
    [("folio", {**ROWS["folio"][0], "label": "maybe"}), ("temporal", {"input": "?", "target": "E"}), ("aime", [])],
)
def test_rows_of_another_form(name: str, row: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"line 1 is no {name} question"):
        sets.load(name, str(written(tmp_path, name, [row])))


def test_hundred_questions_of_musique_unless_told() -> None:
    assert ReasoningSetTask(name="musique").samples is None and sets.SETS["musique"].most == 100
