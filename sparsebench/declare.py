"""How methods, tasks, models and corpora declare themselves and their options.

A declaration is a dataclass under a decorator, each option an ``option(...)`` call with literal
arguments, so that ``catalogue`` can read name, version, taxonomy and options from the source
without importing it (methods import torch). The same ``Option`` object checks values in both
worlds: when the command line is read and when the object is built.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from sparsebench.errors import UserError, closest

KINDS = ("method", "task", "model", "corpus")
TARGETS = "weights training activations attention kv_cache tokens features tuning signals".split()
PHASES = "train once prefill decode prefill+decode".split()
STAGES = "select refine recover".split()

INSTEAD = "instead of sparsity"  # unit of options that set a method's level in its own terms

_TAXONOMY = {
    "object": "weights weight_update activations attention kv_cache tokens experts dictionary_codes gradients "
    "graph_edges signal_coefficients loss_tokens rewards task_vectors data none",
    "granularity": "unstructured n:m block row column channel head layer token page expert none",
    "when_mask_is_found": "before_training during_training after_training at_inference na",
    "start": "dense_to_sparse sparse_to_sparse dense_to_dense na",
    "mask_dynamics": "static dynamic input_dependent na",
    "weights_updated_after_mask": "none closed_form finetune full_training",
    "data_need": "none calibration training_set",
    "allocation": "uniform erk global_threshold learned per_layer_search na",
    "training_cost_claim": "cheaper_than_dense equal more none",
    "inference_cost_claim": "cheaper_than_dense equal more none",
}


@dataclass(frozen=True)
class Taxonomy:
    """What kind of sparsity a method makes (handbook of Liu and Wang 2023, section A).

    ``granularity`` lists every granularity the method can produce. ``benefit_realised_on`` and
    ``kernel_required`` say where a saving can be seen and what must run for it.
    """

    object: str
    granularity: tuple[str, ...]
    when_mask_is_found: str
    start: str = "dense_to_sparse"
    mask_dynamics: str = "static"
    weights_updated_after_mask: str = "none"
    data_need: str = "none"
    allocation: str = "uniform"
    benefit_realised_on: tuple[str, ...] = ("disk", "memory", "flops")
    kernel_required: str = "sparse matrix product"
    training_cost_claim: str = "none"
    inference_cost_claim: str = "cheaper_than_dense"

    def __post_init__(self) -> None:
        for name, words in _TAXONOMY.items():
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                if one not in words.split():
                    raise ValueError(f"taxonomy.{name}={one!r}{closest(str(one), words.split())}")

    @property
    def reference(self) -> bool:
        """Whether it leaves the model as it is: what others are compared with."""
        return self.label == "reference"

    @property
    def label(self) -> str:
        """The handbook's derived name: pruning, sparse training, post-training pruning ..."""
        if self.object == "none":  # nothing becomes zero, and yet weights may change
            return "reference" if self.weights_updated_after_mask == "none" else "quantisation"
        if self.start == "sparse_to_sparse":
            return "dynamic sparse training" if self.mask_dynamics == "dynamic" else "sparse training"
        if self.object != "weights":
            return f"{self.object.replace('_', ' ')} sparsity"
        if self.when_mask_is_found == "before_training":
            return "pruning at initialisation"
        if self.when_mask_is_found == "after_training" and self.weights_updated_after_mask in ("none", "closed_form"):
            return "post-training pruning"
        return "pruning" if self.start == "dense_to_sparse" else "none"


