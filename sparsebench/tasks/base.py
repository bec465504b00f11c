"""What a task is: it evaluates a model and returns scores with standard errors and per-sample outcomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sparsebench.models.base import LoadedModel


@dataclass(frozen=True)
class Score:
    """A value with its standard error (None where none is defined) over ``n`` samples."""

    value: float
    stderr: float | None
    n: int

    @classmethod
    def mean(cls, values: Sequence[float]) -> Score:
        """The mean of per-sample values and its standard error (ddof 1)."""
        n = len(values)
        average = sum(values) / n
        if n < 2:
            return cls(average, None, n)
        variance = sum((value - average) ** 2 for value in values) / (n - 1)
        return cls(average, sqrt(variance / n), n)

    @classmethod
    def average(cls, scores: Sequence[Score]) -> Score:
        """The mean over tasks; its standard error is sqrt(sum se^2) / k, the tasks being independent, or None where
        one of them has none."""
        errors = [score.stderr for score in scores if score.stderr is not None]
        together = sqrt(sum(error**2 for error in errors)) / len(scores) if len(errors) == len(scores) else None
        return cls(sum(score.value for score in scores) / len(scores), together, sum(score.n for score in scores))


@dataclass
class Outcome:
    """``scores``: by name, the task's metric first; ``samples``: one flat row per sample with at
    least ``sample`` (its stable id) and one column per outcome; ``notes``: extra record columns."""

    scores: dict[str, Score]
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


Progress = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class Evaluation:
    """How to evaluate: never part of a run's identity. ``batch_size``: rows per forward."""

    batch_size: int = 16
    progress: Progress = lambda done, total: None


class Task(Protocol):
    """A declared task (``@task``)."""

    def prepare(self, model: LoadedModel, corpora: Callable[[str], Any]) -> Any:
        """Data made ready for this model (texts read, windows cut), before anything is recorded.
        ``corpora(name)`` gives a declared corpus class. UserError when options, data and model do not fit."""
        ...

    def evaluate(self, model: LoadedModel, how: Evaluation, prepared: Any) -> Outcome:
        """Scores and per-sample outcomes on what ``prepare`` returned."""
        ...
