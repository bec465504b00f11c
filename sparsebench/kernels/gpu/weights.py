"""Products with bitmap weights (``layout.Tiles``) on the GPU.

One row of input: every lane owns eight columns of a row and steps through its values, which it finds by counting the
bits in front of them: no lane waits for another. 2 to 16 rows: the tiles are expanded into a dense
operand in registers and multiplied in the tensor cores (load as sparse, compute as dense: Flash-LLM, Xia et al. 2023,
section 4). More rows: the weight is unpacked into scratch and torch multiplies.

Sums are in float32, cut into parts where the rows alone do not fill the device, and added in a fixed order: the same
call gives the same bits. Pruned entries are multiplied as zeros, so an infinite input gives NaN in every output.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from sparsebench.kernels.gpu.counting import below, halves, ones
from sparsebench.kernels.gpu.launch import INTERPRETED, Tuned, add, splits
from sparsebench.kernels.gpu.layout import Tiles

MOST_ROWS = 16  # of input, for which a kernel multiplies without unpacking
_LEAST_BLOCKS = 4  # of 64 columns, to a part of a sum


@triton.jit
def eight(x):
    """The columns of (lanes, 8), as eight tensors (lanes,) that stay in the registers they are in."""
    even, odd = tl.split(x.reshape(x.shape[0], 4, 2))
    at_0_4, at_2_6 = tl.split(even.reshape(x.shape[0], 2, 2))
    at_1_5, at_3_7 = tl.split(odd.reshape(x.shape[0], 2, 2))
    at_0, at_4 = tl.split(at_0_4)
    at_1, at_5 = tl.split(at_1_5)
    at_2, at_6 = tl.split(at_2_6)
    at_3, at_7 = tl.split(at_3_7)
    return at_0, at_1, at_2, at_3, at_4, at_5, at_6, at_7


@triton.jit
def gemv(
    x, mask, within, starts, values, bias, out, rows, columns, blocks, per_part,
    STEP: tl.constexpr, ADD_BIAS: tl.constexpr,
):  # fmt: skip
    """out (parts, rows) = the parts of weight (rows, columns) times x (columns). Program: (row tile, part).

    A lane is eight columns of a row, lanes in the order of the values (block, row, eight columns), so that a warp reads
    one stretch of them; ``STEP`` blocks at a time."""
    tile, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, STEP * 128)
    row, octet = (lane // 8) % 16, lane % 8
    second, shift = octet >= 4, (octet % 4) * 8
    total = tl.zeros([STEP * 128], dtype=tl.float32)
    last = tl.minimum(blocks, (part + 1) * per_part)
    base = tl.load(starts + tile * blocks + part * per_part)  # from there on 32 bits reach every value
    for first in range(part * per_part, last, STEP):
        block = first + lane // 128
        live = block < last
        at = tile * blocks + block
        line = at * 16 + row
        low, high = halves(tl.load(mask + line, mask=live, other=0))
        word = tl.where(second, high, low)
        start = (tl.load(starts + at, mask=live, other=0) - base).to(tl.int32)
        place = (
            start
            + tl.load(within + line, mask=live, other=0)
            + ones(word & below(shift))
            + tl.where(second, ones(low), 0)
        )
        bits = word >> shift.to(tl.uint32)
        column = (block * 64 + octet * 8)[:, None] + tl.arange(0, 8)[None, :]
        entries = eight(tl.load(x + column, mask=live[:, None] & (column < columns), other=0.0).to(tl.float32))
        for step in tl.static_range(8):
            bit = ((bits >> step) & 1).to(tl.int32)
            total += tl.load(values + base + place, mask=bit == 1, other=0.0).to(tl.float32) * entries[step]
            place += bit
    result = tl.sum(tl.sum(total.reshape(STEP, 16, 8), 2), 0)
    place = tile * 16 + tl.arange(0, 16)
    if ADD_BIAS:
        result += tl.load(bias + place, mask=place < rows, other=0.0).to(tl.float32)
    tl.store(out + part * rows + place, result.to(out.dtype.element_ty), mask=place < rows)


@triton.jit
def expanded(mask, within, starts, values, line, live, at):
    """The dense rows (lines, 64) of one block: ``line`` (lines,), a row's place among all rows of all tiles of that
    block, ``at`` (lines,) its tile's place; dead lines are zero."""
    lane = tl.arange(0, 64)
    low, high = halves(tl.load(mask + line, mask=live, other=0))
    start = tl.load(starts + at, mask=live, other=0) + tl.load(within + line, mask=live, other=0)
    second = lane[None, :] >= 32
    word = tl.where(second, high[:, None], low[:, None])
    place = start[:, None] + ones(word & below(lane % 32)[None, :]) + tl.where(second, ones(low)[:, None], 0)
    bit = (word >> (lane % 32).to(tl.uint32)[None, :]) & 1
    return tl.load(values + place, mask=bit == 1, other=0.0)


