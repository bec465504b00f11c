"""Sessions of the data set's own form, and their encoding.

A record is ``{"id", "context", "multi_turns": [{"input", "answer", "options"?}]}``, one JSON object a line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sparsebench.corpora.files import read_text
from sparsebench.errors import UserError
from sparsebench.tasks.scbench.generators import Asked, Draft
from sparsebench.tasks.scbench.scorers import MAX_NEW, SCORERS
from sparsebench.tasks.scbench.session import Session, Turn

if TYPE_CHECKING:  # imports torch
    from sparsebench.models.base import LoadedModel


def read(name: str, file: str, turns: int, most: int) -> list[Draft]:
    """At most ``most`` drafts with at most ``turns`` questions of kind ``name`` each. UserError for another form."""
    drafts: list[Draft] = []
    for number, line in enumerate(read_text("task.file", file).splitlines(), 1):
        if not line.strip() or len(drafts) == most:
            continue
        try:
            row = json.loads(line)
            asked = [_asked(name, one) for one in row["multi_turns"][:turns]]
            context = row["context"] if isinstance(row["context"], str) else str(list(row["context"]))
        except (ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise UserError(f"task.file={file}: line {number} is not a session ({why})") from None
        drafts.append(Draft("", context, asked))
    if not drafts:
        raise UserError(f"task.file={file}: holds no session")
    return drafts


def _asked(name: str, turn: Any) -> Asked:
    given = turn["answer"]
    labels = [str(one) for one in given] if isinstance(given, list) else [str(given)]
    question = str(turn["input"])
    if name == "qa":
        question = f"Question: {question}\nAnswer:"
    elif name == "choice":
        options = [str(one) for one in turn["options"]]
        lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False)]
        labels = ["ABCD"[options.index(label)] if label in options else label for label in labels]
        question = "\n".join([question, *lines, "The letter of the right answer is"])
    return Asked(name, question, labels, ", ".join(labels))


def middle_cut(ids: list[int], most: int) -> list[int]:
    """The first and the last half of what is allowed, where there is more."""
    return ids if len(ids) <= most else ids[: most // 2] + ids[len(ids) - (most - most // 2) :]


def session(model: LoadedModel, name: str, context: list[int], asked: Sequence[Asked]) -> Session:
    """Encodes the questions; each begins with a blank line, as does what follows an answer."""
    tokenizer = model.tokenizer

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def score(ids: list[int], one: Asked) -> float:
        return SCORERS[one.kind](str(tokenizer.decode(ids, skip_special_tokens=True)), one.labels)

    turns = []
    for one in asked:
        question, gold = encode(f"\n\n{one.question}"), encode(f" {one.answer}")
        most = MAX_NEW[one.kind] if one.max_new is None else one.max_new
        turns.append(Turn(one.kind, question, gold, most, partial(score, one=one)))
    return Session(name, context, turns)


def tokens_needed(one: Session) -> int:
    """The most tokens that a session's cache comes to hold."""
    turns = sum(len(turn.question) + len(turn.gold) for turn in one.turns)
    return len(one.context) + turns + max(turn.max_new for turn in one.turns)
