"""KVMerger: runs of similar keys become one entry (Wang et al. 2024, arXiv 2407.08454), rebuilt: there is no released
code.

    s_i = cos(k_i, k_i+1);  a set is a run of consecutive mergeable entries with every s_i >= eps
    pivot p = the member with the largest accumulated attention;  d_i = ||k_i - k_p||
    sigma = sum d_i / (sqrt(2) |S|)   (mean_dist)   or sqrt(mean d_i^2)   (rms)
    g_i = exp(-d_i^2 / (2 sigma^2)),  w = g / sum g;   k_S = sum w_i k_i,  v_S = sum w_i v_i

Never merged: the newest ``recent_ratio`` of the prompt and its ``hh_ratio`` heavy hitters; a set does not reach over
them. ``eps_mode=budget`` takes for each layer and head the largest eps that leaves at most the budget; with
``linkage=adjacent`` and no largest set that is a rank of s, exactly, else it is found by bisection. ``fixed`` uses
``eps`` (0.75) and reaches whatever it does. ``calibrated`` takes for each layer the eps that leaves the asked share on
calibration text, on average over its heads, and keeps it: the paper's claim that the similarity of neighbours belongs
to the model, not to the text, is what decides how near the asked share comes on another text. A budget that the
protected entries do not leave room for is missed (they hold sets apart). ``linkage=centroid`` compares the next key
with the mean of the set, ``pivot`` with its most attended member. Keys are merged as they are cached, rotated, and
stand at the pivot's position; a merged entry has the softmax mass of one, which is why heavy hitters are left out.
Attention is averaged over a KV head's query heads and moves with the entries. Once ``merge_interval`` tokens were
decoded the same is done again. Sparsity is 1 - entries / T.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsebench.costs.flops import Attention
from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.base import Surroundings
from sparsebench.methods.kv_cache.base import Evictor
from sparsebench.methods.kv_cache.entries import Entries, newest, top
from sparsebench.models.plug import Call, Handler, Work, plugged

PAID, KNOWN = "kvmerger_paid", "kvmerger_known"  # attention so far; whether an entry was there at the last merge
_HALVINGS = 16
_NEAR = 0.05  # eps_mode=calibrated: how far from the asked sparsity another text may come


@method(
    name="kvmerger",
    version=1,
    paper="Wang et al. 2024, arXiv 2407.08454",
    target="kv_cache",
    phase="prefill+decode",
    uses=("calibration if eps_mode=calibrated",),
    baseline="random_kv",
    taxonomy=Taxonomy(
        object="kv_cache",
        granularity=("token",),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        benefit_realised_on=("memory", "flops"),
        kernel_required="ragged attention that gives column sums",
    ),
)
@dataclass(frozen=True)
class KvMerger(Evictor):
    """Merges runs of entries with similar keys, weighed around their most attended one."""

    eps_mode: str = option(
        "budget",
        "eps from each prompt's budget, as given, or from calibration text",
        choices=("budget", "fixed", "calibrated"),
    )
    eps: float = option(0.75, "least cosine of neighbours in a set", low=-1.0, high=2.0, only="eps_mode=fixed")
    linkage: str = option("adjacent", "what the next key is compared with", choices=("adjacent", "centroid", "pivot"))
    sigma: str = option("mean_dist", "width of the Gaussian", choices=("mean_dist", "rms"))
    recent_ratio: float = option(0.1, "newest entries that are not merged / prompt", low=0.0, high=1.0)
    hh_ratio: float = option(0.1, "heavy hitters that are not merged / prompt", low=0.0, high=1.0)
    max_set_size: int | None = option(None, "largest set; any size if null", low=2)
    merge_interval: int = option(64, "decoded tokens before the cache is merged again", low=1, unit="tokens")
    merge_values: bool = option(True, "values are merged too, not only keys (then the pivot's stays)")

    @property
    def asked(self) -> float | None:
        return None if self.eps_mode == "fixed" else super().asked

    @property
    def while_decoding(self) -> bool:
        return True

    def check_model(self, model: PreTrainedModel) -> None:
        given = next((n for n in ("budget", "budget_bytes", "max_set_size") if getattr(self, n) is not None), None)
        given = "linkage" if given is None and self.linkage != "adjacent" else given
        if self.eps_mode == "calibrated" and given is not None:
            raise UserError(
                f"{self.name(given)}: method.kvmerger.eps_mode=calibrated goes with sparsity, linkage=adjacent and "
                "sets of any size"
            )

    def fit(self, around: Surroundings) -> dict[str, Tensor]:
        if self.eps_mode != "calibrated" or not self.asked:
            return {}
        model, windows, watch = around.loaded.model, around.calibration(), Watch(self)
        with plugged(model, watch), torch.no_grad():
            for index, window in enumerate(windows):
                model(input_ids=window[None].to(around.loaded.device), use_cache=True)
                around.progress(index + 1, len(windows))
        return {"eps": watch.thresholds(self.asked)}

    def check_prompt(self, tokens: int) -> None:
        super().check_prompt(tokens)
        kept = int(self.kept(torch.tensor(tokens)))
        protected = int(tokens * self.recent_ratio) + int(tokens * self.hh_ratio)
        if self.eps_mode != "fixed" and kept < min(tokens, protected + 1):
            what = self.name("sparsity" if self.budget is None else "budget")
            raise UserError(
                f"{what}: keeps {kept} of a prompt's {tokens} tokens; recent_ratio + hh_ratio alone are {protected}"
            )

    def observe(self, now: Entries) -> None:
        paid, state = now.grouped(now.attention_sums()).mean(dim=2), now.layer.state
        state[PAID] = state[PAID] + paid if PAID in state else paid

    def compress(self, now: Entries) -> None:
        self.observe(now)
        if self.asked == 0:
            return
        state = now.layer.state
        known = state.setdefault(KNOWN, torch.zeros_like(now.valid))
        fresh = (now.valid & ~known).sum(dim=-1).amax(dim=1)
        due = torch.ones_like(fresh, dtype=torch.bool) if now.prefill else fresh >= self.merge_interval
        if self.eps_mode == "budget":
            due &= (now.lengths > self.kept(now.prompt)[:, None]).any(dim=1)
        if bool(due.any()):
            self._merge(now, due)

    def _merge(self, now: Entries, due: Tensor) -> None:
        """Merges the entries of the rows that are due (B,)."""
        layer, order = now.layer, now.order
        if layer.keys is None or layer.values is None:
            raise ValueError("nothing was cached yet")
        keys, values, paid = (_ordered(x.float(), order) for x in (layer.keys, layer.values, layer.state[PAID]))
        inside = now.valid.gather(2, order)
        free = self.mergeable(now, inside, paid) & due[:, None, None]
        if self.eps_mode == "calibrated":
            sets = self._linked(keys, paid, free, now.learned["eps"][now.call.index].to(keys).expand(now.lengths.shape))
        else:
            sets = self.sets(keys, paid, free, now.lengths - self.kept(now.prompt)[:, None])
        pivots, keys, values, paid = self.merged(keys, values, paid, sets)
        back = order.argsort(dim=-1)
        layer.keys = _ordered(keys, back).to(layer.keys.dtype)
        if self.merge_values:
            layer.values = _ordered(values, back).to(layer.values.dtype)
        layer.state[PAID] = _ordered(paid, back)
        layer.state[KNOWN] = torch.where(due[:, None, None], now.valid, layer.state[KNOWN])
        now.keep(pivots.gather(2, back))

    def mergeable(self, now: Entries, inside: Tensor, paid: Tensor) -> Tensor:
        """(B, K, S) bool, in order of the entries: neither recent nor heavy hitters."""
        recent, heavy = ((now.prompt.double() * share).long()[:, None] for share in (self.recent_ratio, self.hh_ratio))
        free = inside & ~newest(inside, recent)
        return free & ~top(paid, heavy, free)

    def sets(self, keys: Tensor, paid: Tensor, free: Tensor, fewer: Tensor) -> Tensor:
        """(B, K, S) int64: the number of the set that each entry is in, from keys (B, K, S, D) and attention (B, K, S)
        of entries in order; ``fewer`` (B, K): entries that must go (eps_mode=budget)."""
        if self.eps_mode == "fixed":
            return self._linked(keys, paid, free, torch.full(fewer.shape, self.eps, device=keys.device))
        fewer = fewer.clamp(min=0)
        if self.linkage == "adjacent" and self.max_set_size is None:
            similar = neighbours(keys, free).sort(dim=-1, descending=True).values
            place = (fewer - 1).clamp(min=0, max=similar.shape[-1] - 1)[..., None]
            # below -1 nothing more can be joined: what protected entries hold apart stays apart
            eps = torch.where(fewer > 0, similar.gather(2, place)[..., 0].clamp(min=-1.5), 2.0)
            return self._linked(keys, paid, free, eps)
        low, high = torch.full(fewer.shape, -1.0, device=keys.device), torch.full(fewer.shape, 1.01, device=keys.device)
        for _ in range(_HALVINGS):  # the largest eps with as few sets: low always has
            middle = (low + high) / 2
            joined = keys.shape[2] - 1 - self._linked(keys, paid, free, middle)[..., -1]
            enough = joined >= fewer
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        return self._linked(keys, paid, free, torch.where(fewer > 0, low, 2.0))

    def _linked(self, keys: Tensor, paid: Tensor, free: Tensor, eps: Tensor) -> Tensor:
        """The sets under a threshold eps (B, K)."""
        if self.linkage == "adjacent" and self.max_set_size is None:
            linked = neighbours(keys, free) >= eps[..., None]
            return torch.nn.functional.pad((~linked).long().cumsum(dim=-1), (1, 0))
        number = torch.zeros(free.shape, dtype=torch.long, device=keys.device)
        total, pivot, best, size = keys[:, :, 0].clone(), keys[:, :, 0], paid[:, :, 0], torch.ones_like(number[:, :, 0])
        for i in range(1, keys.shape[2]):
            one = {"adjacent": keys[:, :, i - 1], "centroid": total, "pivot": pivot}[self.linkage]
            join = (torch.cosine_similarity(one, keys[:, :, i], dim=-1) >= eps) & free[:, :, i] & free[:, :, i - 1]
            if self.max_set_size is not None:
                join &= size < self.max_set_size
            number[:, :, i] = number[:, :, i - 1] + (~join).long()
            better = ~join | (paid[:, :, i] > best)
            total = torch.where(join[..., None], total, 0) + keys[:, :, i]
            pivot = torch.where(better[..., None], keys[:, :, i], pivot)
            best = torch.where(better, paid[:, :, i], best)
            size = torch.where(join, size + 1, 1)
        return number

    def merged(self, keys: Tensor, values: Tensor, paid: Tensor, sets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(pivots (B, K, S) bool, and keys, values, attention in which each pivot holds its set's)."""
        places = torch.arange(keys.shape[2], device=keys.device).expand(sets.shape)
        most = torch.zeros_like(paid).scatter_reduce(2, sets, paid, "amax", include_self=False).gather(2, sets)
        first = torch.where(paid == most, places, keys.shape[2])
        pivot = torch.zeros_like(sets).scatter_reduce(2, sets, first, "amin", include_self=False).gather(2, sets)
        distance = (keys - _ordered(keys, pivot)).norm(dim=-1)
        size = _summed(torch.ones_like(paid), sets)
        if self.sigma == "mean_dist":
            variance = (_summed(distance, sets) / (2**0.5 * size)) ** 2
        else:
            variance = _summed(distance**2, sets) / size
        kernel = torch.where(variance > 0, torch.exp(-(distance**2) / (2 * variance.clamp(min=1e-30))), 1.0)
        weight = (kernel / _summed(kernel, sets))[..., None]
        several = (size > 1)[..., None]
        keys = torch.where(several, _summed(weight * keys, sets), keys)
        values = torch.where(several, _summed(weight * values, sets), values)
        return places == pivot, keys, values, _summed(paid, sets)

    def index_prefill(self, layer: Attention, length: int) -> float:
        # attention again for its column sums, and one product per pair of neighbours
        return 2.0 * layer.head_dim * (layer.heads * layer.pairs(length) + layer.kv_heads * length)

    def tolerance(self, shortest: int, model: PreTrainedModel) -> float:
        return 2 / max(1, shortest) + (_NEAR if self.eps_mode == "calibrated" else 0.0)