@dataclass(frozen=True)
class Option:
    """One option: its default, meaning and valid values. Bounds: low <= x <= high, above < x < below.

    ``only``: values of other options without which it has no effect, as ``form=natural and name=vt|cwe``.
    """

    default: Any
    help: str
    type: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] | None = None
    unit: str = ""
    only: str = ""

    @property
    def range(self) -> str:
        """The valid values, in words."""
        if self.choices is not None:
            return " | ".join(map(str, self.choices))
        bounds = [
            f"{sign} {bound:.12g}"
            for sign, bound in ((">=", self.low), (">", self.above), ("<=", self.high), ("<", self.below))
            if bound is not None
        ]
        return " and ".join(bounds) or {"bool": "true | false"}.get(self.type, "any")

    @property
    def meaning(self) -> str:
        """What it is, and with which other options."""
        return f"{self.help} (with {self.only})" if self.only else self.help

    def check(self, name: str, value: Any) -> Any:
        """``value`` in its declared type, or UserError naming the option, the value and the range."""
        optional = self.type.endswith("| None")
        if value is None and optional:
            return None
        base = self.type.removesuffix("| None").strip()
        if base.startswith("tuple["):
            element = base.removeprefix("tuple[").split(",")[0].rstrip("]")
            if isinstance(value, str) or not isinstance(value, (list, tuple)):
                value = (value,)
            return tuple(self._check_one(name, one, element) for one in value)
        return self._check_one(name, value, base)

    def _check_one(self, name: str, value: Any, base: str) -> Any:
        kinds = {"float": (int, float), "int": (int,), "bool": (bool,), "str": (str,)}
        if base == "str" and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        wanted = kinds.get(base)
        is_bool = isinstance(value, bool) and base != "bool"
        if wanted and (is_bool or not isinstance(value, wanted)):
            raise UserError(f"{name}={value}: must be {_WORDS[base]}{self._hint()}")
        if base == "float":
            value = float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            outside = (
                (self.low is not None and value < self.low)
                or (self.high is not None and value > self.high)
                or (self.above is not None and value <= self.above)
                or (self.below is not None and value >= self.below)
            )
            if not math.isfinite(value) or outside:
                raise UserError(f"{name}={value}: must be {_WORDS.get(base, 'a number')}{self._hint()}")
        if self.choices is not None and value not in self.choices:
            raise UserError(f"{name}={value}: not a choice{closest(str(value), map(str, self.choices))}")
        return value

    def _hint(self) -> str:
        valid = self.range
        return "" if valid in ("any", "true | false") else f" {valid} ({self.help})"


_WORDS = {"float": "a finite number", "int": "a whole number", "bool": "true or false", "str": "a text"}


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[Any, ...] | None = None,
    unit: str = "",
    only: str = "",
) -> Any:
    """A dataclass field that is an option. All arguments must be literals (they are read statically)."""
    spec = Option(default, help, low=low, high=high, above=above, below=below, choices=choices, unit=unit, only=only)
    return field(default=default, metadata={"option": spec})


@dataclass(frozen=True)
class Declared:
    """Base of every declared class: its options check themselves at construction. ``declared``: what its decorator
    says."""

    declared: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        for name, spec in options_of(type(self)).items():
            object.__setattr__(self, name, spec.check(name, getattr(self, name)))


_OPTIONS: dict[type, dict[str, Option]] = {}  # of every class that was asked for


def options_of(declared: type) -> dict[str, Option]:
    """Option name -> Option of a dataclass, in order of declaration, types filled in."""
    if declared in _OPTIONS:
        return _OPTIONS[declared]
    found = {}
    for item in dataclasses.fields(declared):
        if "option" in item.metadata:
            kind = item.type if isinstance(item.type, str) else getattr(item.type, "__name__", str(item.type))
            found[item.name] = dataclasses.replace(item.metadata["option"], type=kind)
    _OPTIONS[declared] = found
    return found


_T = TypeVar("_T", bound=type)


def _decorator(kind: str, declared: dict[str, Any]) -> Callable[[_T], _T]:
    def mark(cls: _T) -> _T:
        cls.declared = {"kind": kind, **declared}  # type: ignore[attr-defined]
        return cls

    return mark


def method(
    *,
    name: str,
    version: int,
    paper: str,
    target: str,
    phase: str,
    taxonomy: Taxonomy,
    stage: str | None = None,
    uses: tuple[str, ...] = (),
    baseline: str | None = None,
) -> Callable[[_T], _T]:
    """Declares a method. ``uses``: any of ``calibration``, ``seed``, each perhaps under a condition on an option
    (``calibration if eps_mode=calibrated``); ``baseline``: its naive baseline."""
    return _decorator("method", {k: v for k, v in locals().items() if k != "kind"})


def task(
    *, name: str, version: int, metric: str, better: str, gives: tuple[str, ...] = ("prefill",)
) -> Callable[[_T], _T]:
    """Declares a task. ``metric``: its primary score; ``better``: ``lower`` or ``higher``; ``gives``: the
    phases in which a method can act on it (``prefill``, ``decode``, ``train``), each perhaps under a
    condition on an option: ``decode if protocol=continuation``."""
    return _decorator("task", dict(locals()))


def model(*, name: str, version: int, calibration: str) -> Callable[[_T], _T]:
    """Declares a way of loading models; ``calibration``: the corpus its calibration defaults to."""
    return _decorator("model", dict(locals()))


def corpus(*, name: str, version: int) -> Callable[[_T], _T]:
    """Declares a corpus: a source of documents for calibration and perplexity."""
    return _decorator("corpus", dict(locals()))
