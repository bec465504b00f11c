"""The three question answering tasks: SQuAD (open), QuALITY and TOEFL (multiple choice) among other documents.

A question names the document that it is about, so nothing has to be retrieved but that document. The data come from a
local file in the form of the original data set, or from the hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from sparsebench.corpora import hub
from sparsebench.corpora.files import read_text
from sparsebench.errors import UserError
from sparsebench.tasks.page import Page
from sparsebench.tasks.sparse_frontier import metrics
from sparsebench.tasks.sparse_frontier.prompt import Prompt, Sample

ALONE = 8172 - 64
"""Most tokens of a prompt with its own document alone, so that every length from there on asks the same questions."""
_SPARED = 25  # tokens that the cut document leaves free
_HUB = {
    "qa_squad": ("rajpurkar/squad_v2", "validation", None),
    # the exam sets of L-Eval; read as files, since the data set itself is a script
    "qa_quality": ("json", "test", "hf://datasets/L4NLP/LEval/LEval/Exam/quality.jsonl"),
    "qa_toefl": ("json", "test", "hf://datasets/L4NLP/LEval/LEval/Exam/tpo.jsonl"),
}


@dataclass(frozen=True)
class Question:
    """One question about one text. ``golds``: right answers, or with ``options`` the letters of the right ones."""

    question: str
    context: str
    golds: tuple[str, ...]
    options: bool = False


def load(name: str, file: str | None) -> list[Question]:
    """The questions of ``qa_squad``, ``qa_quality`` or ``qa_toefl`` in the order of their source; repeated ones and
    those without an answer (a letter, or words that are scored) are left out. UserError when the source cannot be had
    or holds none."""
    rows = _local(file) if file is not None else _from_hub(name)
    where = f"task.file={file}" if file is not None else f"task.name={name}"
    try:
        found = [one for row in rows for one in _questions(row) if one.golds]
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        known = "SQuAD, QuALITY or L-Eval JSON, or rows of context, question, and answers or options with answer"
        raise UserError(f"{where}: not in a known form ({type(error).__name__}: {error}); known: {known}") from None
    if any(one.options != (name != "qa_squad") for one in found):
        asks = "words, but has options" if name == "qa_squad" else "letters A to D, but has other answers"
        raise UserError(f"{where}: {name} asks for {asks}")
    distinct = {(one.question, one.context): one for one in reversed(found)}
    kept = [one for one in found if distinct[one.question, one.context] is one]
    if not kept:
        raise UserError(f"{where}: holds no question with an answer")
    return kept


def _local(file: str) -> list[Any]:
    text = read_text("task.file", file)
    try:
        if Path(file).suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"task.file={file}: not valid JSON: {error}") from None
    return found if isinstance(found, list) else [found]


def _from_hub(name: str) -> list[Any]:
    dataset, split, files = _HUB[name]
    try:
        return list(hub.load(dataset, split, files=files))
    except UserError as error:
        raise UserError(f"task.name={name}: give its data with task.file=, or have a network: {error}") from None


def _questions(row: Any) -> Iterator[Question]:
    """The questions of one row of any known form."""
    if "data" in row:  # a SQuAD file
        for paragraph in (one for article in row["data"] for one in article["paragraphs"]):
            for asked in paragraph["qas"]:
                yield Question(asked["question"].strip(), paragraph["context"].strip(), _texts(asked["answers"]))
    elif "instructions" in row:  # L-Eval: options are part of the question, several letters may be right
        for asked, right in zip(row["instructions"], row["outputs"], strict=True):
            yield Question(asked.strip(), row["input"].strip(), _letters(right), options=True)
    elif "questions" in row:  # QuALITY
        for asked in row["questions"]:
            yield _choice(asked["question"], row["article"], asked["options"], int(asked["gold_label"]) - 1)
    elif "options" in row:
        right = row["answer"]
        place = right if isinstance(right, int) else [*"ABCD"].index(right)
        yield _choice(row["question"], row["context"], row["options"], place)
    else:
        yield Question(row["question"].strip(), row["context"].strip(), _texts(row["answers"]))


def _texts(answers: Any) -> tuple[str, ...]:
    """Answers as SQuAD's file, its rows on the hub, a list or a text have them; each once, if any word is scored."""
    found = answers["text"] if isinstance(answers, dict) else answers
    found = [found] if isinstance(found, str) else found
    texts = dict.fromkeys(one["text"] if isinstance(one, dict) else str(one) for one in found)
    return tuple(text for text in texts if metrics.words(text))