@dataclass
class Watch(Handler):
    """Notes how similar mergeable neighbours are in each layer, over all heads and prompts."""

    how: KvMerger
    cosines: dict[int, list[Tensor]] = field(default_factory=dict)
    entries: dict[int, int] = field(default_factory=dict)

    def after(self, call: Call, work: Work) -> None:
        now = Entries(call)
        paid = now.grouped(now.attention_sums()).mean(dim=2)
        free = self.how.mergeable(now, now.valid, paid)
        self.cosines.setdefault(call.index, []).append(neighbours(call.key.float(), free).flatten().cpu())
        self.entries[call.index] = self.entries.get(call.index, 0) + int(now.lengths.sum())

    def thresholds(self, sparsity: float) -> Tensor:
        """(layers,): the eps that as many neighbours reach as entries are to go; -1 where there are not so many."""
        found = []
        for layer in sorted(self.cosines):
            ranked = torch.cat(self.cosines[layer]).sort(descending=True).values
            wanted = round(sparsity * self.entries[layer])
            found.append(float(ranked[wanted - 1].clamp(min=-1.0)) if wanted else 2.0)
        return torch.tensor(found)


def neighbours(keys: Tensor, free: Tensor) -> Tensor:
    """(B, K, S - 1): cosine of each key with the next one, -2 where either may not be merged."""
    similar = torch.cosine_similarity(keys[:, :, :-1], keys[:, :, 1:], dim=-1)
    return similar.masked_fill(~(free[:, :, :-1] & free[:, :, 1:]), -2.0)


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    """x (B, K, S, ...) at columns order (B, K, S)."""
    return x.gather(2, order.view(*order.shape, *[1] * (x.dim() - 3)).expand_as(x))


def _summed(x: Tensor, sets: Tensor) -> Tensor:
    """x (B, K, S, ...) summed over each set, at every member."""
    index = sets.view(*sets.shape, *[1] * (x.dim() - 3)).expand_as(x)
    return torch.zeros_like(x).scatter_add(2, index, x).gather(2, index)
