"""What a generated text answers, and whether that is right: the rules of the four reasoning sets.

Only what follows the closing think tag is read; a text without one (the tag dropped, or the text cut) is read as a
whole: scorers that insist on the tag lose a third of the released answers. The rules are ours; the paper's are unknown.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

CLOSING = "</think>"

_INTEGER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.0+)?(?!\w|\.\d)")
_VERDICT = re.compile(r"\b(true|false|uncertain)\b", re.IGNORECASE)
_IN_PARENTHESES = re.compile(r"\(\s*([A-D])\s*\)")
_ALONE = re.compile(r"(?<![\w'])([A-D])(?![\w'])")
_SAID = re.compile(r"answer\**\s*(?:is\b|:)[\s:*]*(.+)", re.IGNORECASE)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")

Scorer = Callable[[str, Sequence[str]], dict[str, float]]
"""(text, right answers) -> ``correct`` and perhaps further scores, each from 0 to 1."""


def against(score: Scorer, golds: Sequence[str]) -> Callable[[str], dict[str, float]]:
    """A text's scores when these answers are right."""
    return lambda text: score(text, golds)


def final(text: str) -> str:
    """What stands behind the last closing think tag; the whole text without one."""
    return text.rpartition(CLOSING)[2]


def boxed(text: str) -> list[str]:
    """What stands in each ``\\boxed{...}``, braces inside it matched; an unclosed one is none."""
    found = []
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth, begin = 1, match.end()
        for at in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                found.append(text[begin:at].strip())
                break
    return found


def integer(text: str) -> int | None:
    """The last boxed integer of the final text, else its last integer. ``1,024`` and ``025`` and ``7.0`` are
    integers, ``7.5`` holds none."""
    said = final(text)
    framed = [number for one in boxed(said) for number in _INTEGER.findall(one)[-1:]]
    numbers = framed or _INTEGER.findall(said)
    return int(numbers[-1].replace(",", "").partition(".")[0]) if numbers else None


def verdict(text: str) -> str | None:
    """The last of true, false and uncertain in the final text."""
    found = _VERDICT.findall(final(text))
    return found[-1].lower() if found else None


def letter(text: str) -> str | None:
    """The last option letter A to D in parentheses in the final text, else the last boxed one, else the last that
    stands alone."""
    said = final(text)
    framed = [match for one in boxed(said) for match in _ALONE.findall(one)]
    found = _IN_PARENTHESES.findall(said) or framed or _ALONE.findall(said)
    return found[-1] if found else None


def short_answer(text: str) -> str:
    """The last boxed text, else what the last line with "answer" says after it, else the whole final text: exact
    match on a whole sentence is always 0."""
    said = final(text).strip()
    framed = boxed(said)
    if framed:
        return framed[-1]
    lines = _SAID.findall(said)
    return lines[-1].strip().rstrip(".") if lines else said


def normalised(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single spaces."""
    plain = "".join(one for one in text.lower() if one not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def token_f1(text: str, gold: str) -> float:
    """F1 of the two bags of normalised words; two empty ones agree."""
    words, wanted = normalised(text).split(), normalised(gold).split()
    if not words or not wanted:
        return float(words == wanted)
    shared = (Counter(words) & Counter(wanted)).total()
    return 2 * shared / (len(words) + len(wanted))


def score_integer(text: str, golds: Sequence[str]) -> dict[str, float]:
    """AIME: equal integers."""
    return {"correct": float(integer(text) in [int(gold) for gold in golds])}


def score_verdict(text: str, golds: Sequence[str]) -> dict[str, float]:
    """FOLIO: the same verdict in any case."""
    return {"correct": float(verdict(text) in [gold.lower() for gold in golds])}


def score_letter(text: str, golds: Sequence[str]) -> dict[str, float]:
    """Temporal sequences: the same letter."""
    return {"correct": float(letter(text) in golds)}


def score_text(text: str, golds: Sequence[str]) -> dict[str, float]:
    """MuSiQue, the best over the answer and its aliases: ``correct`` is exact match and ``f1`` that of words, both of
    the short answer; ``contains``: an answer stands in the final text, in one piece."""
    short = short_answer(text)
    read = [f" {normalised(one)} " for one in (final(text), short)]  # the former may hold \\boxed as a word
    return {
        "correct": float(normalised(short) in map(normalised, golds)),
        "f1": max(token_f1(short, gold) for gold in golds),
        "contains": float(any(f" {normalised(gold)} " in one for gold in golds for one in read)),
    }
