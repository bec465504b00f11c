"""Attention of one token over a pruned cache (``attention.Records``), on the GPU.

A program owns a kv head and a part of the tokens: records are expanded into a dense operand in registers, which all
query heads of the group share in the tensor cores (Mustafar's kernel, Joo et al. 2025, on records that need no
offsets). Parts are merged by their maxima and sums in a fixed order. Queries and probabilities are rounded to bfloat16,
the cache's dtype.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebench.kernels.gpu.blocks import absorb
from sparsebench.kernels.gpu.counting import below, halves, ones
from sparsebench.kernels.gpu.launch import INTERPRETED, Tuned, splits

if TYPE_CHECKING:
    from sparsebench.kernels.attention import Records

_TOKENS = 64  # to a step
_MOST_PARTS = 64


@triton.jit
def expanded(words, values, record, live, stride, WORDS: tl.constexpr, DIM: tl.constexpr):
    """Records as (tokens, DIM) bfloat16, zeros where nothing was kept. ``words``, ``values``: the same memory as int64
    and as bfloat16; ``record``, ``live``: (tokens,); ``stride``: bytes per record; ``WORDS``: its mask words."""
    channel = tl.arange(0, DIM)[None, :]
    number = channel // 32
    word = tl.zeros([record.shape[0], DIM], dtype=tl.uint32)
    place = tl.zeros([record.shape[0], DIM], dtype=tl.int32)
    for pair in tl.static_range(WORDS):
        low, high = halves(tl.load(words + record * (stride // 8) + pair, mask=live, other=0))
        word = tl.where(number == 2 * pair, low[:, None], tl.where(number == 2 * pair + 1, high[:, None], word))
        place += tl.where(number > 2 * pair, ones(low)[:, None], 0)
        place += tl.where(number > 2 * pair + 1, ones(high)[:, None], 0)
    place += ones(word & below(channel % 32)) + 4 * WORDS  # values are behind the words
    bit = (word >> (channel % 32).to(tl.uint32)) & 1
    return tl.load(values + (record * (stride // 2))[:, None] + place, mask=bit == 1, other=0.0)


@triton.jit
def scored(asked, key, live, scale, WIDEN: tl.constexpr):
    """(queries, tokens), -inf where there is no token."""
    if WIDEN:  # the interpreter's product of bfloat16 is wrong
        asked, key = asked.to(tl.float32), key.to(tl.float32)
    return tl.where(live[None, :], tl.dot(asked, tl.trans(key)) * scale, float("-inf"))


@triton.jit
def attend(
    q, key_words, key_values, value_words, value_values, recent_keys, recent_values, totals, mosts, masses, scale,
    tokens, recent, key_capacity, value_capacity, key_stride, value_stride, dim, share, parts,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The state of the softmax of each part: totals (parts, heads, dim), mosts and masses (parts, heads), float32.
    Program: (kv head, part of the steps over the records and then over the recent tokens)."""
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, channel = tl.arange(0, GROUP), tl.arange(0, DIM)
    mine = (row < share)[:, None] & (channel < dim)[None, :]
    asked = tl.load(q + (head * share + row)[:, None] * dim + channel[None, :], mask=mine, other=0.0)
    asked = asked.to(tl.bfloat16)
    most = tl.full([GROUP], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([GROUP], dtype=tl.float32)
    total = tl.zeros([GROUP, DIM], dtype=tl.float32)
    packed = tl.cdiv(tokens, TOKENS)
    steps = packed + tl.cdiv(recent, TOKENS)
    per_part = tl.cdiv(steps, parts)
    for step in range(part * per_part, tl.minimum(packed, (part + 1) * per_part)):
        token = step * TOKENS + tl.arange(0, TOKENS)
        live = token < tokens
        key = expanded(key_words, key_values, head * key_capacity + token, live, key_stride, WORDS, DIM)
        value = expanded(value_words, value_values, head * value_capacity + token, live, value_stride, WORDS, DIM)
        most, mass, total = absorb(scored(asked, key, live, scale, WIDEN), value, most, mass, total, WIDEN)
    for step in range(tl.maximum(packed, part * per_part), tl.minimum(steps, (part + 1) * per_part)):
        token = (step - packed) * TOKENS + tl.arange(0, TOKENS)
        live = token < recent
        there = live[:, None] & (channel < dim)[None, :]
        where = (head * recent + token)[:, None] * dim + channel[None, :]
        key = tl.load(recent_keys + where, mask=there, other=0.0)
        value = tl.load(recent_values + where, mask=there, other=0.0)
        most, mass, total = absorb(scored(asked, key, live, scale, WIDEN), value, most, mass, total, WIDEN)
    line = (part * tl.num_programs(0) + head) * share + row
    tl.store(totals + line[:, None] * dim + channel[None, :], total, mask=mine)
    tl.store(mosts + line, most, mask=row < share)
    tl.store(masses + line, mass, mask=row < share)


@triton.jit
def merge(totals, mosts, masses, out, parts, heads, dim, PARTS: tl.constexpr, DIM: tl.constexpr):
    """out (heads, dim) from the states of the parts. Program: head."""
    head, part, channel = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, DIM)
    line = part * heads + head
    most = tl.load(mosts + line, mask=part < parts, other=float("-inf"))
    highest = tl.max(most, 0)
    fade = tl.exp2(most - tl.where(highest == float("-inf"), 0.0, highest))
    mass = tl.sum(tl.load(masses + line, mask=part < parts, other=0.0) * fade, 0)
    there = (part < parts)[:, None] & (channel < dim)[None, :]
    total = tl.load(totals + line[:, None] * dim + channel[None, :], mask=there, other=0.0)
    result = tl.sum(total * fade[:, None], 0) / tl.where(mass == 0.0, 1.0, mass)
    tl.store(out + head * dim + channel, result.to(out.dtype.element_ty), mask=channel < dim)


