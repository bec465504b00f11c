"""The three story tasks: facts of given chapters, the item before another one, and chapters without a purchase.

One traveller, one chapter a place: a person is met, a new item is bought, perhaps an older one is sold. Places and
people come again, but never the same pair, and no item is bought twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from sparsebench.errors import UserError
from sparsebench.tasks.page import Page
from sparsebench.tasks.sparse_frontier import metrics
from sparsebench.tasks.sparse_frontier import story_text as text
from sparsebench.tasks.sparse_frontier.prompt import Prompt, Sample
from sparsebench.tasks.sparse_frontier.ruler import unique

MOST_CHAPTERS = 2000


@dataclass(frozen=True)
class Chapter:
    """One chapter's facts and sentences. ``purchase``: which sentence tells of the purchase."""

    number: int
    location: str
    character: str
    item: str
    sentences: tuple[str, ...]
    purchase: int

    def text(self, told: bool = True) -> str:
        """The chapter's text; without ``told`` the purchase is left out."""
        kept = [one for place, one in enumerate(self.sentences) if told or place != self.purchase]
        return f"Chapter {self.number}: {' '.join(kept)}"


@dataclass
class Story:
    """Chapters as far as they are asked for. ``extensions``: sentences of each conversation."""

    rng: Random
    hero: str
    extensions: int
    chapters: list[Chapter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._items: set[str] = set()
        self._pairs: set[str] = set()
        self._held: list[str] = []

    def first(self, count: int) -> list[Chapter]:
        """The first ``count`` chapters, 2,000 at most."""
        while len(self.chapters) < count:
            self.chapters.append(self._chapter(len(self.chapters) + 1))
        return self.chapters[:count]

    def _chapter(self, number: int) -> Chapter:
        rng = self.rng
        pair = unique(lambda: f"{rng.choice(text.LOCATIONS)} {rng.choice(text.CHARACTERS)}", self._pairs)
        item = unique(
            lambda: f"{rng.choice(text.ADJECTIVES)} {rng.choice(text.MATERIALS)} {rng.choice(text.TYPES)}", self._items
        )
        location, character = pair.split()
        kinds = [text.INTRODUCTIONS, text.REASONS, text.HAPPENINGS, text.ENCOUNTERS]
        lines = [rng.choice(kind) for kind in kinds] + rng.sample(text.CONVERSATIONS, self.extensions)
        purchase = len(lines)
        lines.append(rng.choice(text.PURCHASES))
        old = ""
        if self._held and rng.random() < 0.5:
            old = self._held.pop(rng.randrange(len(self._held)))
            lines.append(rng.choice(text.SALES))
        lines += [rng.choice(kind) for kind in (text.FAREWELLS, text.CONCLUSIONS, text.EXTRAS)]
        self._held.append(item)
        words = {"hero": self.hero, "person": character, "place": location, "item": item, "old": old}
        words["event"] = rng.choice(text.EVENTS)
        sentences = tuple(line.format(**words) for line in lines)
        return Chapter(number, location, character, item, sentences, purchase)


@dataclass
class StoryTask(ABC):
    """What the three have in common: as many chapters as fit, and a question that depends on their number."""

    hero: str
    extensions: int

    @property
    def least(self) -> int:
        """The fewest chapters that there can be."""
        return 1

    @abstractmethod
    def ask(self, chapters: list[Chapter], rng: Random) -> tuple[Prompt, str, Callable[[str], float | None]]:
        """The prompt about these chapters, the right answer, and how a text is scored."""

    def sample(self, index: int, rng: Random, page: Page) -> Sample:
        story = Story(rng, self.hero, self.extensions)
        choice = rng.random()

        def build(count: int) -> Prompt:
            return self.ask(story.first(count), Random(f"{choice}/{count}"))[0]

        count = page.most(build, self.least, MOST_CHAPTERS)
        prompt, gold, score = self.ask(story.first(count), Random(f"{choice}/{count}"))
        filled, ids = page.exact(prompt)
        return Sample(filled, ids, gold, score)

    def _prompt(self, question: str, context: str, form: str, rules: str) -> Prompt:
        return Prompt(
            f"The text below is a story in chapters about the travels of {self.hero}.", question, context, form, rules
        )


def _joined(chapters: list[Chapter]) -> str:
    return "\n\n".join(chapter.text() for chapter in chapters)


@dataclass
class Retrieval(StoryTask):
    """``story_retrieval``: place, person or item of some chapters."""

    num_queries: int

    @property
    def least(self) -> int:
        return self.num_queries

    def ask(self, chapters: list[Chapter], rng: Random) -> tuple[Prompt, str, Callable[[str], float | None]]:
        kinds = ["location", "character", "item"]
        asked = rng.sample(chapters, self.num_queries)
        wanted = rng.sample(kinds, 3) if self.num_queries == 3 else [rng.choice(kinds) for _ in asked]
        questions = {
            "location": "Which place did {hero} visit in chapter {number}?",
            "character": "Whom did {hero} meet in chapter {number}?",
            "item": "Which item did {hero} acquire in chapter {number}?",
        }
        lines = [
            f"{place}. " + questions[kind].format(hero=self.hero, number=chapter.number)
            for place, (kind, chapter) in enumerate(zip(wanted, asked, strict=True), 1)
        ]
        gold = "\n".join(
            f"{place}. {getattr(chapter, kind)}"
            for place, (kind, chapter) in enumerate(zip(wanted, asked, strict=True), 1)
        )
        prompt = self._prompt(
            "\n".join(lines),
            _joined(chapters),
            "1. <first answer>\n2. <second answer>\n3. <third answer>",
            "Answer every question on its own numbered line: only the name of the place or person, or the item in the "
            "three words by which the story calls it.",
        )
        return prompt, gold, partial(metrics.retrieval, gold=gold)


@dataclass
class Multihop(StoryTask):
    """``story_multihop``: the item that was acquired last before another one."""

    @property
    def least(self) -> int:
        return 2

    def ask(self, chapters: list[Chapter], rng: Random) -> tuple[Prompt, str, Callable[[str], float | None]]:
        place = rng.randrange(1, len(chapters))
        gold = chapters[place - 1].item
        prompt = self._prompt(
            f"Which item did {self.hero} acquire last before acquiring the {chapters[place].item}?",
            _joined(chapters),
            "<item>",
            "Write only the item, in the three words by which the story calls it.",
        )
        return prompt, gold, partial(metrics.multihop, gold=gold)


@dataclass
class Filtering(StoryTask):
    """``story_filtering``: the chapters in which nothing was bought. What was sold later is still told."""

    chapters_in_question: int

    @property
    def least(self) -> int:
        return self.chapters_in_question + 1

    def ask(self, chapters: list[Chapter], rng: Random) -> tuple[Prompt, str, Callable[[str], float | None]]:
        quiet = {one.number for one in rng.sample(chapters, self.chapters_in_question)}
        gold = ", ".join(map(str, sorted(quiet)))
        prompt = self._prompt(
            f"In which chapters did {self.hero} not buy anything?",
            "\n\n".join(one.text(told=one.number not in quiet) for one in chapters),
            "<chapter number>, <chapter number>",
            f"There are exactly {self.chapters_in_question} of them. Write their numbers with commas between them.",
        )
        return prompt, gold, partial(metrics.chapters, gold=gold)


def check_extensions(extensions: int) -> None:
    """UserError when conversations would need more sentences than there are."""
    if extensions > len(text.CONVERSATIONS):
        raise UserError(f"task.conversation_extensions={extensions}: at most {len(text.CONVERSATIONS)}")
