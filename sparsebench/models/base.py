"""What the rest of the project knows of a model: the module, its tokenizer, and where it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsebench.models.blocks import Blocks

if TYPE_CHECKING:
    from sparsebench.models.loading import How


Read = Callable[[str, nn.Parameter], Tensor]  # the values of the parameter of that name (``LoadedModel.values``)


def as_it_is(name: str, parameter: nn.Parameter) -> Tensor:
    """How to read a parameter that is in memory."""
    return parameter.detach()


@dataclass
class LoadedModel:
    """A causal language model in evaluation mode. ``context``: the most positions it was made for."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    context: int

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def blocks(self) -> Blocks:
        """The decoder blocks, for a walk from one to the next. UserError when the model has none."""
        return Blocks(self.model)

    def values(self, name: str, parameter: nn.Parameter) -> Tensor:
        """The values of the model's parameter of that name, until the next ones are asked for."""
        return as_it_is(name, parameter)

    @torch.no_grad()
    def logits(self, ids: Tensor, rows: int) -> Iterator[Tensor]:
        """The logits of ids (sequences, tokens) int64, ``rows`` sequences at a time: (rows, tokens, vocabulary)."""
        for group in ids.split(rows):
            found: Tensor = self.model(input_ids=group.to(self.device), use_cache=False).logits
            yield found

    def discard(self) -> None:
        """Drops what was written of a model that nobody wants any more."""


class ModelLoader(Protocol):
    """A declared way of loading models (``@model``)."""

    def load(self) -> LoadedModel:
        """The model, ready to evaluate. UserError when the weights are missing or corrupt."""
        ...

    def source(self) -> tuple[Path, How]:
        """Where its files lie and how to load them, for models that can be streamed; others lack it."""
        ...

    def content(self) -> str:
        """What identifies the weights in the run id: a hub revision or a sha256 of the weight
        files. Needs no torch."""
        ...
