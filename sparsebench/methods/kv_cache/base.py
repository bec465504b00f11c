"""What a method of the KV cache is: the contract of the family, and the bases on which a method is a few lines.

Two kinds. An *evictor* drops entries for good when the prompt was read (and, some, while tokens are decoded); a
*selector* stores all and lets each query read some. Merging and compressing methods override ``compress`` themselves.

A budget is given as ``sparsity`` (share of the prompt's tokens that is dropped, or not read), ``budget`` (entries per
KV head) or ``budget_bytes`` (of the cache of one sequence, all layers). With ``sparsity`` s a prompt of T tokens has
the budget ``int(T * (1 - s))``, as in the methods' own code; it does not grow while tokens are decoded. ``sparsity=0``
drops nothing, ever. ``achieved`` of an evictor is 1 - kept / T at the end of the prompt; of a selector 1 - read / T,
on average over the queries after the prompt (what choosing reads not included). What is stored and read on average
while tokens are decoded, over what the dense model stores at the same step, stands in ``kv_stored`` and ``kv_read``,
all included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsebench.costs.flops import Attention
from sparsebench.declare import Declared, option
from sparsebench.errors import UserError
from sparsebench.methods.base import Surroundings
from sparsebench.methods.kv_cache.entries import Entries, top
from sparsebench.models.plug import Allowed, Work

UNBOUNDED = 2**40  # a budget that no sequence reaches


@dataclass(frozen=True)
class KvMethod(Declared, ABC):
    """Base of the methods of the KV cache."""

    sparsity: float | None = option(
        None, "prompt tokens dropped or not read / prompt tokens; the run's sparsity if not given", low=0.0, below=1.0
    )

    @property
    def asked(self) -> float | None:
        """The sparsity to reach; None where something else was asked for."""
        return 0.5 if self.sparsity is None else self.sparsity

    @property
    def streams(self) -> bool:
        """Whether positions stay bounded, so that generation may go past the model's context."""
        return False

    def name(self, option_name: str) -> str:
        """An option as the user writes it, with its value."""
        return f"method.{self.declared['name']}.{option_name}={getattr(self, option_name)}"

    def check_model(self, model: PreTrainedModel) -> None:
        """UserError when an option does not fit the model or another option. Changes nothing."""

    def check_prompt(self, tokens: int) -> None:
        """UserError when an option does not fit a prompt of so many tokens."""

    def fit(self, around: Surroundings) -> dict[str, Tensor]:
        """What the method learns from calibration data or the seed, by name; ``Entries.learned`` gives it back."""
        return {}

    def before(self, now: Entries) -> None:
        """May replace ``now.call.query`` and ``now.call.key``."""

    def allow(self, now: Entries) -> Allowed | None:
        """The pairs to compute; None: all that are seen."""
        return None

    def compress(self, now: Entries) -> None:
        """The output is computed: drop, merge or shrink entries."""

    @abstractmethod
    def tally(self, now: Entries, work: Work) -> tuple[float, float]:
        """(zeros, total) of one call for ``achieved``, after ``compress``."""

    def stored(self, now: Entries) -> Tensor:
        """(B, K, T): what the cache holds at each query, in entries of the dense model's size."""
        return now.seen

    def share_read(self, now: Entries) -> Tensor | float:
        """Bytes of an entry that a query reads / bytes of a dense entry, broadcastable to (B, K, T)."""
        return 1.0

    def index_read(self, now: Entries) -> Tensor | float:
        """What choosing reads for each query, in entries, broadcastable to (B, K, T)."""
        return 0.0

    def choosing(self, layers: int) -> range:
        """The layers, of so many, in which something is chosen."""
        return range(layers)

    def index_prefill(self, layer: Attention, length: int) -> float:
        """FLOPs of choosing in one layer for a prompt of ``length`` tokens."""
        return 0.0

    def index_decode(self, layer: Attention, length: int) -> float:
        """FLOPs of choosing in one layer for one token decoded after ``length``."""
        return 0.0

    def tolerance(self, shortest: int, model: PreTrainedModel) -> float:
        """How far achieved may lie from asked when the shortest prompt had so many tokens."""
        return 1 / max(1, shortest)

    def columns(self, notes: Mapping[str, float], model: PreTrainedModel) -> dict[str, Any]:
        """More columns of the record, from the sums that ``Entries.notes`` gathered and the model's shape."""
        return {}