@triton.jit
def gemm(
    x, mask, within, starts, values, bias, out, batch, rows, columns, blocks, tiles, per_part,
    TILES: tl.constexpr, ADD_BIAS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out (parts, batch, rows) = the parts of x (batch <= 16, columns) times the weight. Program: (row tiles, part)."""
    part = tl.program_id(1)
    row = tl.program_id(0) * (16 * TILES) + tl.arange(0, 16 * TILES)
    tile, lane, sample = (row // 16).to(tl.int64), tl.arange(0, 64), tl.arange(0, 16)
    total = tl.zeros([16 * TILES, 16], dtype=tl.float32)
    for block in range(part * per_part, tl.minimum(blocks, (part + 1) * per_part)):
        at = tile * blocks + block
        weight = expanded(mask, within, starts, values, at * 16 + row % 16, tile < tiles, at)
        column = block * 64 + lane
        there = (column < columns)[:, None] & (sample < batch)[None, :]
        entry = tl.load(x + sample[None, :] * columns + column[:, None], mask=there, other=0.0)
        if WIDEN:  # the interpreter's product of bfloat16 is wrong
            weight, entry = weight.to(tl.float32), entry.to(tl.float32)
        total = tl.dot(weight, entry, total, input_precision="ieee")
    if ADD_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    where = (part * batch + sample)[None, :] * rows + row[:, None]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=(sample < batch)[None, :] & (row < rows)[:, None])


@triton.jit
def unpack(mask, within, starts, values, out, rows, columns, blocks, tiles):
    """out (rows, columns), dense. Program: (row tile, block)."""
    tile, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, lane = tl.arange(0, 16), tl.arange(0, 64)
    at = tile * blocks + block + tl.zeros([16], dtype=tl.int64)
    weight = expanded(mask, within, starts, values, at * 16 + row, tile + row * 0 < tiles, at)
    line, column = tile * 16 + row, block * 64 + lane
    there = (line < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + line[:, None] * columns + column[None, :], weight, mask=there)


_gemv = Tuned(
    gemv, ("rows", "columns"), ({"STEP": 4}, 4, 2), ({"STEP": 4}, 8, 2), ({"STEP": 4}, 2, 2), ({"STEP": 8}, 8, 2),
    ({"STEP": 2}, 4, 3),
)  # fmt: skip
_gemm = Tuned(
    gemm, ("rows", "columns"), ({"TILES": 2}, 4, 2), ({"TILES": 1}, 2, 3), ({"TILES": 4}, 4, 2), ({"TILES": 4}, 8, 3)
)


def linear(x: Tensor, weight: Tiles, bias: Tensor | None) -> Tensor:
    """x (..., in) times weight (out, in), plus bias (out): (..., out). x contiguous, all in one dtype and device."""
    batch = x.numel() // max(1, weight.columns)
    if batch > MOST_ROWS:
        return functional.linear(x, unpacked(weight), bias)
    out = x.new_empty(*x.shape[:-1], weight.rows)
    if not out.numel():
        return out
    tiles, blocks = weight.starts.shape
    parts = splits(tiles, -(-blocks // _LEAST_BLOCKS), x.device)
    per_part = -(-blocks // parts)
    parts = max(1, -(-blocks // per_part))
    target = out if parts == 1 else torch.empty(parts, batch, weight.rows, dtype=torch.float32, device=x.device)
    shared = {
        "x": x, **_tensors(weight), "bias": x if bias is None else bias, "out": target, "rows": weight.rows,
        "columns": weight.columns, "blocks": blocks, "per_part": per_part,
        "ADD_BIAS": bias is not None and parts == 1,
    }  # fmt: skip
    if batch == 1:
        _gemv((tiles, parts), **shared)
    else:
        grid = lambda meta: (triton.cdiv(tiles, meta["TILES"]), parts)  # noqa: E731
        _gemm(grid, **shared, batch=batch, tiles=tiles, WIDEN=INTERPRETED)
    if parts > 1:
        add(target, bias, out)
    return out


def unpacked(weight: Tiles) -> Tensor:
    """The dense matrix (out, in)."""
    out = torch.empty(weight.rows, weight.columns, dtype=weight.values.dtype, device=weight.values.device)
    tiles, blocks = weight.starts.shape
    if out.numel():
        unpack[(tiles, blocks)](**_tensors(weight), out=out, rows=weight.rows, columns=weight.columns, blocks=blocks,
                                tiles=tiles)  # fmt: skip
    return out


def _tensors(weight: Tiles) -> dict[str, Tensor]:
    return {"mask": weight.mask, "within": weight.within, "starts": weight.starts, "values": weight.values}
