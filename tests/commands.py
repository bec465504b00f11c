"""Toy plug-ins and what a command gives, for tests of the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsebench.results.store import Store

TOYS = '''
"""Weight methods that misbehave, one that works, and one of another phase."""

from dataclasses import dataclass

from sparsebench.declare import Declared, Taxonomy, corpus, method, model, option, task
from sparsebench.corpora.base import Corpus
from sparsebench.methods.weights.base import Pruner, ScorePruner, WeightMethod
from sparsebench.models.embedded import Ladder
from sparsebench.tasks.base import Outcome, Score

CALLS = []


@method(name="raises", version=1, paper="none", target="weights", phase="once", stage="select",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class Raises(Pruner):
    """Runs out of memory."""

    def select(self, layer):
        raise RuntimeError("out of memory:\\ntried to allocate 8 GiB")


@method(name="makes_nan", version=1, paper="none", target="weights", phase="once", stage="select",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class MakesNan(ScorePruner):
    """Leaves NaN in a weight."""

    def score(self, layer):
        return layer.weight.abs().float()

    def select(self, layer):
        mask = super().select(layer)
        layer.weight[mask] = float("nan")
        return mask


@method(name="never_acts", version=1, paper="none", target="weights", phase="once", stage="select",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class NeverActs(Pruner):
    """Promises a level and does nothing."""


@method(name="interrupted", version=1, paper="none", target="weights", phase="once", stage="select",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class Interrupted(Pruner):
    """The user presses Ctrl-C."""

    def select(self, layer):
        raise KeyboardInterrupt


@method(name="largest", version=1, paper="none", target="weights", phase="once", stage="select",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class Largest(ScorePruner):
    """Prunes the largest weights; counts how often it is asked."""

    group: str = option("row", "weights that are compared", choices=("row", "layer"))
    sign: int = option(-1, "-1: the largest go, 1: the smallest", choices=(-1, 1))

    def score(self, layer):
        CALLS.append(layer.name)
        return self.sign * layer.weight.abs().float()


@method(name="keeps_mask", version=1, paper="none", target="weights", phase="once", stage="refine",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class KeepsMask(WeightMethod):
    """A refiner that leaves every mask as it is."""

    stage = "refine"
    rounds: int = option(1, "rounds", low=1, high=10)


@method(name="evicts", version=1, paper="none", target="kv_cache", phase="decode",
        taxonomy=Taxonomy(object="kv_cache", granularity=("token",), when_mask_is_found="at_inference"))
@dataclass(frozen=True)
class Evicts(Declared):
    """A cache method: acts while tokens are decoded."""

    budget: int = option(64, "entries kept", low=1)


@task(name="constant", version=1, metric="number", better="higher")
@dataclass(frozen=True)
class Constant(Declared):
    """Scores every model with the same number."""

    number: float = option(1.0, "the score", low=0.0)
    spoil: bool = option(False, "score NaN instead")

    def prepare(self, model, corpora):
        return None

    def evaluate(self, model, how, prepared):
        value = float("nan") if self.spoil else self.number
        return Outcome({"number": Score(value, None, 1)}, [{"sample": "0", "number": value}])


@corpus(name="alphabet", version=1)
@dataclass(frozen=True)
class Alphabet(Corpus):
    """The letters, again and again."""

    def documents(self, split):
        return [" ".join("abcdefghijklmnopqrstuvwxyz") * 40] * 3


@model(name="smallest", version=1, calibration="alphabet")
@dataclass(frozen=True)
class Smallest(Ladder):
    """The smallest embedded model under another name."""

    rung: str = option("tiny_100k", "which model of the ladder", choices=("tiny_100k",))
'''


@dataclass
class Answer:
    """What one command gave."""

    code: int
    out: str
    err: str
    store: Store

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.store.records()


Command = Callable[..., Answer]