_attend = Tuned(attend, ("dim", "share"), ({"TOKENS": 32}, 4, 2), ({"TOKENS": _TOKENS}, 8, 2))


def attention(
    q: Tensor, keys: Records, values: Records, recent_keys: Tensor | None, recent_values: Tensor | None, scale: float
) -> Tensor:
    """q: (heads, dim); recent_keys, recent_values: (kv_heads, recent, dim) bfloat16 or None. All contiguous, on one
    device. Returns the shape and dtype of q; zeros where there is no token."""
    out = torch.empty_like(q)
    heads, dim = q.shape
    recent = 0 if recent_keys is None else recent_keys.shape[1]
    parts = splits(keys.heads, max(1, (keys.tokens + recent) // (2 * _TOKENS)), q.device, _MOST_PARTS)
    state = torch.empty(parts * heads * (dim + 2), dtype=torch.float32, device=q.device)
    totals, mosts, masses = state.split([parts * heads * dim, parts * heads, parts * heads])
    wide = max(16, triton.next_power_of_2(dim))
    _attend(
        (keys.heads, parts), q=q, **_views("key", keys), **_views("value", values),
        recent_keys=q if recent_keys is None else recent_keys, totals=totals, mosts=mosts, masses=masses,
        recent_values=q if recent_values is None else recent_values, scale=scale * math.log2(math.e),
        tokens=keys.tokens, recent=recent, dim=dim, share=heads // keys.heads, parts=parts, DIM=wide,
        WORDS=triton.cdiv(dim, 64),
        GROUP=max(16, triton.next_power_of_2(heads // keys.heads)), WIDEN=INTERPRETED,
    )  # fmt: skip
    merge[(heads,)](
        totals, mosts, masses, out, parts, heads, dim, PARTS=triton.next_power_of_2(parts), DIM=wide, num_warps=4
    )
    return out


def _views(name: str, records: Records) -> dict[str, Tensor | int]:
    """What the kernel takes of some records."""
    return {
        f"{name}_words": records.data.view(torch.int64), f"{name}_values": records.data.view(torch.bfloat16),
        f"{name}_capacity": records.capacity, f"{name}_stride": records.stride,
    }  # fmt: skip
