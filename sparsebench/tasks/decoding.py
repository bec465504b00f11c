"""Reading and writing with a causal model through its cache: prompts, greedy tokens, follow-ups, copies.

A plain loop instead of ``generate``: the methods of inference time see each prompt as one prefill (or one follow-up)
and every new token as one decode step, and what was read can be kept, copied and read on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from sparsebench.models import caching
from sparsebench.models.base import LoadedModel

Choose = Callable[[Tensor], list[int]]  # logits (rows, vocabulary) -> an id a row


def likeliest(logits: Tensor) -> list[int]:
    """The most likely id of each row."""
    chosen: list[int] = logits.argmax(-1).tolist()
    return chosen


@dataclass(frozen=True)
class Sampler:
    """Draws each row's id with a generator of its own, so that what a row draws does not depend on its batch.

    ``temperature`` > 0 divides the logits; of the result the fewest ids that together reach the probability ``top_p``
    are drawn from, in proportion."""

    rngs: Sequence[Random]
    temperature: float = 1.0
    top_p: float = 1.0

    def __call__(self, logits: Tensor) -> list[int]:
        """logits: (rows, vocabulary), a row for each generator."""
        found, order = (logits.float() / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        kept = found * (found.cumsum(-1) - found < self.top_p)
        sums = kept.cumsum(-1)
        draws = torch.tensor([[rng.random()] for rng in self.rngs], dtype=sums.dtype, device=sums.device)
        at = torch.searchsorted(sums, draws * sums[:, -1:], right=True)
        last = (kept > 0).sum(-1, keepdim=True) - 1  # what rounding may overshoot
        chosen: list[int] = order.gather(-1, torch.minimum(at, last))[:, 0].tolist()
        return chosen


@dataclass
class Stream:
    """Rows of text as a model has read them. ``cache``: what it keeps of them; ``logits``: (rows, vocabulary) of the
    next token; ``real``: (rows, tokens fed) int64, 0 for padding."""

    loaded: LoadedModel
    cache: Any = None
    logits: Tensor | None = None
    real: Tensor | None = None

    @torch.no_grad()
    def feed(self, prompts: Sequence[Sequence[int]]) -> Stream:
        """Reads one prompt a row, in one forward. The first ones may differ in length (they are padded on the left),
        later ones must not (ValueError). FloatingPointError when the model's logits are not numbers."""
        longest = max(map(len, prompts))
        if self.real is not None and any(len(prompt) < longest for prompt in prompts):
            raise ValueError("prompts that follow others must be of one length")
        filler = min(end_tokens(self.loaded), default=0)
        ids = torch.tensor([[filler] * (longest - len(one)) + list(one) for one in prompts], device=self.loaded.device)
        real = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=ids.device)
        self.real = real if self.real is None else torch.cat([self.real, real], dim=1)
        where: dict[str, Tensor] = {}
        if not self.real.all():
            places = (self.real.cumsum(dim=1) - 1).clamp(min=0)
            where = {"attention_mask": self.real, "position_ids": places[:, -longest:]}
        last = caching.last_only(self.loaded.model)
        logits, self.cache = caching.read(self.loaded.model, ids, self.cache, **where, **last)
        self.logits = logits[:, -1]
        if self.logits.isnan().any():
            raise FloatingPointError("the model's logits are not numbers (NaN)")
        return self

    def write(self, max_new: int, stop: Sequence[str] = (), choose: Choose = likeliest) -> list[list[int]]:
        """The next ids, the most likely ones or as ``choose`` says: at most ``max_new`` a row, without the end of text,
        up to and with the token that completes one of the texts in ``stop``. All but the last are fed. A row that has
        ended is fed its end token until all rows have."""
        if self.logits is None or self.real is None:
            raise ValueError("nothing was fed yet")
        ends = end_tokens(self.loaded)
        found: list[list[int]] = [[] for _ in self.real]
        running = set(range(len(found)))
        for step in range(max_new):
            chosen = choose(self.logits)
            for row in sorted(running):
                if chosen[row] not in ends:
                    found[row].append(chosen[row])
                if chosen[row] in ends or _completes(self.loaded, found[row], stop):
                    running.discard(row)
            if not running or step + 1 == max_new:
                break
            self.feed([[chosen[row] if row in running else min(ends, default=0)] for row in range(len(found))])
        return found

    def copy(self) -> Stream:
        """The same rows, to be read on without a trace in this one."""
        return Stream(self.loaded, deepcopy(self.cache), self.logits, self.real)


def greedy(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], max_new: int, stop: Sequence[str] = ()
) -> list[list[int]]:
    """The most likely ids after each prompt, as ``Stream.write`` gives them."""
    return Stream(loaded).feed(prompts).write(max_new, stop)


def end_tokens(loaded: LoadedModel) -> set[int]:
    """The ids that end a text, by the tokenizer and by the model's own generation settings."""
    named = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
    found = set(named) if isinstance(named, (list, tuple)) else {named}
    return {int(one) for one in found | {loaded.tokenizer.eos_token_id} if one is not None}


def fillers(loaded: LoadedModel) -> frozenset[int]:
    """The ids that a row is fed when its text has ended and others of its batch have not."""
    pad = loaded.tokenizer.pad_token_id
    return frozenset(end_tokens(loaded) | ({int(pad)} if pad is not None else set()))


def _completes(loaded: LoadedModel, ids: list[int], stop: Sequence[str]) -> bool:
    """Whether the text's end holds a stop text; looks back far enough for one id a character."""
    if not stop:
        return False
    tail = str(loaded.tokenizer.decode(ids[-max(map(len, stop)) - 4 :]))
    return any(text in tail for text in stop)
