"""What the rest of the project knows of a model: the module, its tokenizer, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


class ModelLoader(Protocol):
    """A declared way of loading models (``@model``)."""

    def load(self) -> LoadedModel:
        """The model, ready to evaluate. UserError when the weights are missing or corrupt."""
        ...

    def content(self) -> str:
        """What identifies the weights in the run id: a hub revision or a sha256 of the weight
        files. Needs no torch."""
        ...
