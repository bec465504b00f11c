"""The declared task: the tiny reasoner's four kinds of questions, answered token by token.

``accuracy`` is the mean over kinds; test-time compute are the scores ``tokens`` (a question), ``tokens_correct``,
``tokens_wrong`` (an answer) and ``tokens_per_correct`` (see ``answering``). Answers are read by the rules of the sets
that the kinds stand in for (``extraction``): arithmetic as AIME, rules as FOLIO, facts as MuSiQue.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from sparsebench.corpora import chains
from sparsebench.declare import option, task
from sparsebench.errors import UserError
from sparsebench.models.base import LoadedModel
from sparsebench.tasks.reasoning import extraction
from sparsebench.tasks.reasoning.answering import Question
from sparsebench.tasks.reasoning.base import Answering

SCORERS: dict[str, extraction.Scorer] = {
    "arithmetic": extraction.score_integer,
    "rules": extraction.score_verdict,
    "temporal": extraction.score_letter,
    "facts": extraction.score_text,
}


@task(name="reasoning", version=1, metric="accuracy", better="higher", gives=("prefill", "decode"))
@dataclass(frozen=True)
class Reasoning(Answering):
    """Right answers behind a written thought, and the tokens they take, on the tiny reasoner's questions."""

    kinds: tuple[str, ...] = option(
        ("arithmetic", "rules", "temporal", "facts"),
        "which kinds of questions",
        choices=("arithmetic", "rules", "temporal", "facts"),
    )
    samples: int = option(64, "questions of each kind; there are 144 of facts", low=1, high=100_000)
    steps: int | None = option(
        None, "steps of a right thought: arithmetic 2 to 4, rules 1 to 3, temporal 1 to 4; drawn if not given", low=1
    )
    max_new_tokens: int = option(64, "most tokens of an answer; one that reaches them is wrong", low=1, high=65_536)
    temperature: float = option(0.0, "of sampling; 0: greedy", low=0.0, high=10.0)
    top_p: float = option(1.0, "probability that the tokens to sample from have together", above=0.0, high=1.0)
    runs: int = option(1, "answers to each question, averaged", low=1, high=1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.kinds:
            fewest, most = chains.STEPS[kind]
            if self.steps is not None and not fewest <= self.steps <= most:
                raise UserError(f"task.steps={self.steps}: questions of kind {kind} have {fewest} to {most}")

    def prepare(self, model: LoadedModel, corpora: Any) -> list[Question]:
        """The questions, kind by kind. UserError for a model of another language, too many facts or a short context."""
        if not chains.speaks(model.tokenizer):
            raise UserError(f"task=reasoning: {model.name} does not speak its language; give model=tiny_reasoner")
        if "facts" in self.kinds and self.samples > chains.FACTS:
            raise UserError(f"task.samples={self.samples}: of kind facts there are {chains.FACTS} questions")
        kinds = dict.fromkeys(self.kinds)
        questions = [self._question(model, kind, index) for kind in kinds for index in range(self.samples)]
        self.decoding.check(questions, model)
        return questions

    def _question(self, model: LoadedModel, kind: str, index: int) -> Question:
        if kind == "facts":  # nobody is asked about twice
            order = list(range(chains.FACTS))
            Random(f"reasoning/facts/{self.seed}").shuffle(order)
            chain = chains.fact(order[index])
        else:
            chain = chains.draw(kind, Random(f"reasoning/{kind}/{self.seed}/{index}"), self.steps)
        ids: list[int] = model.tokenizer(" ".join(chain.question), add_special_tokens=False)["input_ids"]
        gold = [word for word in chain.answer if word not in "()"]
        return Question(f"{kind}/{index}", kind, ids, extraction.against(SCORERS[kind], gold), chain.steps)
