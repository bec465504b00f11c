"""Chains of thought: procedural questions whose documents write every step before the answer.

Four kinds stand in for the sets that reasoning models are scored on, each in words of its own:

- ``arithmetic`` (AIME): a sum with its intermediate results: ``add a3 b5 <think> a 3 . b 5 = 8 . </think> 8``
- ``rules`` (FOLIO): from what is so (``old!``), by rules (``old>shy``, ``shy>not-tall``) to what is asked (``tall?``):
  true, false or uncertain
- ``temporal`` (BIG-Bench Hard's temporal sequences): a day's observations in any order; which option is free?
- ``facts`` (MuSiQue, closed book): who lives where, which river flows there; 144 people, known from training alone

A document is a question that ends with ``<think>``, the steps, ``</think>``, the answer and ``<|end|>``. As in the pair
language (``recall``), what a question says is one word a statement: looking up statements of two words needs induction
heads, which take far more training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING

from sparsebench.corpora.base import Corpus
from sparsebench.declare import corpus, option
from sparsebench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

END, THINK, ANSWER = "<|end|>", "<think>", "</think>"
LONGEST = 28  # tokens of a document, at most
STEPS = {"arithmetic": (2, 4), "rules": (1, 3), "temporal": (1, 4), "facts": (2, 2)}  # fewest and most

_LABELS = "abcd"
_HIGHEST = 36  # four addends of 9; also the hours of a day
_TRAITS = "bold cold fast glad kind loud old proud shy tall".split()
_OPTIONS = "ABCD"
_WAKING, _LATEST, _SPELL = (6, 8), 18, 2  # hours: of waking, of closing, and of a spell, at most
_NAMES = "ada ben cleo dan eva finn gus hana ivo jan kim leo".split()
_FAMILIES = "adler brown costa diaz evans frank green hill ito jones klein lopez".split()
_TOWNS = "arles bern cork delft essen faro graz halle izmir jena kiel lyon metz nancy oslo pisa".split()
_RIVERS = "aare clyde douro ebro forth glan hase isar krka loire meuse neva".split()
FACTS = len(_NAMES) * len(_FAMILIES)
_GLUE = "add = . found missing free ( ) river lives on true false uncertain".split()


def vocabulary() -> list[str]:
    """Every word of the language, in the order of the ids."""
    hours = range(_WAKING[0], _LATEST + 1)
    spells = [f"{begin}-{end}" for begin in hours for end in range(begin + 1, min(begin + _SPELL, _LATEST) + 1)]
    words = [END, THINK, ANSWER, *_GLUE, *(str(number) for number in range(_HIGHEST + 1))]
    words += [*_LABELS, *(f"{label}{number}" for label in _LABELS for number in range(1, 10))]
    words += [form.format(trait) for form in ("{}", "not-{}", "{}!", "{}?") for trait in _TRAITS]
    words += [f"{one}>{no}{two}" for one in _TRAITS for two in _TRAITS if one != two for no in ("", "not-")]
    words += [*(f"{event}-{hour}" for event in ("woke", "closed") for hour in hours), *spells]
    words += [*_OPTIONS, *(f"{option}:{hour}" for option in _OPTIONS for hour in hours)]
    return [*words, *_NAMES, *_FAMILIES, *_TOWNS, *_RIVERS]


@dataclass(frozen=True)
class Chain:
    """One document in words. ``question`` ends with ``<think>``; ``steps``: how many the thought has."""

    kind: str
    question: tuple[str, ...]
    thought: tuple[str, ...]
    answer: tuple[str, ...]
    steps: int

    @property
    def words(self) -> tuple[str, ...]:
        return (*self.question, *self.thought, ANSWER, *self.answer, END)


def draw(kind: str, rng: Random, steps: int | None = None) -> Chain:
    """A question of this kind with so many steps, or as many as ``rng`` says."""
    return _KINDS[kind](rng, steps or rng.randint(*STEPS[kind]))


def fact(index: int) -> Chain:
    """The question about person ``index`` of the 144."""
    first, family, town, river = people()[index]
    thought = f"{first} {family} lives {town} . {town} on {river} .".split()
    return Chain("facts", ("river", first, family, THINK), tuple(thought), (river,), 2)


@cache
def people() -> tuple[tuple[str, str, str, str], ...]:
    """Everyone with a first name, a family, a town and its river. Towns lie on one river each, people live anywhere:
    a person's town is told by neither name alone."""
    rng = Random("chains/people")
    rivers = {town: rng.choice(_RIVERS) for town in _TOWNS}
    found = []
    for first in _NAMES:
        for family in _FAMILIES:
            town = rng.choice(_TOWNS)
            found.append((first, family, town, rivers[town]))
    return tuple(found)


