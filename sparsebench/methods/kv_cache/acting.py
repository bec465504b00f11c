"""A method of the KV cache at work: attached to a model, called at every layer, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsebench.costs.flops import Attention, attention_of
from sparsebench.costs.saving import Saving
from sparsebench.costs.storage import kv_bytes_per_token
from sparsebench.errors import UserError
from sparsebench.methods.base import Applied, Counted, Surroundings
from sparsebench.methods.kv_cache.base import Budgeted, KvMethod
from sparsebench.methods.kv_cache.entries import Entries
from sparsebench.models.plug import Allowed, Call, Handler, Work, plugged, positions_of, reach


@dataclass
class LayerCount:
    """Sums over the calls of one layer. ``zeros``, ``total``: for achieved. In decoding, over rows, KV heads and
    queries: ``dense`` entries of the dense model, ``stored`` and ``read`` in their place, ``pairs``
    computed; for prompts, pairs per query head."""

    zeros: float = 0.0
    total: float = 0.0
    dense: float = 0.0
    stored: float = 0.0
    read: float = 0.0
    pairs: float = 0.0
    prefill_dense: float = 0.0
    prefill_pairs: float = 0.0


@dataclass
class ActingMethod(Handler):
    """A fitted method, attached: it says what is computed, edits the cache, and counts."""

    method: str
    how: KvMethod
    model: PreTrainedModel
    learned: dict[str, Tensor] = field(default_factory=dict)
    target: str = "kv_cache"
    asked: float | None = None
    tolerance: float = 1e-9
    counts: dict[int, LayerCount] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    shortest: int = 0
    shared: dict[str, Any] = field(default_factory=dict)  # of the forward in progress
    now: Entries | None = None
    allowed: Allowed | None = None

    def __post_init__(self) -> None:
        self.asked = self.how.asked

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Acts inside the context, which starts counting anew."""
        self.counts, self.notes, self.shortest = {}, {}, 0
        with plugged(self.model, self):
            yield

    def before(self, call: Call) -> None:
        self.now = None
        if call.layer is None:
            return
        if call.index == 0:
            self.shared = {}
        self.now = Entries(call, self.learned, self.shared, self.notes)
        if call.index == 0:
            self._check(call)
        _ = self.now.prompt  # read while the cache still says so
        self.how.before(self.now)

    def allow(self, call: Call) -> Allowed | None:
        self.allowed = None if self.now is None else self.how.allow(self.now)
        return self.allowed

    def after(self, call: Call, work: Work) -> None:
        now = self.now
        if now is None:
            return
        count = self.counts.setdefault(call.index, LayerCount())
        if now.prefill:
            count.prefill_dense += float(work.dense.sum())
            count.prefill_pairs += float(work.computed.sum()) / work.computed.shape[1]
        else:
            self._count(now, count, work)
        self.how.compress(now)
        now.remember_prompt()
        zeros, total = self.how.tally(now, work)
        count.zeros += zeros
        count.total += total

    def _check(self, call: Call) -> None:
        """UserError when the sequence is longer than the model can be asked for, or the prompt does not fit."""
        context = positions_of(self.model)
        longest = int(call.real.sum(dim=1).max())
        if context is not None and longest > context and not self.how.streams:
            raise UserError(f"method={self.method}: {longest} tokens go past the model's context of {context}")
        if call.phase != "prefill":
            return
        if not bool(call.real[:, -1].all()):
            raise UserError(f"method={self.method}: prompts of different lengths must be padded on the left")
        lengths = sorted({int(one) for one in call.real.sum(dim=1)})
        self.shortest = min(self.shortest or lengths[0], lengths[0])
        check_prompts([(self.method, self.how)], self.model, lengths)

    def _count(self, now: Entries, count: LayerCount, work: Work) -> None:
        groups, seen = now.call.groups, now.seen
        count.dense += float(work.dense.sum()) * seen.shape[1]
        count.stored += float(self.how.stored(now).sum())
        read = seen
        if self.allowed is not None and self.allowed.mask is not None:
            mask = self.allowed.rows(0, now.call.tokens)
            union = mask if mask.shape[1] == 1 else now.grouped(mask).any(dim=2)
            read = (union & now.visible()).sum(dim=-1)
        index = torch.as_tensor(self.how.index_read(now), dtype=torch.float64, device=seen.device)
        count.read += float((read * self.how.share_read(now)).sum() + index.expand(seen.shape).sum())
        count.pairs += float(work.computed.sum()) / groups

    def counted(self) -> Counted:
        """What was dropped or not read inside the last context."""
        found = [self.counts[index] for index in sorted(self.counts)]
        dense, total = sum(one.dense for one in found), sum(one.total for one in found)
        if not dense or not total:  # nothing was decoded, so nothing acted on it
            return Counted(False, 0.0)
        self.tolerance = 1e-9 + self.how.tolerance(self.shortest, self.model)
        achieved = sum(one.zeros for one in found) / total
        stored, read, pairs = (sum(getattr(one, name) for one in found) / dense for name in ("stored", "read", "pairs"))
        columns = {"kv_stored": stored, "kv_read": read, **self.how.columns(self.notes, self.model)}
        return Counted(True, achieved, self._rows(), columns, self._saving(found, stored, read, pairs))

    def fitted(self) -> dict[str, Tensor]:
        return self.learned

    def _rows(self) -> list[dict[str, object]]:
        return [
            {
                "layer": f"kv_cache.{index}", "method": self.method, "asked": self.asked, "pattern": "unstructured",
                "achieved": count.zeros / count.total if count.total else 0.0, "zeros": count.zeros,
                "total": count.total, "kv_stored": count.stored / count.dense if count.dense else 1.0,
                "kv_read": count.read / count.dense if count.dense else 1.0,
            }
            for index, count in sorted(self.counts.items())
        ]  # fmt: skip

    def _saving(self, found: Sequence[LayerCount], stored: float, read: float, pairs: float) -> Saving:
        prompts = sum(one.prefill_dense for one in found)
        prefill = sum(one.prefill_pairs for one in found) / prompts if prompts else 1.0
        if self.how.asked == 0:  # nothing is looked for
            return Saving(pairs_prefill=prefill, pairs_decode=pairs, kv_stored=stored, kv_read=read)

        layers = attention_of(self.model)

        def total(one: Callable[[Attention, int], float]) -> Callable[[int], float]:
            return lambda length: sum(one(layers[i], length) for i in self.how.choosing(len(layers)))

        return Saving(
            pairs_prefill=prefill,
            pairs_decode=pairs,
            index_prefill=total(self.how.index_prefill),
            index_decode=total(self.how.index_decode),
            kv_stored=stored,
            kv_read=read,
        )


