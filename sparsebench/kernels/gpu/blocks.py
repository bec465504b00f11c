"""Causal attention over listed key blocks, on the GPU: flash attention whose inner loop walks a list (as in MInference,
Jiang et al. 2024, and PBS-Attn, Wang et al. 2025).

A program owns 64 queries of a head; the last ones, which read most, start first. Softmax is online, in float32; the
probabilities are rounded to the dtype of the values. A key that is not finite reaches those who see it; a value that
is not finite also the other queries of its block, where it is multiplied by zero.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebench.kernels.gpu.launch import INTERPRETED, Tuned


@triton.jit
def absorb(score, value, most, mass, total, WIDEN: tl.constexpr):
    """One step of the online softmax: ``score`` (rows, keys) in powers of two, -inf where unseen; ``value`` (keys,
    dim); ``most``, ``mass`` (rows,), ``total`` (rows, dim): the state so far. Returns the new state."""
    higher = tl.maximum(most, tl.max(score, 1))
    reference = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing stays at zero
    weight = tl.exp2(score - reference[:, None])
    fade = tl.exp2(most - reference)
    rounded = weight.to(value.dtype)
    if WIDEN:  # the interpreter's product of bfloat16 is wrong
        rounded, value = rounded.to(tl.float32), value.to(tl.float32)
    total = tl.dot(rounded, value, total * fade[:, None], input_precision="ieee")
    return higher, mass * fade + tl.sum(weight, 1), total


@triton.jit
def attend(
    q, k, v, out, ptr, idx, positions, scale, queries, keys, dim, share,
    DIM: tl.constexpr, PERMUTED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out (heads, queries, dim). ``scale`` holds log2(e). Program: (query block from the end, head)."""
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    query, channel = block * 64 + tl.arange(0, 64), tl.arange(0, DIM)
    here = (query < queries)[:, None] & (channel < dim)[None, :]
    at = (head * queries + query)[:, None] * dim + channel[None, :]
    asked = tl.load(q + at, mask=here, other=0.0)
    if WIDEN:
        asked = asked.to(tl.float32)
    source = (head // share) * keys
    most = tl.full([64], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([64], dtype=tl.float32)
    total = tl.zeros([64, DIM], dtype=tl.float32)
    entry = head * tl.num_programs(0) + block
    for number in range(tl.load(ptr + entry), tl.load(ptr + entry + 1)):
        key = tl.load(idx + number) * 64 + tl.arange(0, 64)
        there = (key < keys)[:, None] & (channel < dim)[None, :]
        where = (source + key)[:, None] * dim + channel[None, :]
        keyed = tl.load(k + where, mask=there, other=0.0)
        if WIDEN:
            keyed = keyed.to(tl.float32)
        score = tl.dot(asked, tl.trans(keyed), input_precision="ieee") * scale
        position = key
        if PERMUTED:
            position = tl.load(positions + head * keys + key, mask=key < keys, other=0)
        seen = (position[None, :] <= (query + keys - queries)[:, None]) & (key < keys)[None, :]
        score = tl.where(seen, score, float("-inf"))
        value = tl.load(v + where, mask=there, other=0.0)
        most, mass, total = absorb(score, value, most, mass, total, WIDEN)
    result = total / tl.where(mass == 0.0, 1.0, mass)[:, None]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=here)


_attend = Tuned(attend, ("dim", "PERMUTED"), ({}, 4, 2), ({}, 4, 3), ({}, 8, 2))
_attend_float32 = Tuned(attend, (), ({}, 8, 1))  # outside the tensor cores: its code is long, so one way must do


def attention(
    q: Tensor, k: Tensor, v: Tensor, ptr: Tensor, idx: Tensor, scale: float, positions: Tensor | None
) -> Tensor:
    """q: (..., heads, queries, dim); k, v: (..., kv_heads, keys, dim); ``ptr``, ``idx``: those of a ``BlockIndex``;
    positions: int32 (..., heads, keys) or None. All contiguous, on one device. Returns the shape and dtype of q."""
    out = torch.empty_like(q)
    if not out.numel():
        return out
    (queries, dim), keys = q.shape[-2:], k.shape[-2]
    heads, kv_heads = q.numel() // (queries * dim), k.numel() // (keys * dim)
    run = _attend_float32 if q.dtype == torch.float32 else _attend
    run(
        (triton.cdiv(queries, 64), heads), q=q, k=k, v=v, out=out, ptr=ptr, idx=idx,
        positions=ptr if positions is None else positions, scale=scale * math.log2(math.e), queries=queries, keys=keys,
        dim=dim, share=heads // kv_heads, DIM=max(16, triton.next_power_of_2(dim)), PERMUTED=positions is not None,
        WIDEN=INTERPRETED,
    )  # fmt: skip
    return out
