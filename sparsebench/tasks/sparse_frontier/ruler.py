"""The three synthetic tasks: needles (niah), variable chains (vt) and common words (cwe), after NVIDIA's RULER.

The haystack is made of what is searched: other needles, copy assignments, other words. As much of it as fits is put
around what is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from random import Random
from string import ascii_lowercase, ascii_uppercase, digits

from sparsebench.corpora import kjv
from sparsebench.errors import UserError
from sparsebench.tasks.page import NOISE, Page
from sparsebench.tasks.sparse_frontier import metrics
from sparsebench.tasks.sparse_frontier.prompt import Prompt, Sample


def shuffled(lines: list[str], rng: Random) -> str:
    """The lines in random order, as text."""
    lines = list(lines)
    rng.shuffle(lines)
    return "\n".join(lines)


def unique(draw: Callable[[], str], taken: set[str]) -> str:
    """The first draw that is not in ``taken``; it is added. ValueError when a thousand draws in a row are."""
    for _ in range(1000):
        found = draw()
        if found not in taken:
            taken.add(found)
            return found
    raise ValueError("there are not enough different ones")


@dataclass
class Needles:
    """``niah``: the values of several keys among as many other keys and values as fit."""

    num_queries: int
    key_groups: int
    key_chars: int

    def sample(self, index: int, rng: Random, page: Page) -> Sample:
        taken: set[str] = set()
        pairs = [self._pair(rng, taken) for _ in range(self.num_queries)]
        lines = [f"The value for key {key} is: {value}." for key, value in pairs]
        order = rng.random()

        def build(others: int) -> Prompt:
            while len(lines) < self.num_queries + others:
                key, value = self._pair(rng, taken)
                lines.append(f"The value for key {key} is: {value}.")
            context = shuffled(lines[: self.num_queries + others], Random(f"{order}/{others}"))
            return Prompt(
                task="The text below is a list of keys, each with its value. Find the values of some keys.",
                question="What are the values of these keys?\n"
                + "\n".join(f"{number}. {key}" for number, (key, _) in enumerate(pairs, 1)),
                context=context,
                form="1. The answer for <first key> is <its value>.\n2. The answer for <second key> is <its value>.",
                rules="Answer the keys in the order in which they are asked, one numbered line for each.",
            )

        text, ids = page.exact(build(page.most(build, 0)))
        gold = "\n".join(f"{n}. The answer for {key} is {value}." for n, (key, value) in enumerate(pairs, 1))
        return Sample(text, ids, gold, partial(metrics.niah, answers=pairs))

    def _pair(self, rng: Random, taken: set[str]) -> tuple[str, str]:
        """A key and a value: groups of random letters and digits, no string twice."""

        def draw() -> str:
            groups = ("".join(rng.choices(ascii_lowercase + digits, k=self.key_chars)) for _ in range(self.key_groups))
            return "-".join(groups)

        try:
            return unique(draw, taken), unique(draw, taken)
        except ValueError as error:
            raise UserError(f"task.key_chars={self.key_chars}: keys this short run out: {error}") from None


@dataclass
class Chains:
    """``vt``: all names that come to one number, over chains of copies whose statements stand in any order."""

    num_chains: int
    num_hops: int

    def sample(self, index: int, rng: Random, page: Page) -> Sample:
        names: set[str] = set()
        numbers: set[str] = set()
        chains, statements = [], []
        for _ in range(self.num_chains):
            chain = [
                unique(lambda: "".join(rng.choices(ascii_uppercase, k=5)), names) for _ in range(self.num_hops + 1)
            ]
            sources = [unique(lambda: str(rng.randrange(10_000, 99_999)), numbers), *(f"VAR {one}" for one in chain)]
            statements += [f"VAR {name} = {source}" for name, source in zip(chain, sources, strict=False)]
            chains.append((chain, sources[0]))
        order = rng.random()
        asked, number = chains[0]

        def build(noise: int) -> Prompt:
            return Prompt(
                task="The text below gives numbers to variables and copies variables to others, in no order.",
                question=f"Which variables have the value {number}, directly or through copies?",
                context=shuffled([*statements, *[NOISE] * noise], Random(f"{order}/{noise}")),
                form="<first variable> <second variable> <third variable>",
                rules=f"There are exactly {self.num_hops + 1} of them. Write their names with spaces between them.",
            )

        text, ids = page.exact(build(page.most(build, 0)))
        gold = " ".join(asked)
        return Sample(text, ids, gold, partial(metrics.variables, gold=gold))


@cache
def vocabulary() -> list[str]:
    """More than 3,000 distinct words of at least three letters: those of the King James text (the released code takes
    the word list of a package), sorted."""
    return sorted(set(re.findall(r"(?<![A-Za-z'])[a-z]{3,}(?![A-Za-z'])", "\n".join(kjv.documents("train")))))


@dataclass
class CommonWords:
    """``cwe``: the words that are most frequent in a numbered list."""

    num_common_words: int
    common_word_frequency: int
    rare_word_frequency: int
    seed: int
    words: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.words = list(vocabulary())
        Random(self.seed).shuffle(self.words)

    def sample(self, index: int, rng: Random, page: Page) -> Sample:
        words = list(self.words)
        rng.shuffle(words)
        common, rare = words[: self.num_common_words], words[self.num_common_words :]
        order = rng.random()

        def build(others: int) -> Prompt:
            listed = common * self.common_word_frequency + rare[:others] * self.rare_word_frequency
            Random(f"{order}/{others}").shuffle(listed)
            return Prompt(
                task="The text below is a numbered list of words. Some words come many times, the others a few times.",
                question=f"Which are the {self.num_common_words} most common words of the list?",
                context="\n".join(f"{number}. {word}" for number, word in enumerate(listed, 1)),
                form="1. <first word>\n2. <second word>\n3. <third word>",
                rules=f"Write exactly {self.num_common_words} numbered lines with one word each, in any order.",
            )

        text, ids = page.exact(build(page.most(build, 1, len(rare))))
        gold = "\n".join(f"{number}. {word}" for number, word in enumerate(common, 1))
        return Sample(text, ids, gold, partial(metrics.common_words, gold=common))
