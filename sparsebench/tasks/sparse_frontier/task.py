"""The declared task: which of the nine, at which length, in which form.

``form=natural`` writes prompts in English for real models, lets them generate greedily (prefill, then token by token
through the cache) and scores the text by the paper's rules. ``form=tinyworld`` gives each task's counterpart in the
language of the tiny ladder, scored by likelihood; ``story_filtering``, ``qa_quality`` and ``qa_toefl`` have none.

``score`` is the mean over all samples: IoU for vt, cwe and story_filtering, F1 for qa_squad, else exact answers.
Samples that the released code leaves out (no readable answer in story_multihop, an empty one in story_filtering) count
0 in it; ``score_answered`` is the mean without them, as the paper has it.

Deviations from the released code: prompts have exactly the asked number of tokens, template included (there: at least
90% of it, 64 tokens reserved for the template), the rest filled with sentences that say nothing; the wording is ours;
cwe takes its words from the King James text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from sparsebench.declare import Declared, option, task
from sparsebench.errors import UserError
from sparsebench.models.base import LoadedModel
from sparsebench.tasks.base import Evaluation, Outcome, Score
from sparsebench.tasks.decoding import greedy
from sparsebench.tasks.page import Page
from sparsebench.tasks.sparse_frontier import tiny
from sparsebench.tasks.sparse_frontier.prompt import Sample
from sparsebench.tasks.sparse_frontier.qa import QuestionTask, load
from sparsebench.tasks.sparse_frontier.ruler import Chains, CommonWords, Needles
from sparsebench.tasks.sparse_frontier.story import Filtering, Multihop, Retrieval
from sparsebench.tasks.tinyworld import Encoded, TinyworldTask

STOP = ("</answer>",)


class Generator(Protocol):
    """What writes one task's prompts."""

    def sample(self, index: int, rng: Random, page: Page) -> Sample:
        """Sample ``index`` of exactly the page's length. UserError when the page is too short."""
        ...