def _arithmetic(rng: Random, steps: int) -> Chain:
    numbers = [rng.randint(1, 9) for _ in range(steps)]
    thought = [_LABELS[0], str(numbers[0]), "."]
    total = numbers[0]
    for label, number in zip(_LABELS[1:], numbers[1:], strict=False):
        total += number
        thought += [label, str(number), "=", str(total), "."]
    question = (f"{label}{number}" for label, number in zip(_LABELS, numbers, strict=False))
    return Chain("arithmetic", ("add", *question, THINK), tuple(thought), (str(total),), steps)


def _rules(rng: Random, steps: int) -> Chain:
    """Two chains of rules, shuffled; what is so begins the first one. Asked is the end of the first (true, or false
    where its last rule says not) or of the second (uncertain)."""
    traits = rng.sample(_TRAITS, 2 * steps + 2)
    verdict = rng.choice(("true", "false", "uncertain"))
    negated = {"true": False, "false": True}.get(verdict, bool(rng.randrange(2)))
    rules, ends = [], []
    for chain, no in ((traits[: steps + 1], negated), (traits[steps + 1 :], bool(rng.randrange(2)))):
        ends.append(chain[-1])
        said = [*chain[:-1], f"not-{chain[-1]}" if no else chain[-1]]
        rules += [f"{one}>{two}" for one, two in pairwise(said)]
    walked = [rule.partition(">")[2] for rule in rules[:steps]]
    rng.shuffle(rules)
    question = (*rules, f"{traits[0]}!", f"{ends[verdict == 'uncertain']}?", THINK)
    thought = (traits[0], *walked, "missing" if verdict == "uncertain" else "found", ".")
    return Chain("rules", question, thought, (verdict,), steps)


def _temporal(rng: Random, steps: int) -> Chain:
    """Five spells of one or two hours from waking to closing, one of them free, at place ``steps`` of them; options are
    hours from which it may be."""
    times = [rng.randint(*_WAKING)]
    while len(times) < 6:
        times.append(times[-1] + rng.randint(1, _SPELL))
    spells = [f"{begin}-{end}" for begin, end in pairwise(times)]
    free = spells[steps - 1]
    seen = [spell for spell in spells if spell != free]
    rng.shuffle(seen)
    offered = [free, *rng.sample(seen, 3)]
    rng.shuffle(offered)
    letter = _OPTIONS[offered.index(free)]
    hours = (spell.partition("-")[0] for spell in offered)
    options = (f"{option}:{hour}" for option, hour in zip(_OPTIONS, hours, strict=True))
    question = (f"woke-{times[0]}", *seen, f"closed-{times[-1]}", *options, THINK)
    walked = (str(time) for time in times[:steps])
    return Chain("temporal", question, (*walked, letter, "free", "."), ("(", letter, ")"), steps)


def _facts(rng: Random, steps: int) -> Chain:
    return fact(rng.randrange(FACTS))


_KINDS: dict[str, Callable[[Random, int], Chain]] = {
    "arithmetic": _arithmetic,
    "rules": _rules,
    "temporal": _temporal,
    "facts": _facts,
}
KINDS = tuple(_KINDS)
_SHARES = {"arithmetic": 2, "rules": 4, "temporal": 3, "facts": 1}  # of the documents of a row, by how hard they are


def row(rng: Random, length: int) -> tuple[list[str], list[bool]]:
    """``length`` words of documents of any kind, one after another, and which of them a model is to write."""
    words: list[str] = []
    written: list[bool] = []
    while len(words) < length:
        one = draw(rng.choices(KINDS, [_SHARES[kind] for kind in KINDS])[0], rng)
        words += one.words
        written += [False] * len(one.question) + [True] * (len(one.words) - len(one.question))
    return words[:length], written[:length]


@corpus(name="chains", version=1)
@dataclass(frozen=True)
class Chains(Corpus):
    """Questions with chains of thought, in the language of the tiny reasoner."""

    seqlen: int | None = option(32, "tokens of a calibration sequence", low=8, high=128)
    count: int = option(256, "documents of a split, for perplexity", low=1, high=1_000_000)

    def documents(self, split: str) -> list[str]:
        rngs = (Random(f"chains/{split}/{index}") for index in range(self.count))
        return [" ".join(draw(KINDS[index % len(KINDS)], rng).words) for index, rng in enumerate(rngs)]

    def windows(self, tokenizer: PreTrainedTokenizerBase, context: int, seed: int) -> Tensor:
        """Documents one after another, cut at the end: (nsamples, seqlen) int64. UserError for a model of another
        language or a short context."""
        import torch

        length = self.seqlen or min(context, 32)
        if not speaks(tokenizer):
            raise UserError("calibration=chains: the language of chains is only for model=tiny_reasoner")
        if length > context:
            raise UserError(f"calibration.seqlen={length}: the model's context is {context} tokens")
        ids = {word: index for index, word in enumerate(vocabulary())}
        rows = [row(Random(f"chains/calibration/{seed}/{index}"), length)[0] for index in range(self.nsamples)]
        return torch.tensor([[ids[word] for word in words] for words in rows])


def speaks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer gives this language's words their own ids."""
    known = tokenizer.get_vocab()
    return all(known.get(word) == index for index, word in enumerate(vocabulary()))
