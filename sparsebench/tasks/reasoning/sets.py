"""The four reasoning sets of the paper: their fields, their prompts (in our words) and their scorers.

A local file has one JSON object a line with the fields that the hub's data sets have:

- ``aime``: ``problem``, ``answer`` (30 problems of 2024)
- ``folio``: ``premises`` (a text, or a list of sentences), ``conclusion``, ``label`` (203; the hub's set is gated)
- ``temporal``: ``input`` (question and options), ``target`` such as ``(A)`` (250)
- ``musique``: ``question``, ``answer``, perhaps ``answer_aliases``; closed book: paragraphs are not read
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsebench.corpora import hub
from sparsebench.corpora.files import read_text
from sparsebench.errors import UserError
from sparsebench.tasks.reasoning import extraction

_FENCE = "*" * 7


@dataclass(frozen=True)
class Item:
    """One question: the prompt's text, and its right answers."""

    text: str
    golds: tuple[str, ...]


@dataclass(frozen=True)
class ReasoningSet:
    """``source``: dataset, configuration and split on the hub; ``read``: a row as an item (KeyError, TypeError or
    ValueError for another form); ``most``: how many of them are asked unless the user says, None for all."""

    source: tuple[str, str | None, str]
    read: Callable[[Any], Item]
    score: extraction.Scorer
    fields: str
    most: int | None = None


def load(name: str, file: str | None) -> list[Item]:
    """The set's items in the order of their source. UserError when it cannot be had or has another form."""
    chosen = SETS[name]
    rows = _local(file) if file is not None else _from_hub(name)
    where = f"task.file={file}" if file is not None else f"task.name={name}"
    found = []
    for number, row in rows:
        try:
            found.append(chosen.read(row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise UserError(f"{where}: line {number} is no {name} question ({why}); fields: {chosen.fields}") from None
    if not found:
        raise UserError(f"{where}: holds no question")
    return found


def _local(file: str) -> list[tuple[int, Any]]:
    rows = []
    for number, line in enumerate(read_text("task.file", file).splitlines(), 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except ValueError as error:
                raise UserError(f"task.file={file}: line {number} is not JSON ({error})") from None
    return rows


def _from_hub(name: str) -> list[tuple[int, Any]]:
    dataset, subset, split = SETS[name].source
    try:
        return list(enumerate(hub.load(dataset, split, subset=subset), 1))
    except UserError as error:
        raise UserError(f"task.name={name}: give its data with task.file=, or have a network: {error}") from None


def _aime(row: Any) -> Item:
    return Item(row["problem"].strip(), (str(int(row["answer"])),))


def _folio(row: Any) -> Item:
    premises = row["premises"]
    given = premises.strip() if isinstance(premises, str) else "\n".join(map(str.strip, premises))
    label = row["label"].strip().lower()
    label = {"unknown": "uncertain"}.get(label, label)  # the first release's word
    if label not in ("true", "false", "uncertain"):
        raise ValueError(f"label {row['label']!r} is none of True, False, Uncertain")
    text = (
        "Reason step by step from the premise alone. Does the conclusion follow from it (true), is it ruled out by it "
        "(false), or neither (uncertain)? End with one of these words: true, false, uncertain.\n"
        f"Premise:\n{_FENCE}\n{given}\n{_FENCE}\nConclusion:\n{_FENCE}\n{row['conclusion'].strip()}\n{_FENCE}"
    )
    return Item(text, (label,))


def _temporal(row: Any) -> Item:
    gold = extraction.letter(row["target"])
    if gold is None:
        raise ValueError(f"target {row['target']!r} is no option A to D")
    text = (
        "Work out the day's timeline to answer the question. Go step by step, and end with the letter of the right "
        f"option in parentheses.\n{row['input'].strip()}"
    )
    return Item(text, (gold,))


def _musique(row: Any) -> Item:
    golds = (str(row["answer"]), *map(str, row.get("answer_aliases") or ()))
    return Item(f"{row['question'].strip()}\nGive a final answer that is as short as possible.", golds)


SETS = {
    "aime": ReasoningSet(
        ("HuggingFaceH4/aime_2024", None, "train"), _aime, extraction.score_integer, "problem, answer"
    ),
    "folio": ReasoningSet(
        ("yale-nlp/FOLIO", None, "validation"), _folio, extraction.score_verdict, "premises, conclusion, label"
    ),
    "temporal": ReasoningSet(
        ("lukaemon/bbh", "temporal_sequences", "test"), _temporal, extraction.score_letter, "input, target"
    ),
    "musique": ReasoningSet(
        ("dgslibisey/MuSiQue", None, "validation"), _musique, extraction.score_text,
        "question, answer, answer_aliases", most=100,
    ),
}  # fmt: skip
