"""Block-sparse prefill and pruned-cache decode against torch's attention and our own dense kernels.

Prefill: one causal prompt, key blocks of 64 chosen at random below the diagonal, which is always read. Decode: one
token over a cache whose tokens each keep the same number of entries. torch's attention for one query with shared heads
is far from what torch can do, so decode is compared with its best path, two matrix products and a softmax.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsebench.bench.base import Report, Say, checked, judged, spread, threads
from sparsebench.costs.paired import NOTE, Call, Measured, columns
from sparsebench.declare import Declared, option
from sparsebench.errors import UserError
from sparsebench.kernels import build
from sparsebench.kernels.attention import BlockIndex, Records, block_attention, kv_attention, largest
from sparsebench.kernels.gpu.timing import Place


@dataclass(frozen=True)
class Options(Declared):
    """What to measure."""

    lengths: tuple[int, ...] = option((2048, 4096), "tokens of a prompt or cache", low=64, high=1000000)
    phases: tuple[str, ...] = option(("prefill", "decode"), "what is timed", choices=("prefill", "decode"))
    density: tuple[float, ...] = option((1.0, 0.5, 0.25, 0.1), "prefill: causal blocks read / all", above=0.0, high=1.0)
    sparsity: tuple[float, ...] = option((0.5, 0.7), "decode: zeros / all in the cache", low=0.0, below=1.0)
    prefill_heads: int = option(1, "heads of the prompt", low=1, high=256)
    heads: int = option(32, "query heads of the decoded token", low=1, high=1024)
    kv_heads: int = option(8, "heads of its cache", low=1, high=1024)
    dim: int = option(128, "of a head", low=16, high=256)
    device: str = option("cpu", "where to run; cuda: with Triton", choices=("cpu", "cuda"))
    threads: int = option(1, "threads", low=1, high=1024)
    repeats: int = option(7, "rounds of pairs", low=3, high=10000)
    seed: int = option(0, "of the random tensors", low=0)


def run(options: Options, say: Say) -> Report:
    """One row per phase, length and level."""
    if options.heads % options.kv_heads:
        raise UserError(f"heads={options.heads}: must be a multiple of kv_heads={options.kv_heads}")
    place = Place.named(options.device)
    rows: list[dict[str, Any]] = []
    with threads(options.threads), torch.inference_mode():
        for phase in options.phases:
            for length in options.lengths:
                say(f"{phase}, {length} tokens")
                torch.manual_seed(options.seed)
                rows += (_prefill if phase == "prefill" else _decode)(options, length, place)
        shared = spread(options.threads)
    facts = {
        "kernels": build.status(options.device), "processor": place.name, **shared,
        "dtype": "bfloat16", "dim": options.dim,
        "heads": f"{options.prefill_heads} (prefill), {options.heads}/{options.kv_heads} (decode)",
        "torch": torch.__version__, "rounds": options.repeats,
    }  # fmt: skip
    notes = ["vs_torch: torch's best dense path; vs_own: our kernel on everything; level: density or sparsity.", NOTE]
    return Report(judged(rows, facts), facts, notes)


def _prefill(options: Options, length: int, place: Place) -> list[dict[str, Any]]:
    shape = (1, options.prefill_heads, length, options.dim)
    q, k, v = (torch.randn(shape).bfloat16().to(place.device) for _ in range(3))
    count = -(-length // 64)
    order = torch.rand(options.prefill_heads, count, count)
    causal = torch.ones(count, count, dtype=torch.bool).tril()
    levels = {1.0: causal.expand_as(order), **{level: _chosen(order, level) for level in options.density if level < 1}}
    index = {level: BlockIndex.from_mask(mask, length, length).to(place.device) for level, mask in levels.items()}

    def attend(level: float) -> Call:
        return lambda number: block_attention(q, k, v, index[level])

    right = functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    checked("prefill", attend(1.0)(0), right)
    bases: dict[str, Call] = {
        "torch": lambda number: functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        "own": attend(1.0),
    }
    result = place.measure(bases, {f"{level:g}": attend(level) for level in levels if level < 1}, options.repeats)
    share = {f"{level:g}": float(mask.sum() / causal.sum() / len(mask)) for level, mask in levels.items()}
    return _rows(result, "prefill", length, {name: 1 / share.get(name, 1.0) for name in result.seconds})


def _chosen(order: Tensor, density: float) -> Tensor:
    """Blocks below the diagonal at random, the diagonal always: (heads, blocks, blocks) bool of that density."""
    count = order.shape[-1]
    wanted = max(0.0, density * (count + 1) / 2 - 1) / max(0.5, (count - 1) / 2)
    mask = (order < wanted).tril(-1)
    mask[:, range(count), range(count)] = True
    return mask


def _decode(options: Options, length: int, place: Place) -> list[dict[str, Any]]:
    shape = (options.kv_heads, length, options.dim)
    k, v = (torch.randn(shape).bfloat16().to(place.device) for _ in range(2))
    q = torch.randn(options.heads, options.dim).bfloat16().to(place.device)
    dense = place.copies((k, v), 2 * k.numel() * 2, lambda pair: (pair[0].clone(), pair[1].clone()))
    grouped = q.view(options.kv_heads, -1, options.dim)
    scale = options.dim**-0.5

    def product(number: int) -> Tensor:
        keys, values = dense[number % len(dense)]
        scores: Tensor = (grouped @ keys.transpose(1, 2)) * scale
        return scores.float().softmax(-1).bfloat16() @ values

    def folded(number: int) -> Tensor:
        keys, values = dense[number % len(dense)]
        return functional.scaled_dot_product_attention(grouped, keys, values)

    none = Records.empty(options.kv_heads, options.dim, 0, device=place.device)

    def own(number: int) -> Tensor:
        return kv_attention(q, none, none, *dense[number % len(dense)])

    checked("decode", own(0), product(0).view(q.shape).float())
    cases: dict[str, Call] = {"sdpa": folded}
    bound = {"torch": 1.0, "own": 1.0, "sdpa": 1.0}
    for level in options.sparsity:
        pruned = tuple(Records.from_dense(x, largest(x, options.dim - int(level * options.dim))) for x in (k, v))
        size = sum(one.nbytes for one in pruned)
        bound[f"{level:g}"] = 2 * k.numel() * 2 / size
        cases[f"{level:g}"] = _over(q, place.copies(pruned, size, _clones))
    result = place.measure({"torch": product, "own": own}, cases, options.repeats)
    return _rows(result, "decode", length, bound)


def _over(q: Tensor, ready: Any) -> Call:
    return lambda number: kv_attention(q, *ready[number % len(ready)])


def _clones(pruned: tuple[Records, ...]) -> tuple[Records, ...]:
    return tuple(replace(one, data=one.data.clone()) for one in pruned)


def _rows(result: Measured, phase: str, length: int, bound: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for name in result.seconds:
        row: dict[str, Any] = {"phase": phase, "tokens": length, "level": name, "ms": 1e3 * result.time(name)}
        row |= columns(result, name, ("torch", "own"))
        of_bound = row["vs_own"] / bound[name] if row["vs_own"] else None
        verdict = result.verdict(row["vs_own"] if name not in ("torch", "sdpa") else None, bound[name])
        rows.append(row | {"bound": bound[name], "of_bound": of_bound, "verdict": verdict})
    return rows
