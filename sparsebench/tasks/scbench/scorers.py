"""How SCBench scores an answer, each by its task's rule: generated text and labels to 0 .. 1."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def substring(text: str, labels: Sequence[str]) -> float:
    """1 if any label stands in the text, case and all (kv, prefix_suffix, qa)."""
    return float(any(label in text for label in labels))


def names(text: str, labels: Sequence[str]) -> float:
    """The share of the labels that stand in the text, in any case, rounded to two digits (vt)."""
    return round(sum(label.lower() in text.lower() for label in labels) / len(labels), 2)


def number(text: str, labels: Sequence[str]) -> float:
    """1 if the first number of the text is the label (mf)."""
    found = _NUMBER.search(text)
    return float(found is not None and float(found[0]) == float(labels[0]))


def shouted(text: str, labels: Sequence[str]) -> float:
    """1 if any label stands in the upper-cased text (many_shot)."""
    return substring(text.upper(), labels)


def letter(text: str, labels: Sequence[str]) -> float:
    """1 if the text begins with a label, a capital letter (choice)."""
    return float(text.strip()[:1] in labels)


Scorer = Callable[[str, Sequence[str]], float]
SCORERS: dict[str, Scorer] = {
    "kv": substring,
    "prefix_suffix": substring,
    "vt": names,
    "mf": number,
    "many_shot": shouted,
    "qa": substring,
    "choice": letter,
}
MAX_NEW = {"kv": 150, "prefix_suffix": 150, "vt": 30, "mf": 5, "many_shot": 10, "qa": 40, "choice": 40}
"""Ids that are generated for each kind of question, as published: an answer that needs more is cut."""
