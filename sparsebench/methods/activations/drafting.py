"""Sirius's decoding loop: sparse drafts, a full pass over each chunk, a rewritten cache.

repeat period - 1 times: the sparse model extends every beam by its best children; the best beams stay
the full model reads the chunk of every beam; its keys and values replace those of the drafts
p_i = softmax(full logits / temperature) of each drafted token; accepted: the leading ones with p_i >= threshold
the beam with the longest accepted part stays; the rest is rolled back; the full model's next token begins a chunk
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsebench.models import caching

_SURE = 0.95  # filter_active: a child this likely has no siblings


@dataclass(frozen=True)
class Settings:
    """Options of the loop, as the method declares them."""

    period: int
    threshold: float
    width: int
    temperature: float
    filter_active: bool
    rewrite: bool
    correct: bool


@dataclass
class Counts:
    """What decoding took, over all texts. ``tokens``: emitted after each text's first, which the prompt's full
    pass gives; ``advance`` and ``chunks`` leave out the last chunk of each text, as the paper does."""

    texts: int = 0
    tokens: int = 0
    draft_steps: int = 0
    draft_rows: int = 0
    corrections: int = 0
    corrected_tokens: int = 0
    advance: int = 0
    chunks: int = 0
    all_advance: int = 0


@dataclass
class Decoder:
    """Greedy decoding of one text at a time. ``sparse``: a context in which the model is sparse; ``prompted``: a
    context around the prompt's full pass, in which the sparse model may look at the prompt."""

    model: Any
    settings: Settings
    sparse: Callable[[], AbstractContextManager[None]]
    prompted: Callable[[], AbstractContextManager[None]]
    counts: Counts = field(default_factory=Counts)

    def _forward(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        logits, cache = caching.read(self.model, ids, cache)
        return logits.float(), cache

    @torch.no_grad()
    def generate(self, ids: Tensor, new: int, ends: set[int]) -> list[int]:
        """At most ``new`` tokens behind a prompt, ids (1, tokens); up to and with the first of ``ends``."""
        logits, cache = self.read(ids)
        text = [int(logits[0, -1].argmax())]
        self.counts.texts += 1
        while len(text) < new and text[-1] not in ends:
            found, cache = self.advance(text[-1], cache, new - len(text), ends)
            text += found
            self.counts.tokens += len(found)
        return text

    def read(self, ids: Tensor) -> tuple[Tensor, Any]:
        """The full model's logits of a prompt, (1, tokens), and the cache behind it."""
        with self.prompted():
            return self._forward(ids, None)

    def advance(self, start: int, cache: Any, most: int, ends: set[int]) -> tuple[list[int], Any]:
        """The next tokens behind ``start``, at least one and at most ``most``, and the cache in front of the last."""
        if self.settings.correct:
            return self._chunk(start, cache, min(self.settings.period, most), ends)
        return self._alone(start, cache)

    def _alone(self, start: int, cache: Any) -> tuple[list[int], Any]:
        """One token of the sparse model, never corrected."""
        with self.sparse():
            logits, cache = self._forward(_ids([[start]], self.model), cache)
        self.counts.draft_steps += 1
        self.counts.draft_rows += 1
        return [int(logits[0, -1].argmax())], cache

    def _chunk(self, start: int, cache: Any, period: int, ends: set[int]) -> tuple[list[int], Any]:
        """One period: the accepted draft and the full model's token behind it, and the cache in front of that."""
        beams, cache = self._draft(start, cache, period, ends)
        drafted = period - 1  # entries of the chunk that the drafts left in the cache
        own = None if self.settings.rewrite else _snapshot(cache)
        _roll_back(cache, drafted)
        logits, cache = self._forward(beams, cache)
        self.counts.corrections += 1
        self.counts.corrected_tokens += beams.numel()
        chance = (logits / self.settings.temperature).softmax(dim=-1)
        tested = chance[:, :-1].gather(-1, beams[:, 1:, None])[..., 0] >= self.settings.threshold
        accepted = tested.long().cumprod(dim=1).sum(dim=1)
        best = int(accepted.argmax())  # the first of equals
        kept = int(accepted[best])
        token = int(logits[best, kept].argmax())
        cache.reorder_cache(torch.tensor([best]))
        if own is not None:
            _restore(cache, own, best, drafted)
        _roll_back(cache, period - 1 - kept)
        self.counts.all_advance += kept + 1
        if period == self.settings.period and token not in ends:
            self.counts.advance += kept + 1
            self.counts.chunks += 1
        return [*beams[best, 1 : kept + 1].tolist(), token], cache

    def _draft(self, start: int, cache: Any, period: int, ends: set[int]) -> tuple[Tensor, Any]:
        """(beams, period) ids that begin with ``start``, best first, and the cache with their drafted entries."""
        beams = _ids([[start]], self.model)
        total = torch.zeros(1, device=beams.device)
        for _ in range(period - 1):
            with self.sparse():
                logits, cache = self._forward(beams[:, -1:], cache)
            self.counts.draft_steps += 1
            self.counts.draft_rows += len(beams)
            likely = (logits[:, -1] / self.settings.temperature).log_softmax(dim=-1)
            for end in ends:  # only the full model ends a text
                likely[:, end] = -torch.inf
            parents, tokens, total = self._spawn(likely, total)
            cache.reorder_cache(parents)
            beams = torch.cat([beams[parents], tokens[:, None]], dim=1)
        return beams, cache

    def _spawn(self, likely: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best children of all beams. likely: (beams, vocabulary) -> (parents, tokens, summed likelihoods)."""
        width = min(self.settings.width, likely.shape[1])
        values, tokens = likely.topk(width, dim=-1)
        if self.settings.filter_active:
            sure = values.exp() > _SURE
            later = sure.long().cumsum(dim=1) - sure.long() > 0
            values = values.masked_fill(later, -torch.inf)
        scores = (total[:, None] + values).flatten()
        best = scores.topk(min(width, len(scores))).indices
        best = best[scores[best] > -torch.inf]
        return best // width, tokens.flatten()[best], scores[best]


def _ids(rows: list[list[int]], model: Any) -> Tensor:
    return torch.tensor(rows, device=next(model.parameters()).device)


def _roll_back(cache: Any, entries: int) -> None:
    """Takes the last entries off every layer."""
    if entries:
        cache.crop(-entries)


def _snapshot(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _restore(cache: Any, own: list[tuple[Tensor, Tensor]], beam: int, drafted: int) -> None:
    """Puts the drafts' own entries back in place of the full model's; the last token has none and keeps that."""
    if not drafted:
        return
    for layer, (keys, values) in zip(cache.layers, own, strict=True):
        layer.keys[:, :, -1 - drafted : -1] = keys[beam : beam + 1, :, -drafted:]
        layer.values[:, :, -1 - drafted : -1] = values[beam : beam + 1, :, -drafted:]