@task(
    name="sparse_frontier",
    version=1,
    metric="score",
    better="higher",
    gives=("prefill", "decode if form=natural", "decode if protocol=continuation"),
)
@dataclass(frozen=True)
class SparseFrontier(Declared):
    """The nine long-context tasks of The Sparse Frontier, one a run, at an exact length."""

    name: str = option(
        "niah",
        "which task",
        choices=(
            "niah",
            "vt",
            "cwe",
            "qa_squad",
            "qa_quality",
            "qa_toefl",
            "story_retrieval",
            "story_multihop",
            "story_filtering",
        ),
    )
    form: str = option(
        "tinyworld", "English prompts and generation, or the tiny ladder's language", choices=("natural", "tinyworld")
    )
    length: int = option(512, "tokens of a prompt, chat template included", low=64, high=1_048_576)
    samples: int = option(100, "prompts", low=1, high=100_000)
    seed: int = option(43, "sample i is drawn with seed + i; never the run's seed", low=0, high=100_000_000)
    protocol: str = option(
        "windows",
        "one forward per document, or context first and the question through the cache; natural: what is studied,"
        " prompts or answers, as there are both in any case",
        choices=("windows", "continuation"),
    )
    max_new: int = option(1024, "most tokens of an answer", low=1, high=65_536, only="form=natural")
    file: str | None = option(
        None,
        "a local JSON or JSONL file instead of the hub",
        unit="file",
        only="name=qa_squad|qa_quality|qa_toefl and form=natural",
    )
    num_queries: int | None = option(
        None,
        "questions of a prompt; niah 4, story_retrieval 16 (tinyworld: 8) if not given",
        low=1,
        high=64,
        only="name=niah|story_retrieval",
    )
    key_groups: int = option(
        4, "groups of characters in a key and in a value", low=1, high=16, only="name=niah and form=natural"
    )
    key_chars: int = option(8, "characters of a group", low=1, high=32, only="name=niah and form=natural")
    num_chains: int = option(8, "chains", low=1, high=1000, only="name=vt and form=natural")
    num_hops: int | None = option(
        None, "copy steps of a chain; 4 (tinyworld: 2) if not given", low=1, high=64, only="name=vt"
    )
    num_common_words: int = option(10, "common words", low=1, high=100, only="name=cwe and form=natural")
    common_word_frequency: int = option(
        30, "times each common word comes", low=2, high=1000, only="name=cwe and form=natural"
    )
    rare_word_frequency: int = option(
        3, "times each other word comes", low=1, high=999, only="name=cwe and form=natural"
    )
    list_words: int = option(8, "different words of the list", low=4, high=32, only="name=cwe and form=tinyworld")
    chapters_in_question: int = option(
        3, "chapters without a purchase", low=1, high=100, only="name=story_filtering and form=natural"
    )
    conversation_extensions: int = option(
        3,
        "sentences of each conversation",
        low=0,
        high=30,
        only="name=story_retrieval|story_multihop|story_filtering and form=natural",
    )
    protagonist_name: str = option(
        "Arion", "who travels", only="name=story_retrieval|story_multihop|story_filtering and form=natural"
    )
    min_fill: float = option(0.9, "the least filled share of the length", above=0.0, high=1.0, only="form=natural")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.common_word_frequency <= self.rare_word_frequency:
            raise UserError(
                f"task.common_word_frequency={self.common_word_frequency}: must be above "
                f"task.rare_word_frequency={self.rare_word_frequency}"
            )

    def prepare(self, model: LoadedModel, corpora: Any) -> list[Sample] | list[Encoded]:
        """The prompts. UserError when they do not fit the model or the length, or data are missing."""
        if self.form == "tinyworld":
            sizes = tiny.Sizes(self.length, self._queries(8), self.num_hops or 2, self.list_words)
            seeds = range(self.seed, self.seed + self.samples)
            return tiny.documents(model, self.name, seeds, sizes)
        if self.length + self.max_new > model.context:
            raise UserError(
                f"task.length={self.length}: with task.max_new={self.max_new} more tokens it is beyond the context of "
                f"{model.name} ({model.context})"
            )
        page = Page(model.tokenizer, self.length, self.min_fill)
        generator = self._generator(page)
        samples = [generator.sample(i, Random(self.seed + i), page) for i in range(self.samples)]
        longest = max(len(page.plain(f"<answer>\n{sample.gold}\n</answer>")) for sample in samples)
        if longest > self.max_new:
            raise UserError(f"task.max_new={self.max_new}: a right answer has {longest} tokens")
        return samples

    def prompts(self, prepared: list[Any]) -> list[int]:
        """Lengths of what a prefill is of, in tokens."""
        if self.form == "tinyworld":
            return TinyworldTask(length=self.length, protocol=self.protocol).prompts({self.name: prepared})
        return sorted({len(sample.ids) for sample in prepared})

    def _queries(self, story: int) -> int:
        return self.num_queries or (story if self.name == "story_retrieval" else 4)

    def _generator(self, page: Page) -> Generator:
        hero, extensions = self.protagonist_name, self.conversation_extensions
        if self.name == "niah":
            return Needles(self._queries(16), self.key_groups, self.key_chars)
        if self.name == "vt":
            return Chains(self.num_chains, self.num_hops or 4)
        if self.name == "cwe":
            return CommonWords(self.num_common_words, self.common_word_frequency, self.rare_word_frequency, self.seed)
        if self.name == "story_retrieval":
            return Retrieval(hero, extensions, self._queries(16))
        if self.name == "story_multihop":
            return Multihop(hero, extensions)
        if self.name == "story_filtering":
            return Filtering(hero, extensions, self.chapters_in_question)
        questions = QuestionTask(self.name, load(self.name, self.file), self.seed)
        questions.select(page, self.samples)
        return questions

    def evaluate(self, model: LoadedModel, how: Evaluation, prepared: list[Any]) -> Outcome:
        """``score`` and, in the natural form, ``score_answered``; one row a sample or a tinyworld question."""
        if self.form == "tinyworld":
            inner = TinyworldTask(length=self.length, protocol=self.protocol)
            outcome = inner.evaluate(model, how, {self.name: prepared})
            rows = [{"sample": row["sample"], "task": row["task"], "score": row["correct"]} for row in outcome.samples]
            return Outcome({"score": outcome.scores["accuracy"]}, rows, {"length": self.length})
        return self._generate(model, how, prepared)

    def _generate(self, model: LoadedModel, how: Evaluation, samples: Sequence[Sample]) -> Outcome:
        order = sorted(range(len(samples)), key=lambda i: -len(samples[i].ids))  # rows of a batch as alike as can be
        rows = max(1, how.batch_size * 512 // self.length)
        found: dict[int, float | None] = {}
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            made = greedy(model, [samples[i].ids for i in batch], self.max_new, STOP)
            for index, new in zip(batch, made, strict=True):
                found[index] = samples[index].score(str(model.tokenizer.decode(new, skip_special_tokens=True)))
            how.progress(len(found), len(samples))
        values = [found[index] for index in range(len(samples))]
        answered = [value for value in values if value is not None]
        scores = {"score": Score.mean([value or 0.0 for value in values])}
        if answered:
            scores["score_answered"] = Score.mean(answered)
        rows_out = [
            {"sample": f"{self.name}/{self.seed + index}", "score": value or 0.0, "answered": value is not None}
            for index, value in enumerate(values)
        ]
        return Outcome(scores, rows_out, {"length": self.length})
