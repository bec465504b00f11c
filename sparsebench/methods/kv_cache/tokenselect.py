"""TokenSelect: one set of tokens per layer, voted for by all heads (Wu et al. 2024, arXiv 2411.02886).

    T = tokens with the current chunk of C queries;  candidates n_init <= j < T - n_local
    q' = query rotated to positions n_local .. n_local + C - 1,  qbar = mean of q' over the chunk
    vote_j = sum over heads of softmax_j( qbar_h . k_j ),   k not rotated, no 1/sqrt(D)
    read = [0, n_init) + the top_k of the votes + [T - n_local, T),   at rotary positions 0, 1, 2, ...

Everything is stored. A prompt is read in chunks, so it is sparse too; tokens that follow several at a time are chunks
as well. A chunk is at most ``n_local`` long, so that it lies in its own window; what its first tokens read is chosen
with its last ones in view (``chunk_size=1``: not). Below the budget everything is read. ``gqa_map=modulo`` pairs query
head h with KV head h mod K in the votes, as the released kernel does (its published numbers come from that);
``grouped`` is right. ``score_dtype=bf16`` rounds the products as the released buffer does. ``selection_cache`` follows
the paper (the released code cannot run it): a decoded token whose qbar has cosine similarity of at least the threshold
to that of the last selection reuses it. ``reposition=false`` reads at the places in the text. Sizes that are not given
are the paper's 128 and 512, at most an eighth and a quarter of the budget. Achieved sparsity is 1 - read / prompt over
decoded tokens; ``kv_read`` also counts the keys (half an entry each) that a vote reads.
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
from sparsebench.methods.kv_cache.base import Selector, scaled
from sparsebench.methods.kv_cache.entries import Entries, top
from sparsebench.methods.kv_cache.rotary import Tables, needs_rotary, turned
from sparsebench.models.plug import Allowed

Part = tuple[slice, slice]  # rows, and queries of a chunk
CHOSEN, PRINT = "chosen", "fingerprint"  # per-entry memory of the selection cache


@method(
    name="tokenselect",
    version=1,
    paper="Wu et al. 2024, arXiv 2411.02886",
    target="kv_cache",
    phase="prefill+decode",
    baseline="streaming_llm",
    taxonomy=Taxonomy(
        object="kv_cache",
        granularity=("token",),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        benefit_realised_on=("flops",),
        kernel_required="paged attention with pages of one token",
    ),
)
@dataclass(frozen=True)
class TokenSelect(Selector):
    """Each token or chunk reads the tokens that its heads vote for, the same for all heads of a layer."""

    n_init: int | None = option(None, "first tokens that are read; 128 if not given", low=0, unit="tokens")
    n_local: int | None = option(None, "last tokens that are read; 512 if not given", low=1, unit="tokens")
    top_k: int | None = option(None, "tokens voted for, in place of sparsity", low=1, unit="instead of sparsity")
    chunk_size: int = option(512, "tokens that share a selection, at most n_local", low=1, unit="tokens")
    rotate_query: bool = option(True, "rotate queries to the edge of the window before they vote")
    pool_kernel: int = option(-1, "votes: maximum over so many neighbours, an odd number; -1: off", low=-1)
    score_dtype: str = option("bf16", "precision of the products that are voted with", choices=("bf16", "fp32"))
    gqa_map: str = option("grouped", "the KV head a query head votes on", choices=("grouped", "modulo"))
    vote: str = option(
        "soft", "softmax per head, top-k per head, or plain products", choices=("soft", "hard", "sum_logits")
    )
    selection_cache: bool = option(False, "reuse the last selection while queries are similar")
    similarity_threshold: float = option(
        0.9, "cosine from which they are", low=0.0, high=1.0, only="selection_cache=true"
    )
    reposition: bool = option(True, "read at positions inside the selection")

    @property
    def asked(self) -> float | None:
        return None if self.top_k is not None else super().asked

    @property
    def streams(self) -> bool:
        return self.reposition and self.asked != 0

    def check_model(self, model: PreTrainedModel) -> None:
        if self.pool_kernel != -1 and self.pool_kernel % 2 == 0:
            raise UserError(f"{self.name('pool_kernel')}: must be odd, or -1")
        if self.top_k is not None and self.budget is not None:
            raise UserError(f"{self.name('top_k')}: goes without {self.name('budget')}")
        needs_rotary(model, f"method={self.declared['name']}")

    def sizes(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n_init, n_local, top_k) of budgets ``kept`` (B,)."""
        first = [scaled(self.n_init, 128, int(one) // 8) for one in kept]
        last = [max(1, scaled(self.n_local, 512, int(one) // 4)) for one in kept]
        init, local = torch.tensor(first, device=kept.device), torch.tensor(last, device=kept.device)
        return init, local, torch.full_like(kept, self.top_k) if self.top_k is not None else kept - init - local

    def kept(self, tokens: Tensor) -> Tensor:
        if self.top_k is None:
            return super().kept(tokens)
        return torch.full_like(
            tokens, self.top_k + (128 if self.n_init is None else self.n_init) + (self.n_local or 512)
        )

    def forced(self, kept: int) -> int:
        init, local, _ = self.sizes(torch.tensor([kept]))
        return int(init + local) + 1

    def before(self, now: Entries) -> None:
        if self.asked == 0 or self.reads_all(now):
            return
        chosen, parts = self.choose(now, self.kept(now.prompt))
        now.shared[f"tokenselect.{now.call.index}"] = (chosen, self._moved(now, chosen, parts))

    def allow(self, now: Entries) -> Allowed | None:
        mask, bias = now.shared.pop(f"tokenselect.{now.call.index}", (None, None))
        return None if mask is None else Allowed(mask[:, None], bias)

    def reads_all(self, now: Entries) -> bool:
        """Whether everything is within the budget."""
        return bool((now.lengths <= self.kept(now.prompt)[:, None]).all())

    def choose(self, now: Entries, count: Tensor) -> tuple[Tensor, list[Part]]:
        """What each query reads, (B, T, S) bool, of budgets ``count`` (B,), and the chunks that were asked."""
        init, local, most = self.sizes(count)
        query, keys = self._unrotated(now)
        parts, rank = self._parts(now, local), now.rank[:, 0]
        chosen = torch.zeros(len(rank), query.shape[2], rank.shape[1], dtype=torch.bool, device=rank.device)
        for part in parts:
            rows, queries = part
            total = now.seen[rows, 0, queries].amax(dim=1)  # entries with this chunk
            here = now.valid[rows, 0] & (rank[rows] < total[:, None])
            edges = (rank[rows] < init[rows, None]) | (rank[rows] >= (total - local[rows])[:, None])
            small = (total <= (init + local + most)[rows])[:, None]
            picked = self._voted(now, query, keys, part, here & ~edges, local[rows], most[rows])
            chosen[part] = (here & (edges | picked | small))[:, None]
        return chosen, parts

    def _parts(self, now: Entries, local: Tensor) -> list[Part]:
        """The chunks: one for all rows where one token came, else each row's own, from its first real token on."""
        rows, tokens = len(local), now.call.tokens
        if tokens == 1:
            return [(slice(0, rows), slice(0, 1))]
        parts = []
        for row in range(rows):
            size = min(self.chunk_size, int(local[row]))
            first = tokens - int(now.call.real[row, -tokens:].sum())
            starts = range(first, tokens, size)
            parts += [(slice(row, row + 1), slice(start, min(start + size, tokens))) for start in starts]
        return parts

    def _voted(
        self, now: Entries, query: Tensor, keys: Tensor, part: Part, among: Tensor, local: Tensor, most: Tensor
    ) -> Tensor:
        """(rows, S) bool: the candidates that a chunk's queries vote for."""
        rows, queries = part
        mark = fingerprint(query[rows, :, queries], local if self.rotate_query else None, now.call.rotate_at)
        picked = top(self.votes(mark, keys[rows], among, most), most, among)
        if self.selection_cache and now.call.tokens == 1:
            if CHOSEN in now.layer.state:
                picked = self._reused(now, mark, picked, among)
            self._remember(now, mark, picked)
        return picked

    def votes(self, mark: Tensor, keys: Tensor, among: Tensor, most: Tensor) -> Tensor:
        """(B, S) float32 from fingerprints (B, H, D) and keys before the rotary embedding (B, K, S, D); a hard vote
        names each head's best ``most`` (B,)."""
        dots = self.dots(mark, keys)
        outside = ~among[:, None]
        if self.vote == "soft":
            votes = dots.masked_fill(outside, -torch.inf).softmax(dim=-1).nan_to_num(0.0).sum(dim=1)
        elif self.vote == "hard":
            votes = top(dots, most[:, None], among[:, None].expand(dots.shape)).float().sum(dim=1)
        else:
            votes = dots.sum(dim=1)
        if self.pool_kernel < 3:
            return votes
        held = votes.masked_fill(~among, -torch.inf)[:, None]
        return F.max_pool1d(held, self.pool_kernel, stride=1, padding=self.pool_kernel // 2)[:, 0]

    def dots(self, mark: Tensor, keys: Tensor) -> Tensor:
        """(B, H, S) float32: products of fingerprints (B, H, D) with the keys (B, K, S, D) their heads vote on."""
        groups = mark.shape[1] // keys.shape[1]
        keys = keys.repeat_interleave(groups, dim=1) if self.gqa_map == "grouped" else keys.repeat(1, groups, 1, 1)
        dots = (keys @ mark[..., None])[..., 0]
        return dots.bfloat16().float() if self.score_dtype == "bf16" else dots

    def _unrotated(self, now: Entries) -> tuple[Tensor, Tensor]:
        """Queries of the new tokens and all keys before the rotary embedding, float32."""
        query = now.call.unrotated()[0].float()
        back = torch.where(now.valid, -now.call.key_position_ids, 0)
        return query, turned(now.call.key.float(), back, now.call.rotate_at)

    def _moved(self, now: Entries, chosen: Tensor, parts: list[Part]) -> Tensor | None:
        """Moves what is read to positions inside the selection: by turning keys and queries where each row is one
        chunk; by a bias on the logits (B, H, T, S) where it is several, each of which sees the keys elsewhere."""
        if not self.reposition:
            return None
        call, dense = now.call, now.call.key_position_ids
        key, query, before = call.key.clone(), call.query.clone(), call.query.float()
        single = sum(rows.stop - rows.start for rows, _ in parts) == len(key)
        bias = None if single else torch.zeros(*query.shape[:3], key.shape[2], device=key.device)
        for rows, queries in parts:
            read = chosen[rows, queries.start]
            steps = torch.where(read[:, None], (read.long().cumsum(dim=-1) - 1)[:, None] - dense[rows], 0)
            own = slice(key.shape[2] - call.tokens + queries.start, key.shape[2] - call.tokens + queries.stop)
            moved = turned(call.key[rows], steps, call.rotate_at)
            query[rows, :, queries] = turned(call.query[rows, :, queries], steps[:, :1, own], call.rotate_at)
            if bias is None:
                key[rows] = moved
                continue
            change = query[rows, :, queries].float() @ now.repeated(moved.float()).transpose(-1, -2)
            change -= before[rows, :, queries] @ now.keys[rows].transpose(-1, -2)
            bias[rows, :, queries] = change * call.scaling
        if bias is None:
            call.key, call.query = key, query
        return bias

    def _reused(self, now: Entries, mark: Tensor, picked: Tensor, among: Tensor) -> Tensor:
        """The last selection of the rows whose fingerprint is still similar; what left the candidates is not in it."""
        state = now.layer.state
        last = state[PRINT].sum(dim=2).flatten(1)
        alike = F.cosine_similarity(last, mark.flatten(1), dim=-1) >= self.similarity_threshold
        for name, count in (("hits", float(alike.sum())), ("lookups", float(len(alike)))):
            now.notes[name] = now.notes.get(name, 0.0) + count
        now.shared["alike"] = alike
        return torch.where(alike[:, None], state[CHOSEN][:, 0] & among, picked)

    def _remember(self, now: Entries, mark: Tensor, picked: Tensor) -> None:
        """Keeps the selection with its entries, and the fingerprint at the newest one."""
        state, heads = now.layer.state, now.valid.shape[1]
        alike = now.shared.pop("alike", torch.zeros(len(mark), dtype=torch.bool, device=mark.device))
        fresh = torch.zeros(*now.valid.shape, mark[0].numel() // heads, device=mark.device)
        fresh[:, :, -1] = mark.flatten(1).unflatten(1, (heads, -1))
        same = alike[:, None, None]
        state[PRINT] = torch.where(same[..., None], state[PRINT], fresh) if PRINT in state else fresh
        chosen = picked[:, None].expand(now.valid.shape)
        state[CHOSEN] = torch.where(same, state[CHOSEN], chosen) if CHOSEN in state else chosen.contiguous()

    def index_read(self, now: Entries) -> Tensor | float:
        if self.asked == 0 or self.reads_all(now):
            return 0.0
        missed = 1.0
        if now.notes.get("lookups"):
            missed = 1 - now.notes["hits"] / now.notes["lookups"]
        return now.seen * 0.5 * missed  # keys without values

    def index_decode(self, layer: Attention, length: int) -> float:
        return 2.0 * layer.heads * layer.head_dim * length

    def index_prefill(self, layer: Attention, length: int) -> float:
        _, local, _ = self.sizes(self.kept(torch.tensor([length])))
        size = min(self.chunk_size, int(local))
        return sum(2.0 * layer.heads * layer.head_dim * end for end in range(size, length + 1, size))

    def tolerance(self, shortest: int, model: PreTrainedModel) -> float:
        # the first tokens of a chunk do not see its last ones, so they read up to a window less
        _, local, _ = self.sizes(self.kept(torch.tensor([max(1, shortest)])))
        return (1 + int(local) / 2) / max(1, shortest)

    def columns(self, notes: Mapping[str, float], model: PreTrainedModel) -> dict[str, Any]:
        return {"selection_cache_hits": notes["hits"] / notes["lookups"]} if notes.get("lookups") else {}


def fingerprint(query: Tensor, local: Tensor | None, tables: Tables) -> Tensor:
    """qbar (B, H, D): the mean of a chunk's queries (B, H, C, D), rotated to positions ``local`` (B,) and on; not
    rotated where ``local`` is None."""
    if local is not None:
        query = turned(query, local[:, None, None] + torch.arange(query.shape[2], device=query.device), tables)
    return query.mean(dim=2)
