"""Mustafar: unstructured pruning of cached keys and values (Joo et al. 2025, arXiv 2505.22913; dhjoo98/mustafar).

    per token and KV head:  x <- x * (|x| >= the int(s D)-th smallest |x|)      of keys (rotated) and of values

No token is dropped. The newest ``residual_length`` tokens stay dense; a token is pruned once, when it leaves that
window, after the output of the step (so the step that pushes it out still sees it whole). The released rule keeps the
threshold itself: without ties it removes ``max(1, int(s D)) - 1`` entries, one fewer than asked; ``exact_count``
removes ``int(s D)``. Ties at the threshold all stay.

Other directions and criteria are the paper's ablations: ``direction=channel`` ranks the values of one channel over
groups of ``group_size`` consecutive tokens, complete groups only; ``criterion=output_aware`` ranks keys by |q k|, with
q the mean of |q| over the last 32 queries of the prompt (summed over the KV head's query heads), for later tokens the
sum over the steps they spend in the window, and values by the attention paid to them times |v|; its count is exact.

``store=bitmap`` prunes ``compress_chunk`` tokens at a time, as the kernel does, and puts them through the bitmap
format (exact); ``masked`` prunes one by one. ``kv_stored`` and ``kv_read`` are bytes of that format, in the cache's
own dtype, over dense bytes; a head size that is no multiple of 64 fills up the last tile of a value. Achieved sparsity
counts zeros over the entries of pruned tokens, keys and values together; ``kv_sparsity`` the same over the whole
cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsebench.costs.flops import attention_of
from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.kv_cache import bitmap
from sparsebench.methods.kv_cache.base import KvMethod
from sparsebench.methods.kv_cache.entries import Entries
from sparsebench.models.plug import Work

KEYS, VALUES = 0, 1
ALONG = ("tokens", "channels")  # how their tiles lie
PRUNED = ("pruned_keys", "pruned_values")  # per-entry memory
QUERIES, PAID = "queries", "paid"
OBSERVED = 32  # last queries of a prompt that output-aware scores look at


@method(
    name="mustafar",
    version=1,
    paper="Joo et al. 2025, arXiv 2505.22913",
    target="kv_cache",
    phase="decode",
    taxonomy=Taxonomy(
        object="kv_cache",
        granularity=("unstructured",),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        benefit_realised_on=("memory",),
        kernel_required="attention over bitmap-compressed keys and values",
    ),
)
@dataclass(frozen=True)
class Mustafar(KvMethod):
    """Zeroes the smallest entries of every cached key and value outside a dense window."""

    k_sparsity: float | None = option(None, "sparsity of keys, in place of sparsity", low=0.0, below=1.0)
    v_sparsity: float | None = option(None, "sparsity of values, in place of sparsity", low=0.0, below=1.0)
    residual_length: int = option(32, "newest tokens that stay dense", low=0, unit="tokens")
    group_size: int = option(
        32, "tokens that are ranked together", low=2, unit="tokens", only="direction_k|direction_v=channel"
    )
    direction_k: str = option("token", "keys that are ranked together", choices=("token", "channel"))
    direction_v: str = option("token", "values that are ranked together", choices=("token", "channel"))
    criterion_k: str = option("magnitude", "what keys are ranked by", choices=("magnitude", "output_aware"))
    criterion_v: str = option("magnitude", "what values are ranked by", choices=("magnitude", "output_aware"))
    exact_count: bool = option(False, "remove exactly int(s D), not one fewer as the released code")
    store: str = option("masked", "how pruned tokens are kept", choices=("masked", "bitmap"))
    compress_chunk: int = option(256, "tokens that are pruned together, a multiple of 64", low=64, only="store=bitmap")

    @property
    def levels(self) -> tuple[float, float]:
        """Sparsity of keys and of values."""
        both = super().asked or 0.0
        return (
            both if self.k_sparsity is None else self.k_sparsity,
            both if self.v_sparsity is None else self.v_sparsity,
        )

    @property
    def directions(self) -> tuple[str, str]:
        """Of keys and of values."""
        return self.direction_k, self.direction_v

    @property
    def criteria(self) -> tuple[str, str]:
        """Of keys and of values."""
        return self.criterion_k, self.criterion_v

    @property
    def asked(self) -> float | None:
        return sum(self.levels) / 2

    def check_model(self, model: PreTrainedModel) -> None:
        if self.compress_chunk % bitmap.TILE:
            raise UserError(f"{self.name('compress_chunk')}: must be a multiple of {bitmap.TILE}")

    @property
    def chunk(self) -> int:
        """Tokens that are pruned together."""
        return self.compress_chunk if self.store == "bitmap" else 1

    def compress(self, now: Entries) -> None:
        layer, state = now.layer, now.layer.state
        if layer.keys is None or layer.values is None:
            raise ValueError("nothing was cached yet")
        self._observe(now)
        whole = (now.lengths - self.residual_length).clamp(min=0) // self.chunk * self.chunk
        ready = now.valid & (now.rank < whole[..., None])
        for which in (KEYS, VALUES):
            done = state.get(PRUNED[which], torch.zeros_like(ready))
            due = ready & ~done
            if self.directions[which] == "channel":
                due = self._whole_groups(due)
            if bool(due.any()):
                pruned = self._pruned(now, layer.keys if which == KEYS else layer.values, which, due)
                layer.keys, layer.values = (pruned, layer.values) if which == KEYS else (layer.keys, pruned)
            state[PRUNED[which]] = done | due

    def _whole_groups(self, due: Tensor) -> Tensor:
        """The part of what is due (B, K, S) that fills groups; the rest waits."""
        most = due.sum(dim=-1, keepdim=True) // self.group_size * self.group_size
        return due & (due.long().cumsum(dim=-1) <= most)

    def _pruned(self, now: Entries, x: Tensor, which: int, due: Tensor) -> Tensor:
        """Keys or values (B, K, S, D) with the entries that fall away zeroed where they are due (B, K, S)."""
        level, kept = self.levels[which], due.new_ones(x.shape)
        if level:
            scores = self._scores(now, x, which)
            exact = self.exact_count or self.criteria[which] == "output_aware"
            if self.directions[which] == "token":
                kept = survivors(scores, level, exact) | ~due[..., None]
            else:
                groups = scores[due].unflatten(0, (-1, self.group_size)).transpose(1, 2)
                kept[due] = survivors(groups, level, exact).transpose(1, 2).flatten(0, 1)
        pruned = x * kept
        if self.store == "bitmap":
            _through_format(pruned, due, ALONG[which])
        note(now, "pruned_zeros", float((~kept).sum()))
        note(now, "pruned_total", float(due.sum()) * x.shape[-1])
        return pruned

    def _scores(self, now: Entries, x: Tensor, which: int) -> Tensor:
        size = x.float().abs()
        if self.criteria[which] == "magnitude":
            return size
        seen = now.layer.state[QUERIES] if which == KEYS else now.layer.state[PAID][..., None]
        return size * seen

    def _observe(self, now: Entries) -> None:
        """What output-aware scores need: |q| and the attention that each entry saw while it was in the window."""
        state, call = now.layer.state, now.call
        last = min(OBSERVED, call.tokens) if now.prefill else call.tokens
        if self.criterion_k == "output_aware":
            seen = now.visible(call.tokens - last).float()  # entries count the queries that came with or after them
            seen = torch.ones_like(seen) if now.prefill else seen
            query = now.grouped(call.query[:, :, -last:].abs().float()).sum(dim=2)
            query = query * call.real[:, None, -last:, None]
            total = seen.transpose(-1, -2) @ query
            state[QUERIES] = state[QUERIES] + total if QUERIES in state else total
        if self.criterion_v == "output_aware":
            paid = now.grouped(now.attention(last)).sum(dim=(2, 3))
            state[PAID] = state[PAID] + paid if PAID in state else paid

    def tally(self, now: Entries, work: Work) -> tuple[float, float]:
        notes = now.notes
        found = notes.pop("pruned_zeros", 0.0), notes.pop("pruned_total", 0.0)
        if not now.prefill:
            x = now.layer
            if x.keys is None or x.values is None:
                raise ValueError("nothing was cached yet")
            note(now, "cache_zeros", float(((x.keys == 0).sum(-1) + (x.values == 0).sum(-1))[now.valid].sum()))
            note(now, "cache_total", float(now.valid.sum()) * 2 * x.keys.shape[-1])
        return found

    def stored(self, now: Entries) -> Tensor:
        return now.seen * self.share_read(now)

    def share_read(self, now: Entries) -> Tensor | float:
        if not self.asked or PRUNED[KEYS] not in now.layer.state:
            return 1.0
        stored = torch.zeros(now.lengths.shape, device=now.lengths.device)
        for which, x in ((KEYS, now.call.key), (VALUES, now.call.value)):
            done = (now.layer.state[PRUNED[which]] & now.valid).flatten(0, 1)
            columns = (~done).long().argsort(dim=-1, stable=True)[:, : max(1, int(done.sum(dim=-1).max()))]
            rows = x.flatten(0, 1).gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))
            packed = bitmap.tile_bytes(rows, ALONG[which], done.gather(1, columns)).view_as(stored)
            dense = x.shape[-1] * x.element_size()
            stored += packed / dense + now.lengths - done.sum(dim=-1).view_as(stored)
        return (stored / (2 * now.lengths.clamp(min=1)))[..., None]

    def tolerance(self, shortest: int, model: PreTrainedModel) -> float:
        return 2 / min(layer.head_dim for layer in attention_of(model))  # int(s D), and one fewer

    def columns(self, notes: Mapping[str, float], model: PreTrainedModel) -> dict[str, Any]:
        return {"kv_sparsity": notes["cache_zeros"] / notes["cache_total"]} if notes.get("cache_total") else {}


def note(now: Entries, name: str, value: float) -> None:
    """Adds to what is remembered for the record."""
    now.notes[name] = now.notes.get(name, 0.0) + value


def survivors(scores: Tensor, level: float, exact: bool) -> Tensor:
    """(..., D) bool: what stays of each line. By the released rule everything at least as large as the ``max(1,
    int(level D))``-th smallest; ``exact``: all but the ``int(level D)`` smallest, of equal ones the first go."""
    count = int(scores.shape[-1] * level)
    if not exact:
        return scores >= scores.kthvalue(max(1, count), dim=-1, keepdim=True).values
    order = scores.argsort(dim=-1, stable=True)
    places = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return places >= count


def _through_format(x: Tensor, due: Tensor, along: str) -> None:
    """Packs what is due and puts what comes out in its place; (B, K, S, D) is filled up to whole tiles."""
    for row in range(len(due)):
        for head in range(due.shape[1]):
            part = x[row, head, due[row, head]]
            tokens, size = part.shape
            more = (0, -size % bitmap.TILE if along == "channels" else 0, 0, -tokens % bitmap.TILE)
            packed = bitmap.pack(torch.nn.functional.pad(part, more)[None], along)
            x[row, head, due[row, head]] = packed.unpack()[0, :tokens, :size]