def _letters(text: str) -> tuple[str, ...]:
    """The right letters in one text: nothing but letters, or one before its option, as in ``(B) on the boat``."""
    if re.fullmatch(r"[\sA-D,;.()&]*", text):
        found = sorted({one for one in text if one in "ABCD"})
    else:
        found = re.findall(r"^\W*([A-D])\b", text)
    return ("".join(found),) if found else ()


def _choice(question: str, context: str, options: list[str], place: int) -> Question:
    """``place``: of the right option, from 0. ValueError when there is no such option."""
    if not 0 <= place < min(len(options), 4):
        raise ValueError(f"no option {place + 1} among {len(options)}")
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False)]
    return Question("\n".join([question.strip(), *lines]), context.strip(), ("ABCD"[place],), options=True)


@dataclass
class QuestionTask:
    """Any of the three. ``questions``: in the order of their source; ``seed`` shuffles them once."""

    name: str
    questions: list[Question]
    seed: int
    kept: list[Question] = field(default_factory=list)

    def select(self, page: Page, samples: int) -> None:
        """Keeps the questions whose own document leaves room, in the task's order. UserError for too few."""
        most = min(ALONE, page.length)
        fits = [one for one in self.questions if page.length - page.room(self._prompt(one, [one.context], 0)) <= most]
        if len(fits) < samples:
            raise UserError(
                f"task.samples={samples}: only {len(fits)} questions of {self.name} have documents that fit "
                f"task.length={page.length}"
            )
        Random(self.seed).shuffle(fits)
        self.kept = fits
        self.contexts = list(dict.fromkeys(one.context for one in fits))

    def sample(self, index: int, rng: Random, page: Page) -> Sample:
        """Question ``index`` with as many other documents as fit: those that do not are skipped, the last is cut."""
        asked = self.kept[index]
        others = [one for one in self.contexts if one != asked.context]
        rng.shuffle(others)
        left = page.room(self._prompt(asked, [asked.context], 0))
        added: list[str] = []
        rest: list[str] = []
        for one in others:
            cost = page.count(_document(len(others), one))
            (added if cost <= left else rest).append(one)
            left -= cost if cost <= left else 0
        if rest:
            added.append(_cut(rest[0], left - _SPARED, page))
        order = rng.random()

        def build(count: int) -> Prompt:
            documents = [asked.context, *(one for one in added[:count] if one)]
            shuffled = list(range(len(documents)))
            Random(f"{order}/{count}").shuffle(shuffled)
            return self._prompt(asked, [documents[place] for place in shuffled], shuffled.index(0))

        count = len(added)
        while count and page.room(build(count)) < 0:  # the pieces' counts do not always add up
            count -= 1
        text, ids = page.exact(build(count))
        if self.name == "qa_squad":
            return Sample(text, ids, asked.golds[0], partial(metrics.f1, golds=asked.golds))
        return Sample(text, ids, asked.golds[0], partial(metrics.letters, gold=asked.golds[0]))

    def _prompt(self, asked: Question, documents: list[str], place: int) -> Prompt:
        is_open = self.name == "qa_squad"
        return Prompt(
            task="The text below consists of numbered documents. Answer a question about one of them.",
            question=f"Answer this question from Document {place + 1}.\n{asked.question}",
            context="\n\n".join(_document(number, one) for number, one in enumerate(documents, 1)),
            form="<answer in a few words>" if is_open else "<letter or letters>",
            rules="Answer in as few words as possible, with words of the document."
            if is_open
            else "Write only the letter of the right option, or the letters if several are right.",
        )


def _document(number: int, text: str) -> str:
    return f"Document {number}:\n{text}"


def _cut(text: str, tokens: int, page: Page) -> str:
    """The longest beginning in whole words with at most so many tokens; "" if there is none."""
    words = text.split()
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(page.plain(_document(0, " ".join(words[:middle])))) <= tokens
        low, high = (middle, high) if fits else (low, middle - 1)
    return " ".join(words[:low])
