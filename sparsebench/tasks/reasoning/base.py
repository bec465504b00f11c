"""What the reasoning tasks have in common: how an answer is decoded, and what is said of all answers together.

The defaults are the paper's decoding (Zhang et al. 2025, arXiv 2504.02010).
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsebench.declare import Declared, option
from sparsebench.models.base import LoadedModel
from sparsebench.tasks.base import Evaluation, Outcome
from sparsebench.tasks.reasoning.answering import Decoding, Question, evaluate


@dataclass(frozen=True)
class Answering(Declared):
    """Base of tasks whose ``prepare`` gives questions."""

    seed: int = option(0, "what draws questions and sampled tokens; never the run's seed", low=0, high=100_000_000)
    max_new_tokens: int = option(
        32768, "most tokens of an answer; one that reaches them is wrong", low=1, high=1_048_576
    )
    temperature: float = option(0.6, "of sampling; 0: greedy", low=0.0, high=10.0)
    top_p: float = option(0.95, "probability that the tokens to sample from have together", above=0.0, high=1.0)
    runs: int = option(3, "answers to each question, averaged", low=1, high=1000)
    len_bins: int = option(
        5, "accuracy by length: bins of equally many answers, in the record and in reports", low=2, high=1000
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.decoding  # checks what several options say together

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.max_new_tokens, self.temperature, self.top_p, self.runs, self.seed)

    def evaluate(self, model: LoadedModel, how: Evaluation, prepared: list[Question]) -> Outcome:
        return evaluate(model, how, prepared, self.decoding, self.len_bins)
