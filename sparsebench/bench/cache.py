"""Decoding over a KV cache of 1k to 16k tokens: evicted, selected, pruned; milliseconds, bytes stored, bytes read.

One layer's attention for one token, with random queries, keys and values of a real shape in bfloat16. Every variant
does its work of a step in full: pages are scored and the best ones gathered, tokens are voted for, pruned entries are
read by the bitmap kernel. What is chosen is random, as the queries are; what it costs does not depend on that.

    own          everything, by this project's kernel;   torch: by two matrix products and a softmax;   sdpa: by SDPA
    evicted s    a cache of (1 - s) of the tokens (streaming_llm, h2o, snapkv, ...), in whose making no time is counted
    pages s      all stored; (1 - s) of the tokens read in pages chosen by the bounds of their keys (quest)
    tokens s     all stored; (1 - s) of the tokens read, voted for with all keys (tokenselect)
    pruned s     all tokens, each without the smallest s of its entries, in the bitmap format (mustafar)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsebench.bench.base import Report, Say, checked, judged, spread, threads
from sparsebench.costs.paired import NOTE, Call, columns
from sparsebench.declare import Declared, option
from sparsebench.errors import UserError
from sparsebench.kernels import build
from sparsebench.kernels.attention import Records, kv_attention, largest
from sparsebench.kernels.gpu.timing import Place

KINDS = ("evicted", "pages", "tokens", "pruned")


@dataclass(frozen=True)
class Options(Declared):
    """What to measure; the shape is a layer of Llama-3.1-8B."""

    lengths: tuple[int, ...] = option((1024, 2048, 4096, 8192, 16384), "cached tokens", low=64, high=1000000)
    kinds: tuple[str, ...] = option(KINDS, "what is done to the cache", choices=KINDS)
    sparsity: tuple[float, ...] = option((0.5, 0.75), "tokens or entries left out / all", low=0.0, below=1.0)
    page_size: int = option(16, "pages: tokens of one", low=1, high=1024, unit="tokens")
    heads: int = option(32, "query heads", low=1, high=1024)
    kv_heads: int = option(8, "heads of the cache", low=1, high=1024)
    dim: int = option(128, "of a head", low=16, high=256)
    device: str = option("cpu", "where to run; cuda: with Triton", choices=("cpu", "cuda"))
    threads: int = option(1, "threads", low=1, high=1024)
    repeats: int = option(5, "rounds of pairs", low=3, high=10000)
    seed: int = option(0, "of the random tensors", low=0)


@dataclass(frozen=True)
class Step:
    """One variant: ``call`` does the attention of one decoded token; bytes are those of one layer and token."""

    name: str
    call: Call
    stored: int
    read: int


@dataclass(frozen=True)
class Cache:
    """keys, values: (kv_heads, tokens, dim) bfloat16."""

    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.keys.numel() * self.keys.element_size() * 2

    @property
    def entry(self) -> int:
        """Bytes of one token's key and value, all heads."""
        return self.nbytes // self.keys.shape[1]

    def clone(self) -> Cache:
        """The same in memory of its own."""
        return Cache(self.keys.clone(), self.values.clone())

    def newest(self, count: int) -> Cache:
        """The last ``count`` tokens, in memory of their own."""
        return Cache(self.keys[:, -count:].contiguous(), self.values[:, -count:].contiguous())

    def rows(self, chosen: Tensor, size: int) -> Cache:
        """The pages of ``size`` tokens that ``chosen`` (kv_heads, n) names, copied together."""
        heads, tokens, dim = self.keys.shape
        pages = tokens // size
        flat = (chosen + torch.arange(heads, device=chosen.device)[:, None] * pages).flatten()
        found = [x.view(-1, size * dim).index_select(0, flat).view(heads, -1, dim) for x in (self.keys, self.values)]
        return Cache(found[0], found[1])


def run(options: Options, say: Say) -> Report:
    """One row per length and variant."""
    if options.heads % options.kv_heads:
        raise UserError(f"heads={options.heads}: must be a multiple of kv_heads={options.kv_heads}")
    wrong = [length for length in options.lengths if length % options.page_size]
    if wrong:
        raise UserError(f"lengths={wrong[0]}: must be a multiple of page_size={options.page_size}")
    place = Place.named(options.device)
    rows: list[dict[str, Any]] = []
    with threads(options.threads), torch.inference_mode():
        for length in options.lengths:
            say(f"{length} tokens")
            rows += _rows(options, length, place)
        shared = spread(options.threads)
    facts = {
        "kernels": build.status(options.device), "processor": place.name, **shared,
        "dtype": "bfloat16", "heads": f"{options.heads}/{options.kv_heads}", "dim": options.dim,
        "torch": torch.__version__, "rounds": options.repeats,
    }  # fmt: skip
    notes = [
        "ms, stored, read: one layer, one sequence, one decoded token; read counts what choosing reads.",
        "pages and tokens are copied together before they are read; a paged kernel would not.",
        "vs_torch, vs_own: how much faster than torch's products and than our kernel on the whole cache.",
        NOTE,
    ]
    return Report(judged(rows, facts), facts, notes)


