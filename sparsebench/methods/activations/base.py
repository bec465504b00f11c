"""What a method of activation sparsity is: the contract of the family, and how a stack of them is applied.

A method is fitted once, on the dense model's activations, and then gates the inputs of linear layers (or the gate's
activation) while the model runs. ``sparsity`` is what the method's paper means by it; ``achieved`` counts the same:
weights of the gated layers that acted tokens did not use. ``density_linear`` puts all methods on one axis.
Prompts may be gated in part (``sparse_tail``), decoded tokens always are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsebench.declare import Declared, option
from sparsebench.errors import UserError
from sparsebench.methods.activations import saved
from sparsebench.methods.activations.gating import Gate, Gating
from sparsebench.methods.activations.sites import GatedBlock, gated_blocks
from sparsebench.methods.base import Applied, Surroundings

Progress = Callable[[int, int], None]
Frame = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class ActivationMethod(Declared, ABC):
    """Base of methods of activation sparsity. A subclass says which gates stand where."""

    sparsity: float | None = option(
        None,
        "dropped / all over the method's scope, on the tokens it acts on; the run's sparsity if not given",
        low=0.0,
        below=1.0,
    )

    @property
    def level(self) -> float:
        """The sparsity to reach."""
        return 0.5 if self.sparsity is None else self.sparsity

    def asked_of(self, blocks: Sequence[GatedBlock]) -> float | None:
        """The sparsity asked of the whole model, in the record's denominator; None where another level was asked."""
        return self.level

    def sparse_tokens(self, tokens: int) -> int:
        """How many of a prompt's tokens are acted on, at its end."""
        return tokens

    def check_model(self, model: nn.Module, blocks: Sequence[GatedBlock]) -> None:
        """UserError when an option does not fit the model. Changes nothing."""

    @abstractmethod
    def gates(self, blocks: Sequence[GatedBlock], tensors: Mapping[str, Tensor]) -> list[Gate]:
        """The gates of the whole model, from what was fitted."""

    def tolerance(self, blocks: Sequence[GatedBlock]) -> float:
        """How far achieved may lie from asked before the run is flagged."""
        return 0.03

    def frame(self, model: nn.Module) -> Frame:
        """What the model is inside of while it is fitted and while the gates act: a transform of its weights."""
        return nullcontext

    def expected(self, blocks: Sequence[GatedBlock], tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """The sparsity asked of single layers, by name, where it is not the same everywhere."""
        return {}

    def index(self, blocks: Sequence[GatedBlock]) -> float:
        """FLOPs per token of all that the method adds and a dense model does not do, but for comparisons."""
        return 0.0

    def columns(self, gates: Sequence[Gate], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """More columns of the record, once the model has run."""
        return {}

    def remarks(self, blocks: Sequence[GatedBlock], tensors: Mapping[str, Tensor]) -> list[str]:
        """What the record should warn of."""
        return []

    def attachment(
        self, label: str, model: nn.Module, blocks: list[GatedBlock], gates: list[Gate], tensors: dict[str, Tensor]
    ) -> Gating:
        """What acts on the model; methods that decode in their own way override this."""
        return Gating(
            method=label,
            asked=self.asked_of(blocks),
            tolerance=self.tolerance(blocks),
            model=model,
            blocks=blocks,
            gates=gates,
            sparse=self.sparse_tokens,
            expected=self.expected(blocks, tensors),
            index=self.index(blocks),
            more=lambda: self.columns(gates, tensors),
        )


@dataclass(frozen=True)
class PromptMethod(ActivationMethod):
    """Base of methods that act on prompts too, perhaps on their last part alone."""

    sparse_tail: float = option(
        1.0, "share of a prompt's tokens, at its end, that are acted on; decoded tokens always are", low=0.0, high=1.0
    )

    def sparse_tokens(self, tokens: int) -> int:
        return int(tokens * self.sparse_tail)


@dataclass(frozen=True)
class FittedMethod(PromptMethod):
    """Base of methods that learn thresholds (or more) from calibration data, once."""

    windows: int | None = option(None, "calibration sequences that are used: the first so many; all if null", low=1)
    fitted_from: str | None = option(
        None, "a file that save= wrote for this model and sparsity; nothing is fitted then", unit="file"
    )

    @abstractmethod
    def shapes(self, blocks: Sequence[GatedBlock]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that ``fit`` returns."""

    @abstractmethod
    def fit(self, model: nn.Module, windows: Tensor, seed: int, progress: Progress) -> dict[str, Tensor]:
        """What is learned from the windows (sequences, tokens), by name, on the CPU. ``seed``: of random draws."""

    def tune(
        self, model: nn.Module, windows: Tensor, tensors: Mapping[str, Tensor], around: Surroundings
    ) -> dict[str, Tensor]:
        """What is trained on the windows behind ``fit``, which gave ``tensors``; nothing for most methods."""
        return {}

    def tuned(self, model: nn.Module, tensors: Mapping[str, Tensor], frame: Frame) -> Frame:
        """What the model is inside of while the gates act: ``frame``, and what ``tune`` makes of its weights."""
        return frame


Named = tuple[str, ActivationMethod]


def check(stack: Sequence[Named], model: nn.Module) -> None:
    """UserError when a method's options, or the file it is fitted from, do not fit the model. Changes nothing."""
    for label, method in stack:
        blocks = gated_blocks(model)
        method.check_model(model, blocks)
        if isinstance(method, FittedMethod) and method.fitted_from is not None:
            _load(label, method, model, blocks)


@torch.no_grad()
def apply(stack: Sequence[Named], around: Surroundings) -> Applied:
    """Fits each method of the stack to the model, which stays as it is; they act once they are attached."""
    applied = Applied()
    for label, method in stack:
        applied.attachments.append(_fitted(label, method, around))
    return applied


def _fitted(label: str, method: ActivationMethod, around: Surroundings) -> Gating:
    model = around.loaded.model
    tensors: dict[str, Tensor] = {}
    if isinstance(method, FittedMethod) and method.fitted_from is not None:
        tensors = _load(label, method, model, gated_blocks(model))
    frame = method.frame(model)
    with frame():
        blocks = gated_blocks(model)
        if isinstance(method, FittedMethod) and method.fitted_from is None:
            windows = around.calibration()[: method.windows]
            tensors = method.fit(model, windows, around.seed, around.progress)
            tensors |= method.tune(model, windows, tensors, around)
        gates = method.gates(blocks, tensors)
        warnings = method.remarks(blocks, tensors)
        one = method.attachment(label, model, blocks, gates, tensors)
    one.frame, one.warnings = frame, warnings
    if isinstance(method, FittedMethod):
        one.frame = method.tuned(model, tensors, frame)
    one.tensors = saved.stamped(tensors, model, method.level) if tensors else {}
    return one


def _load(label: str, method: FittedMethod, model: nn.Module, blocks: list[GatedBlock]) -> dict[str, Tensor]:
    where, file = f"method.{label}.fitted_from", str(method.fitted_from)
    found = saved.read(where, file, model, method.level)
    saved.require(where, file, found, method.shapes(blocks))
    return found


def kinds_of(where: str, given: Sequence[str], valid: Sequence[str]) -> tuple[str, ...]:
    """The short names of linear layers in ``given``; UserError naming the option for an unknown one or none."""
    for kind in given:
        if kind not in valid:
            raise UserError(f"{where}={kind}: not a projection; valid: {', '.join(valid)}")
    if not given:
        raise UserError(f"{where}: name at least one of {', '.join(valid)}")
    return tuple(given)
