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

from sparsebench.declare import option, task
from sparsebench.errors import UserError
from sparsebench.models.base import LoadedModel
from sparsebench.tasks.page import Page
from sparsebench.tasks.reasoning import sets
from sparsebench.tasks.reasoning.answering import Question
from sparsebench.tasks.reasoning.base import Answering
from sparsebench.tasks.reasoning.extraction import against

_OPENED = "\n<think>\n"


@task(name="reasoning_set", version=1, metric="accuracy", better="higher", gives=("prefill", "decode"))
@dataclass(frozen=True)
class ReasoningSetTask(Answering):
    """One of four reasoning sets, answered behind a written thought: accuracy and test-time compute."""

    name: str = option("aime", "which set", choices=("aime", "folio", "temporal", "musique"))
    file: str | None = option(None, "a local JSONL file with the set's fields instead of the hub", unit="file")
    samples: int | None = option(None, "questions, drawn by task.seed; all (MuSiQue: 100) if not given", low=1)

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
        self.decoding.check(questions, model)
        return questions
