"""The tinyworld documents as multiple choice, for the harness: no file is read and no network used.

The harness calls ``dataset`` for each task in ``tinyworld/*.yaml``. The prompt is the document up to an
answer; the choices are the answer and three others, made by replacing one word of it by another of its
class (for sums: another sum with as many digits), taken from the document while it has enough of them,
so that having been seen does not give the answer away.
"""

from __future__ import annotations

from random import Random
from typing import Any

from sparsebench.corpora import tinyworld

LENGTH, SAMPLES = 256, 100
_CLASSES = (tinyworld.PEOPLE, tinyworld.PLACES, tinyworld.OBJECTS)
_DISTRACTORS = 3


def documents(task: str, length: int, samples: int) -> list[dict[str, Any]]:
    """One entry per question of the documents of seeds 0 to ``samples - 1``: ``context``, ``choices``
    (4 texts), ``gold`` (index of the answer), ``seed``, ``question``.

    ValueError for an unknown task or a length in which the facts do not fit.
    """
    found = []
    for seed in range(samples):
        document = tinyworld.document(task, length, seed)
        for question, (start, end) in enumerate(document.answers):
            rng = Random(f"tinyworld/harness/{task}/{length}/{seed}/{question}")
            answer = document.tokens[start:end]
            choices = [answer, *_distractors(rng, answer, document.tokens[: document.question])]
            rng.shuffle(choices)
            found.append(
                {
                    "context": "".join(document.tokens[1:start]),  # without <|end|>: a token, not a text
                    "choices": ["".join(choice) for choice in choices],
                    "gold": choices.index(answer),
                    "seed": seed,
                    "question": question,
                }
            )
    return found


def dataset(
    tinyworld_task: str, tinyworld_length: int = LENGTH, tinyworld_samples: int = SAMPLES, **metadata: Any
) -> dict[str, Any]:
    """The harness's ``custom_dataset``: the split ``test`` of one task, in memory."""
    from datasets import Dataset

    return {"test": Dataset.from_list(documents(tinyworld_task, tinyworld_length, tinyworld_samples))}


def _distractors(rng: Random, answer: tuple[str, ...], context: tuple[str, ...]) -> list[tuple[str, ...]]:
    if answer[0].strip().isdigit():
        return _other_sums(rng, answer)
    place = rng.randrange(len(answer))
    family = next(family for family in _CLASSES if answer[place].strip() in family)
    others = [" " + word for word in family if " " + word != answer[place]]
    rng.shuffle(others)
    others.sort(key=lambda word: word not in context)  # stable: words of the document come first
    return [(*answer[:place], word, *answer[place + 1 :]) for word in others[:_DISTRACTORS]]


def _other_sums(rng: Random, answer: tuple[str, ...]) -> list[tuple[str, ...]]:
    """``answer``: the digits of a sum of two two-digit numbers, then the full stop."""
    total = int("".join(answer[:-1]))
    same_size = range(20, 100) if total < 100 else range(100, 199)
    found = rng.sample([value for value in same_size if value != total], _DISTRACTORS)
    return [(f" {value // 10 ** (len(str(value)) - 1)}", *str(value)[1:], answer[-1]) for value in found]
