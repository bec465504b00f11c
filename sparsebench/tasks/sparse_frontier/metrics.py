"""How the nine tasks are scored: string rules, as the released code of The Sparse Frontier applies them.

Each function takes the generated text and what is right, and returns a score from 0 to 1, or None where the released
code leaves the sample out of its mean. What happens without an answer tag differs by task: the whole text is read
(niah, vt, retrieval, filtering), nothing is found (cwe, QA), or the sample is left out (multihop).
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_NEEDLE = re.compile(r"(\d+)\.\s*The answer for\s+(\S+)\s+is:?\s*(.*?)\s*(?:\.|$)", re.IGNORECASE | re.MULTILINE)
_LISTED = re.compile(r"^\d+(?:\s*[.)\-]\s*|\s+)(\S.*)$")
_NUMBERED = re.compile(r"^\s*(\d+)\s*[.:)]\s*(.*?)\s*$", re.MULTILINE)
_ARTICLE = re.compile(r"^(?:a|an|the)\s+")
_DROPPED = "a an the and or about to".split()


def answer(text: str) -> str | None:
    """What stands in the first answer tag; None without one."""
    match = _ANSWER.search(text)
    return match[1].strip() if match else None


def niah(text: str, answers: Sequence[tuple[str, str]]) -> float:
    """The share of (key, value) pairs that stand at their own number (from 1); a number's first line counts."""
    found: dict[int, tuple[str, str]] = {}
    for number, key, value in _NEEDLE.findall(_or_all(text)):
        found.setdefault(int(number), (key, _plain(value)))
    right = [found.get(number) == (key, _plain(value)) for number, (key, value) in enumerate(answers, 1)]
    return sum(right) / len(right)


def variables(text: str, gold: str) -> float:
    """IoU of the upper-cased words, without any "VAR " (punctuation is not stripped); 1 if both are empty."""
    found, right = (set(one.upper().replace("VAR ", "").split()) for one in (_or_all(text), gold))
    return _iou(found, right) if found or right else 1.0


def common_words(text: str, gold: Sequence[str]) -> float:
    """IoU of the words on numbered lines in the answer tag; 0 without the tag."""
    lines = [_LISTED.match(line.strip()) for line in (answer(text) or "").splitlines()]
    return _iou({match[1].strip().lower() for match in lines if match}, {word.lower() for word in gold})


def retrieval(text: str, gold: str) -> float:
    """The share of gold's numbered lines whose text is the same but for case and a leading article."""
    right, found = _numbered(gold), _numbered(_or_all(text))
    return sum(found.get(number) == value for number, value in right.items()) / len(right)


def multihop(text: str, gold: str) -> float | None:
    """1 if the answer is gold but for case, spaces and a leading article; None without an answer tag."""
    found = answer(text)
    return None if found is None else float(_bare(found) == _bare(gold))


def chapters(text: str, gold: str) -> float | None:
    """IoU of chapter numbers: those after the word chapter, or all numbers if there is none; None for an empty text."""
    read = _or_all(text)
    if not read.strip() or not gold.strip():
        return None
    return _iou(_chapter_numbers(read), _chapter_numbers(gold))


def letters(text: str, gold: str) -> float:
    """1 if the answer's letters A to D, sorted, are gold's; the words "Question n." are not read."""
    found = re.sub(r"QUESTION\s*\d+\s*\.?", "", (answer(text) or "").upper())
    return float(sorted(one for one in found if one in "ABCD") == sorted(gold.upper()))


def f1(text: str, golds: Sequence[str]) -> float:
    """The best F1, rounded to two digits, between the SETS of words of the answer and of one gold text."""
    found = words(answer(text) or "")
    return max(_set_f1(found, words(gold)) for gold in golds)


def _or_all(text: str) -> str:
    found = answer(text)
    return text if found is None else found


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _bare(text: str) -> str:
    return _ARTICLE.sub("", _plain(text))


def _iou(found: set[str], right: set[str]) -> float:
    return len(found & right) / len(found | right) if found | right else 0.0


def _numbered(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, value in _NUMBERED.findall(text):
        found.setdefault(number.lstrip("0"), _bare(value))
    return found


def _chapter_numbers(text: str) -> set[str]:
    found = re.findall(r"chapter\s+(\d+)", text, re.IGNORECASE) or re.findall(r"\d+", text)
    return {one.lstrip("0") for one in found}


def words(text: str) -> set[str]:
    kept = "".join(one for one in text.lower() if one not in string.punctuation)
    return {word for word in kept.split() if word not in _DROPPED}


def _set_f1(found: set[str], right: set[str]) -> float:
    shared = len(found & right)
    if shared == 0:
        return 0.0
    precision, recall = shared / len(found), shared / len(right)
    return round(2 * precision * recall / (precision + recall), 2)