Named = tuple[str, KvMethod]


def check(stack: Sequence[Named], model: nn.Module) -> None:
    """UserError when the model's attention cannot be reached or a method's options do not fit. Changes nothing."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"model: {type(model).__name__} is no Hugging Face decoder, so methods cannot reach its cache")
    reach(model)
    for _, method in stack:
        _in_tokens(method, model).check_model(model)


def check_prompts(stack: Sequence[Named], model: nn.Module, lengths: Iterable[int]) -> None:
    """UserError when a method's options do not fit prompts of so many tokens. Changes nothing."""
    for _, method in stack:
        if method.asked != 0:
            fitted = _in_tokens(method, model)
            for tokens in lengths:
                fitted.check_prompt(tokens)


def apply(stack: Sequence[Named], around: Surroundings) -> Applied:
    """Fits each method of the stack; the model stays as it is, and they act once they are attached."""
    applied = Applied()
    model = around.loaded.model
    for label, method in stack:
        fitted = _in_tokens(method, model)
        applied.attachments.append(ActingMethod(label, fitted, model, fitted.fit(around)))
    return applied


def _in_tokens(method: KvMethod, model: nn.Module) -> KvMethod:
    """The method with its budget in entries where it was given in bytes. UserError for less than one entry, or for
    both."""
    if not isinstance(method, Budgeted) or method.budget_bytes is None:
        return method
    if method.budget is not None:
        raise UserError(f"{method.name('budget_bytes')}: goes without {method.name('budget')}")
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"model: {type(model).__name__} is no Hugging Face decoder, so its cache has no size in bytes")
    per_token = kv_bytes_per_token(model)
    if method.budget_bytes < per_token:
        raise UserError(f"{method.name('budget_bytes')}: one token takes {per_token} bytes of cache in this model")
    return replace(method, budget=method.budget_bytes // per_token, budget_bytes=None)