@dataclass(frozen=True)
class Budgeted(KvMethod):
    """Base of methods with a budget of entries per KV head."""

    budget: int | None = option(None, "entries per head, in place of sparsity", low=1, unit="instead of sparsity")
    budget_bytes: int | None = option(
        None, "bytes of one sequence's cache, in place of sparsity and budget", low=1, unit="instead of sparsity"
    )

    @property
    def asked(self) -> float | None:
        return None if self.budget is not None or self.budget_bytes is not None else super().asked

    def kept(self, tokens: Tensor) -> Tensor:
        """The budget of prompts of so many tokens: int64 -> int64."""
        if self.budget is not None:
            return torch.full_like(tokens, self.budget)
        level = self.asked or 0.0
        return (tokens.double() * (1 - level)).long() if level else torch.full_like(tokens, UNBOUNDED)

    def forced(self, kept: int) -> int:
        """Entries that a budget of ``kept`` must hold whatever their scores."""
        return 1

    def check_prompt(self, tokens: int) -> None:
        kept = int(self.kept(torch.tensor(tokens)))
        if kept < min(tokens, self.forced(kept)):
            what = self.name("sparsity" if self.budget is None else "budget")
            forced = self.forced(kept)
            raise UserError(
                f"{what}: keeps {kept} of a prompt's {tokens} tokens, fewer than the {forced} that are forced"
            )


@dataclass(frozen=True)
class Evictor(Budgeted):
    """Base of methods that score entries and keep the best of each KV head."""

    @property
    def while_decoding(self) -> bool:
        """Whether entries are also dropped after each decoded token, so that the cache keeps its size."""
        return False

    def observe(self, now: Entries) -> None:
        """Sees every call, before anything is dropped."""

    def score(self, now: Entries) -> Tensor:
        """(B, K, S): the higher, the rather kept; +inf for entries that must stay."""
        raise NotImplementedError

    def choose(self, now: Entries, count: Tensor) -> Tensor:
        """(B, K, S) bool: what is kept of budgets ``count`` (B,)."""
        return top(self.score(now), count[:, None], now.valid)

    def compress(self, now: Entries) -> None:
        self.observe(now)
        if not now.prefill and not self.while_decoding:
            return
        count = self.kept(now.prompt)
        if bool((now.lengths > count[:, None]).any()):
            now.keep(self.choose(now, count))

    def tally(self, now: Entries, work: Work) -> tuple[float, float]:
        if not now.prefill:
            return 0.0, 0.0
        total = float(now.prompt.sum()) * now.call.key.shape[1]
        return total - float(now.kept().sum()), total


@dataclass(frozen=True)
class Selector(Budgeted):
    """Base of methods that store all entries and choose for each query what it reads."""

    def select(self, now: Entries, count: Tensor) -> Tensor | None:
        """(B, H or K, T, S) bool: what the queries read of budgets ``count`` (B,); None: all."""
        raise NotImplementedError

    def allow(self, now: Entries) -> Allowed | None:
        if now.prefill or self.asked == 0:
            return None
        mask = self.select(now, self.kept(now.prompt))
        if mask is None:
            return None
        return Allowed(now.repeated(mask) if mask.shape[1] == now.call.key.shape[1] else mask)

    def tally(self, now: Entries, work: Work) -> tuple[float, float]:
        if now.prefill:
            return 0.0, 0.0
        heads, tokens = work.computed.shape[1], now.call.tokens
        total = float(now.prompt.sum()) * heads * tokens
        return max(0.0, total - float(work.computed.sum())), total


def scaled(given: int | None, paper: int, most: int) -> int:
    """A size that was given, or the paper's, but at most ``most`` (0 at least)."""
    return given if given is not None else max(0, min(paper, most))
