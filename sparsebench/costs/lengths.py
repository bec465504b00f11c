"""How long the prompts were that a task ran, and how far behind their beginning its tokens were decoded.

A task's options say what it makes; what a model is really given (the context without the question, prompts of an
evaluation harness, follow-ups, written thoughts) is seen where the model is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsebench.models import caching


@dataclass
class Lengths:
    """Sums over the rows that a watched model was given: ``prompts`` with ``read`` tokens in all, and ``decoded``
    tokens with ``before`` tokens before them in all. A prompt is what nothing precedes, one token or many; whatever is
    run behind a cache is decoded, drafts and what is read to correct them too. Padding that a mask tells is left out.
    So is one of ``fillers`` (ids that end a text) that is decoded by itself: a text that has ended is fed them until
    all of its batch have, and the batch size must not matter."""

    fillers: frozenset[int] = frozenset()
    prompts: int = 0
    read: int = 0
    decoded: int = 0
    before: int = 0

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """Inside, what ``model`` is given is added."""
        handle = model.register_forward_pre_hook(self._add, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @property
    def prompt(self) -> float | None:
        """Mean tokens of a prompt; None where none was read."""
        return self.read / self.prompts if self.prompts else None

    @property
    def decode(self) -> float | None:
        """Mean tokens before a decoded one; None where none was decoded."""
        return self.before / self.decoded if self.decoded else None

    def _add(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if ids is None:
            return
        rows, tokens = ids.shape[:2]
        cache = caching.cache_given(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        if mask is not None and (mask.dim() != 2 or mask.shape[1] != past + tokens):
            mask = None  # one that was made already
        new = [tokens] * rows if mask is None else mask[:, past:].sum(dim=1).tolist()
        if not past:
            self.prompts += rows
            self.read += sum(new)
            return
        if tokens == 1 and ids.dim() == 2:
            new = [0 if one in self.fillers else n for one, n in zip(ids[:, 0].tolist(), new, strict=True)]
        behind = [past] * rows if mask is None else mask[:, :past].sum(dim=1).tolist()
        self.decoded += sum(new)
        self.before += sum(n * p + n * (n - 1) // 2 for n, p in zip(new, behind, strict=True))
