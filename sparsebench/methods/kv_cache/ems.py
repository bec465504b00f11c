"""EMS: evict, then merge (Li et al. 2024, arXiv 2412.08521), rebuilt from its abstracts: there is no released code.

    G_j = mean over the queries that see j of A_tj   (global);   L_j = mean over the last w queries of A_tj   (local)
    score = maxpool(L) + maxpool(G) * (sum L / sum G);   the last w entries always stay
    centres = the ``budget`` best, the window included;  candidates = the next min(T - budget, gamma * budget)
    a candidate joins the centre (not of the window) with the largest cosine of keys; below tau, and all else: evicted
    V_c <- sum p_i V_i,   K_c <- ||K_c|| khat / ||khat||,   khat = sum p_i K_i / ||K_i||,   p_i = score_i / its class's

Keys are rotated when they are merged and keep the centre's position. A merged entry has the softmax mass of one.
Attention is averaged over a KV head's query heads. While tokens are decoded the cache grows by ``decode_buffer``
entries, then the same is done on it; the accumulated score moves with the entries (a centre takes over its members').
``tau=1.01`` is eviction by the same score; ``tau=mean`` takes the head's mean similarity. ``norm_preserve`` is the
paper's key norm. The window is 32, at most half of the budget. Achieved sparsity is 1 - kept / T at the end of the
prompt.

A centre is the best of its class by score, not its only member: neighbours that say the same have about the same score
(pooling makes it the same), so both stay or both fall, and a twin that falls finds no centre like it. On facts that
stand twice in a row it therefore recalls what eviction by its score does, less than random entries, of which one of two
twins is enough; where twins are apart it is at random's level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from sparsebench.costs.flops import Attention
from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.kv_cache.base import Evictor, scaled
from sparsebench.methods.kv_cache.entries import Entries, newest, top

GLOBAL, SEERS = "ems_global", "ems_seers"  # summed attention of an entry, and queries that saw it


@method(
    name="ems",
    version=1,
    paper="Li et al. 2024, arXiv 2412.08521",
    target="kv_cache",
    phase="prefill+decode",
    baseline="random_kv",
    taxonomy=Taxonomy(
        object="kv_cache",
        granularity=("token",),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        benefit_realised_on=("memory", "flops"),
        kernel_required="attention that gives column sums",
    ),
)
@dataclass(frozen=True)
class Ems(Evictor):
    """Merges what falls out of the budget into similar kept entries, and evicts the rest."""

    window: int | None = option(None, "last entries that always stay; 32 if not given", low=1, unit="tokens")
    pool_kernel: int = option(7, "scores: maximum over so many neighbours, an odd number", low=1)
    global_norm: str = option("count", "the global score: divided by the queries that see an entry, or not",
                              choices=("count", "none"))  # fmt: skip
    combine: str = option("sum", "how the global and the local score are joined", choices=("sum", "max"))
    gamma: float = option(2.0, "candidates for merging / budget", low=0.0)
    tau: str = option("0.6", "cosine below which a candidate is evicted: a number, or mean")
    norm_preserve: bool = option(True, "merged keys keep the centre's norm")
    merge_weights: str = option("score", "what members weigh", choices=("score", "uniform"))
    decode_buffer: int = option(32, "entries that may come before the cache is compressed again", low=1)

    @property
    def while_decoding(self) -> bool:
        return True

    def check_model(self, model: PreTrainedModel) -> None:
        if self.pool_kernel % 2 == 0:
            raise UserError(f"{self.name('pool_kernel')}: must be odd")
        try:
            if self.tau != "mean":
                float(self.tau)
        except ValueError:
            raise UserError(f"{self.name('tau')}: must be a number or mean") from None

    def forced(self, kept: int) -> int:
        return scaled(self.window, 32, kept // 2) + 1

    def observe(self, now: Entries) -> None:
        state = now.layer.state
        for name, new in (
            (GLOBAL, now.grouped(now.attention_sums()).mean(dim=2)),
            (SEERS, now.visible().sum(dim=2).float()),
        ):
            state[name] = state[name] + new if name in state else new

    def compress(self, now: Entries) -> None:
        self.observe(now)
        count = self.kept(now.prompt)
        spare = 0 if now.prefill else self.decode_buffer
        due = (now.lengths > (count + spare)[:, None]).any(dim=1)
        if bool(due.any()):
            self._merge(now, torch.where(due, count, now.lengths.amax(dim=1)))

    def scores(self, now: Entries, window: Tensor) -> Tensor:
        """(B, K, S) float32: the global-local score, with ``window`` (B,) last queries."""
        state = now.layer.state
        total = state[GLOBAL] / state[SEERS].clamp(min=1) if self.global_norm == "count" else state[GLOBAL]
        last = min(int(window.max()), now.call.tokens)
        weights = now.grouped(now.attention(last)).mean(dim=2)  # (B, K, last, S)
        asked = torch.arange(last, device=weights.device) >= last - window[:, None]
        local = (weights * asked[:, None, :, None]).sum(dim=2) / window[:, None, None]
        # neighbours are entries: padding and holes between them are not pooled over
        dense = [one.masked_fill(~now.valid, 0).gather(2, now.order) for one in (total, local)]
        pooled = combined(dense[0], dense[1], now.lengths, self.pool_kernel, self.combine)
        return torch.zeros_like(pooled).scatter(2, now.order, pooled)

    def _merge(self, now: Entries, count: Tensor) -> None:
        layer = now.layer
        if layer.keys is None or layer.values is None or layer.positions is None:
            raise ValueError("nothing was cached yet")
        window = torch.tensor([scaled(self.window, 32, int(one) // 2) for one in count], device=count.device)
        scores, latest = self.scores(now, window), newest(now.valid, window[:, None])
        ranked = scores.masked_fill(latest, torch.inf)
        centres = top(ranked, count[:, None], now.valid)
        more = torch.minimum(now.lengths - count[:, None], (self.gamma * count).long()[:, None]).clamp(min=0)
        candidates = top(ranked, more, now.valid & ~centres)
        to = assigned(
            layer.keys.float(), centres & ~latest, candidates, None if self.tau == "mean" else float(self.tau)
        )
        weight = scores if self.merge_weights == "score" else torch.ones_like(scores)
        keys, values, joined = merged(layer.keys.float(), layer.values.float(), weight, to, self.norm_preserve)
        layer.keys, layer.values = keys.to(layer.keys.dtype), values.to(layer.values.dtype)
        state, moved = layer.state, (to >= 0) & candidates
        for name in (GLOBAL,):
            state[name] = state[name].scatter_add(2, to.clamp(min=0), state[name] * moved)
        now.keep(centres)
        for name, value in (("merged", float(joined.sum())), ("candidates", float(candidates.sum()))):
            now.notes[name] = now.notes.get(name, 0.0) + value

    def index_prefill(self, layer: Attention, length: int) -> float:
        budget = min(length, int(self.kept(torch.tensor(length))))
        similar = 2.0 * layer.kv_heads * layer.head_dim * budget * min(length - budget, self.gamma * budget)
        return 2.0 * layer.heads * layer.head_dim * layer.pairs(length) + similar

    def columns(self, notes: Mapping[str, float], model: PreTrainedModel) -> dict[str, Any]:
        return {"kv_merged": notes["merged"] / notes["candidates"]} if notes.get("candidates") else {}


def combined(total: Tensor, local: Tensor, lengths: Tensor, kernel: int, how: str) -> Tensor:
    """The global and the local score (B, K, S) of the first ``lengths`` (B, K) columns, the rest 0, each pooled, the
    global one scaled to the local one's mass."""
    inside = torch.arange(total.shape[-1], device=total.device) < lengths[..., None]
    pooled = [F.max_pool1d(one, kernel, stride=1, padding=kernel // 2) * inside for one in (total, local)]
    mass = pooled[1].sum(dim=-1, keepdim=True) / pooled[0].sum(dim=-1, keepdim=True).clamp(min=1e-12)
    overall = pooled[0] * mass
    return pooled[1] + overall if how == "sum" else torch.maximum(pooled[1], overall)


def assigned(keys: Tensor, centres: Tensor, candidates: Tensor, tau: float | None) -> Tensor:
    """(B, K, S) int64: the column of the centre that each candidate joins, its own for all others, -1 for candidates
    in the zero class. keys: (B, K, S, D); centres, candidates: (B, K, S) bool; tau None: the head's mean best
    similarity."""
    unit = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    similar = (unit @ unit.transpose(-1, -2)).masked_fill(~centres[:, :, None], -2.0)
    best, to = similar.max(dim=-1)
    if tau is None:
        count = candidates.sum(dim=-1, keepdim=True).clamp(min=1)
        least = (best * candidates).sum(dim=-1, keepdim=True) / count
    else:
        least = best.new_tensor(tau)
    own = torch.arange(keys.shape[2], device=keys.device).expand(to.shape)
    none = (best < least) | ~centres.any(dim=-1, keepdim=True)
    return torch.where(candidates, torch.where(none, -1, to), own)


def merged(
    keys: Tensor, values: Tensor, weight: Tensor, to: Tensor, norm_preserve: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (B, K, S, D) in which every column holds the mean of those that joined it by ``to`` (B, K, S),
    and where something joined (B, K, S) bool. weight: (B, K, S), not negative; a class without any weighs its members
    alike.

    One scatter with a zero class before the columns, whose sum is left out: shapes do not depend on how many merge."""
    batch, heads, columns = to.shape

    def gathered(x: Tensor) -> Tensor:
        total = x.new_zeros(batch, heads, columns + 1, *x.shape[3:])
        index = (to + 1).view(*to.shape, *[1] * (x.dim() - 3)).expand(x.shape)
        return total.scatter_add_(2, index, x)[:, :, 1:]

    weight = weight.float()
    empty = gathered(weight) <= 0
    weight = torch.where(torch.cat([torch.ones_like(empty[..., :1]), empty], dim=-1).gather(2, to + 1), 1.0, weight)
    share = gathered(weight).clamp(min=1e-30)[..., None]
    joined = gathered(torch.ones_like(weight)) > 1
    lengths = keys.norm(dim=-1, keepdim=True)
    units = keys / lengths.clamp(min=1e-12) if norm_preserve else keys
    mean = gathered(weight[..., None] * units) / share
    if norm_preserve:
        mean = lengths * mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    value = gathered(weight[..., None] * values) / share
    return torch.where(joined[..., None], mean, keys), torch.where(joined[..., None], value, values), joined
