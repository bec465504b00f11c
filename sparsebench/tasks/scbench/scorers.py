"""How SCBench scores an answer, each by its task's rule: generated text and labels to 0 .. 1."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_WORD = re.compile(r"\w+|[^\w\s]")
_FUNCTION = re.compile(r"^def .*(?:\n(?:[ \t].*)?)*", re.MULTILINE)
SIMILAR = 0.8  # from which on code counts as the function that was asked for


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


def function(text: str, labels: Sequence[str]) -> float:
    """1 if the text's first function is most like the first label, of all labels, by at least 0.8 (repoqa)."""
    found = _FUNCTION.search(text)
    code = found[0] if found else text
    right, *others = (similarity(code, label) for label in labels)
    return float(right >= SIMILAR and right > max(others, default=0.0))


def similarity(text: str, reference: str) -> float:
    """BLEU of one text: the geometric mean of its 1- to 4-grams' precisions, less if it is the shorter one."""
    words, wanted = _WORD.findall(text), _WORD.findall(reference)
    logs = 0.0
    for size in range(1, 5):
        have, want = (Counter(zip(*(x[i:] for i in range(size)), strict=False)) for x in (words, wanted))
        shared = (have & want).total()
        if not shared:
            return 0.0
        logs += math.log(shared / have.total()) / 4
    return math.exp(logs + min(0.0, 1 - len(wanted) / len(words)))


def rouge(text: str, labels: Sequence[str]) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words with the best label, in any case (summary)."""
    return max(_rouge(text.lower(), label.lower()) for label in labels)


def _rouge(text: str, reference: str) -> float:
    words, wanted = re.findall(r"\w+", text), re.findall(r"\w+", reference)
    row = [0] * (len(wanted) + 1)  # the longest common subsequence with each beginning of what is wanted
    for word in words:
        before = 0
        for place, other in enumerate(wanted, 1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return 2 * row[-1] / (len(words) + len(wanted)) if row[-1] else 0.0


Scorer = Callable[[str, Sequence[str]], float]
SCORERS: dict[str, Scorer] = {
    "kv": substring,
    "prefix_suffix": substring,
    "vt": names,
    "mf": number,
    "many_shot": shouted,
    "qa": substring,
    "choice": letter,
    "repoqa": function,
    "summary": rouge,
    "needle": substring,
}
MAX_NEW = {
    "kv": 150, "prefix_suffix": 150, "vt": 30, "mf": 5, "many_shot": 10, "qa": 40, "choice": 40, "repoqa": 1024,
    "summary": 200, "needle": 15,
}  # fmt: skip
"""Ids that are generated for each kind of question, as published: an answer that needs more is cut."""
