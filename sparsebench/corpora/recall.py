"""The pair language: one token holds a whole fact, one token asks for it, one token answers.

``k07=v03`` says that key 7 has value 3, ``k07?`` asks for it, ``v03`` answers. A model of two tiny layers learns to
recall such facts in seconds, and what a cache method drops is exactly what it can no longer answer. The two-token form
(key, then value) needs an induction head and far more training.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from sparsebench.corpora.base import Corpus
from sparsebench.declare import corpus, option
from sparsebench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

KEYS, VALUES = 64, 16
QUERY, ANSWER = KEYS * VALUES, KEYS * VALUES + KEYS  # first ids of the queries and of the answers
SIZE = ANSWER + VALUES


def vocabulary() -> list[str]:
    """The 1,104 tokens in the order of their ids: 16 * key + value, 1024 + key, 1088 + value."""
    pairs = [f"k{key:02}=v{value:02}" for key in range(KEYS) for value in range(VALUES)]
    return [*pairs, *(f"k{key:02}?" for key in range(KEYS)), *(f"v{value:02}" for value in range(VALUES))]


@dataclass(frozen=True)
class Facts:
    """A context: ``ids`` of its pair tokens in order, and the facts (key, value) that they hold, each once."""

    ids: list[int]
    facts: list[tuple[int, int]]


def draw(rng: Random, items: int, copies: int = 1, scattered: bool = False) -> Facts:
    """``items`` pair tokens in random order, every fact ``copies`` times (the last one fewer if they do not divide), in
    a row or ``scattered``. ValueError when there are not so many keys."""
    distinct = -(-items // copies)
    if distinct > KEYS:
        raise ValueError(f"{items} pairs of {copies} copies need {distinct} keys, there are {KEYS}")
    facts = [(key, rng.randrange(VALUES)) for key in rng.sample(range(KEYS), distinct)]
    ids = [VALUES * key + value for key, value in facts for _ in range(copies)][:items]
    if scattered:
        rng.shuffle(ids)
    return Facts(ids, facts)


def dialogue(rng: Random, items: int, questions: int) -> list[int]:
    """A context of ``items`` facts, then so many different questions, each followed by its answer."""
    context = draw(rng, items)
    asked = rng.sample(context.facts, questions)
    return context.ids + [token for key, value in asked for token in (QUERY + key, ANSWER + value)]


@corpus(name="recall", version=1)
@dataclass(frozen=True)
class Recall(Corpus):
    """The pair language of the recall model: facts, then questions and answers."""

    seqlen: int | None = option(80, "tokens of a document: three fifths are facts", low=10, high=100)
    count: int = option(256, "documents of a split, for perplexity", low=1, high=1_000_000)

    def documents(self, split: str) -> list[str]:
        words = vocabulary()
        return [
            " ".join(words[token] for token in self._document(f"{split}/{index}", self.seqlen or 80))
            for index in range(self.count)
        ]

    @staticmethod
    def _document(seed: str, length: int) -> list[int]:
        questions = length // 5
        return dialogue(Random(f"recall/{seed}"), length - 2 * questions, questions)

    def windows(self, tokenizer: PreTrainedTokenizerBase, context: int, seed: int) -> Tensor:
        """Whole documents: (nsamples, seqlen) int64. UserError for a model of another language or a short context."""
        import torch

        length = self.seqlen or min(context, 80)
        if tokenizer.get_vocab().get("k00=v00") != 0:
            raise UserError("calibration=recall: the pair language is only for model=pair_recall")
        if not 10 <= length <= min(context, 100):
            raise UserError(f"calibration.seqlen={length}: must be from 10 to 100 and within the context of {context}")
        return torch.tensor([self._document(f"train/{seed}/{i}", length) for i in range(self.nsamples)])
