"""The declared task: AIME 2024, FOLIO, BBH's temporal sequences or MuSiQue (closed book), for reasoning models.

The prompt is put into the model's chat template and ends with an opened think tag. Scores are those of the task
``reasoning``: ``accuracy`` (MuSiQue: exact match, beside ``f1`` and ``contains``) and the tokens spent. The standard
error of 30 AIME problems is about 9 points. Lengths are of the model's own tokenizer: compare them within one only.

Defaults are the paper's decoding. Deviations: the wording of the prompts and the rules by which answers are read are
ours (``sets``, ``extraction``); of MuSiQue 100 questions are drawn by ``task.seed``, whichever the paper's were.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from sparsebench.declare import Declared, option, task
from sparsebench.errors import UserError
from sparsebench.models.base import LoadedModel
from sparsebench.tasks.base import Evaluation, Outcome
from sparsebench.tasks.page import Page
from sparsebench.tasks.reasoning import sets
from sparsebench.tasks.reasoning.answering import Decoding, Question, evaluate
from sparsebench.tasks.reasoning.extraction import against

_OPENED = "\n<think>\n"


@task(name="reasoning_set", version=1, metric="accuracy", better="higher", gives=("prefill", "decode"))
@dataclass(frozen=True)
class ReasoningSetTask(Declared):
    """One of four reasoning sets, answered behind a written thought: accuracy and test-time compute."""

    name: str = option("aime", "which set", choices=("aime", "folio", "temporal", "musique"))
    file: str | None = option(None, "a local JSONL file with the set's fields instead of the hub", unit="file")
    samples: int | None = option(None, "questions, drawn by task.seed; all (MuSiQue: 100) if not given", low=1)
    seed: int = option(0, "what draws questions and tokens; never the run's seed", low=0, high=100_000_000)
    max_new_tokens: int = option(
        32768, "most tokens of an answer; one that reaches them is wrong", low=1, high=1_048_576
    )
    temperature: float = option(0.6, "of sampling; 0: greedy", low=0.0, high=10.0)
    top_p: float = option(0.95, "probability that the tokens to sample from have together", above=0.0, high=1.0)
    runs: int = option(3, "answers to each question, averaged", low=1, high=1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._decoding()  # checks what several options say together

    def prepare(self, model: LoadedModel, corpora: Any) -> list[Question]:
        """The questions. UserError when the data cannot be had, are too few, or do not fit the model."""
        chosen, items = sets.SETS[self.name], sets.load(self.name, self.file)
        if self.samples is not None and self.samples > len(items):
            raise UserError(f"task.samples={self.samples}: {self.name} has {len(items)} questions")
        count = self.samples or min(chosen.most or len(items), len(items))
        drawn = sorted(Random(f"reasoning/{self.name}/{self.seed}").sample(range(len(items)), count))
        page = Page(model.tokenizer, model.context, opening=_OPENED)
        questions = []
        for at in drawn:
            score = against(chosen.score, items[at].golds)
            questions.append(Question(f"{self.name}/{at}", self.name, page.ids(items[at].text), score))
        self._decoding().check(questions, model)
        return questions

    def evaluate(self, model: LoadedModel, how: Evaluation, prepared: list[Question]) -> Outcome:
        return evaluate(model, how, prepared, self._decoding())

    def _decoding(self) -> Decoding:
        return Decoding(self.max_new_tokens, self.temperature, self.top_p, self.runs, self.seed)