def _rows(options: Options, length: int, place: Place) -> list[dict[str, Any]]:
    torch.manual_seed(options.seed)
    query = torch.randn(options.heads, options.dim).bfloat16().to(place.device)
    shape = (options.kv_heads, length, options.dim)
    cache = Cache(*(torch.randn(shape).bfloat16().to(place.device) for _ in range(2)))
    known = {one.name: one for one in steps(options, query, cache, place)}
    right = _sdpa(query.float(), Cache(cache.keys.float(), cache.values.float()))
    checked("own", known["own"].call(0), right)
    bases = {name: known[name].call for name in ("torch", "own")}
    result = place.measure(bases, {n: one.call for n, one in known.items() if n not in bases}, options.repeats)
    rows = []
    for name, one in known.items():
        row: dict[str, Any] = {"tokens": length, "cache": name, "ms": 1e3 * result.time(name)}
        row |= {"stored_mb": one.stored / 1e6, "read_mb": one.read / 1e6, "read_share": one.read / cache.nbytes}
        row |= columns(result, name, ("torch", "own"))
        # the bytes bound what is gained on the faster of the two dense paths: which one that is, the processor decides
        ratio = min(row["vs_own"], row["vs_torch"]) if name not in bases else None
        rows.append(row | {"verdict": result.verdict(ratio, cache.nbytes / one.read)})
    return rows


def steps(options: Options, query: Tensor, cache: Cache, place: Place) -> Iterator[Step]:
    """Every variant over one cache, the dense ones first. query: (heads, dim)."""
    dense = place.copies(cache, cache.nbytes, Cache.clone)
    for name, attend in (("own", _own), ("torch", _products), ("sdpa", _sdpa)):
        yield Step(name, _over(attend, query, dense), cache.nbytes, cache.nbytes)
    kept = {level: max(1, round((1 - level) * cache.keys.shape[1])) for level in options.sparsity}
    for level, count in kept.items():
        if "evicted" in options.kinds:
            short = cache.newest(count)
            several = place.copies(short, short.nbytes, Cache.clone)
            yield Step(f"evicted {level:g}", _over(_own, query, several), short.nbytes, short.nbytes)
        if "pages" in options.kinds:
            yield _pages(f"pages {level:g}", query, dense, max(1, count // options.page_size), options.page_size)
        if "tokens" in options.kinds:
            read = cache.nbytes // 2 + count * cache.entry
            yield Step(f"tokens {level:g}", _over(_voted(count), query, dense), cache.nbytes, read)
        if "pruned" in options.kinds:
            yield _pruned(f"pruned {level:g}", query, cache, level, place)


def _over(attend: Any, query: Tensor, several: Sequence[Cache]) -> Call:
    return lambda number: attend(query, several[number % len(several)])


def _own(query: Tensor, cache: Cache) -> Tensor:
    none = Records.empty(cache.keys.shape[0], query.shape[1], 0, device=query.device)
    return kv_attention(query, none, none, cache.keys, cache.values)


def _grouped(query: Tensor, cache: Cache) -> Tensor:
    """(kv_heads, heads of each, dim)"""
    return query.view(cache.keys.shape[0], -1, query.shape[1])


def _products(query: Tensor, cache: Cache) -> Tensor:
    scores: Tensor = (_grouped(query, cache) @ cache.keys.transpose(1, 2)) * query.shape[1] ** -0.5
    return (scores.float().softmax(-1).bfloat16() @ cache.values).view(query.shape)


def _sdpa(query: Tensor, cache: Cache) -> Tensor:
    found = functional.scaled_dot_product_attention(_grouped(query, cache), cache.keys, cache.values)
    return found.view(query.shape)


def _pages(name: str, query: Tensor, dense: Sequence[Cache], count: int, size: int) -> Step:
    """Quest: pages by their bounds, one list for the query heads of a KV head."""
    paged = [one.keys.unflatten(1, (-1, size)) for one in dense]
    bounds = [(one.amin(dim=2), one.amax(dim=2)) for one in paged]  # (kv_heads, pages, dim) each

    def call(number: int) -> Tensor:
        at = number % len(dense)
        low, high = bounds[at]
        grouped = _grouped(query, dense[at])
        scores = grouped.clamp(min=0) @ high.transpose(1, 2) + grouped.clamp(max=0) @ low.transpose(1, 2)
        chosen = scores.sum(dim=1).topk(count, dim=-1).indices
        return _own(query, dense[at].rows(chosen, size))

    vectors = 2 * bounds[0][0].numel() * bounds[0][0].element_size()
    return Step(name, call, dense[0].nbytes + vectors, vectors + count * size * dense[0].entry)


def _voted(count: int) -> Any:
    """TokenSelect: the tokens that all heads vote for, the same for all."""

    def attend(query: Tensor, cache: Cache) -> Tensor:
        votes = (_grouped(query, cache) @ cache.keys.transpose(1, 2)).float().softmax(-1).sum(dim=(0, 1))
        chosen = votes.topk(count).indices
        return _own(query, cache.rows(chosen.expand(cache.keys.shape[0], -1), 1))

    return attend


def _pruned(name: str, query: Tensor, cache: Cache, level: float, place: Place) -> Step:
    """Mustafar: the largest entries of every key and value."""
    dim = query.shape[1]
    keys, values = (Records.from_dense(x, largest(x, dim - int(level * dim))) for x in (cache.keys, cache.values))
    size = keys.nbytes + values.nbytes
    several = place.copies((keys, values), size, lambda pair: (_clone(pair[0]), _clone(pair[1])))

    def call(number: int) -> Tensor:
        both = several[number % len(several)]
        return kv_attention(query, both[0], both[1])

    return Step(name, call, size, size)


def _clone(records: Records) -> Records:
    return replace(records, data=records.data.clone())
