"""Products that do not read the weights of small inputs, on the GPU (TEAL, Liu et al. 2025; CATS, Lee et al. 2024).

The weight is stored so that one input's weights lie together (``formats.ColumnMajor``); a program owns some outputs and
some inputs and masks the loads of the inputs that are not beyond the threshold. The parts are added in a fixed order,
not atomically as in TEAL's kernel: the same call gives the same bits. A NaN is never dropped; an infinite weight behind
a dropped input is not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebench.kernels.gpu.launch import Tuned, add, splits

_OUTPUTS, _LEAST_INPUTS = 128, 256  # to a program


@triton.jit
def skipping(
    x, weight, bias, out, threshold, inputs, outputs, per_part,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, ADD_BIAS: tl.constexpr,
):  # fmt: skip
    """out (parts, outputs) = the parts of x (inputs) times weight (inputs, outputs). Program: (outputs, part)."""
    part = tl.program_id(1)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros([OUTPUTS], dtype=tl.float32)
    last = tl.minimum(inputs, (part + 1) * per_part)
    for first in range(part * per_part, last, INPUTS):
        place = first + tl.arange(0, INPUTS)
        entry = tl.load(x + place, mask=place < last, other=0.0, eviction_policy="evict_last").to(tl.float32)
        dropped = (tl.abs(entry) <= threshold) | (place >= last)  # false for NaN
        there = (dropped == 0)[:, None] & (output < outputs)[None, :]
        where = place.to(tl.int64)[:, None] * outputs + output[None, :]
        read = tl.load(weight + where, mask=there, other=0.0, eviction_policy="evict_first").to(tl.float32)
        total += tl.sum(read * tl.where(dropped, 0.0, entry)[:, None], 0)
    if ADD_BIAS:
        total += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)
    tl.store(out + part * outputs + output, total.to(out.dtype.element_ty), mask=output < outputs)


_skipping = Tuned(
    skipping, ("inputs", "outputs"),
    ({"OUTPUTS": 128, "INPUTS": 16}, 4, 2), ({"OUTPUTS": 256, "INPUTS": 16}, 4, 2),
    ({"OUTPUTS": 128, "INPUTS": 32}, 8, 2), ({"OUTPUTS": 64, "INPUTS": 32}, 4, 3),
)  # fmt: skip


def linear(x: Tensor, weight: Tensor, threshold: float, bias: Tensor | None) -> Tensor:
    """x, one row of (..., in), times weight (in, out), without the inputs of ``|x| <= threshold``, plus bias (out)."""
    inputs, outputs = weight.shape
    out = x.new_empty(*x.shape[:-1], outputs)
    if not outputs:
        return out
    parts = splits(triton.cdiv(outputs, _OUTPUTS), triton.cdiv(inputs, _LEAST_INPUTS), x.device)
    per_part = max(1, triton.cdiv(inputs, parts))
    parts = max(1, triton.cdiv(inputs, per_part))
    target = out if parts == 1 else torch.empty(parts, 1, outputs, dtype=torch.float32, device=x.device)
    limit = float(torch.tensor(threshold, dtype=x.dtype))  # compared in the dtype of x, as torch does
    grid = lambda meta: (triton.cdiv(outputs, meta["OUTPUTS"]), parts)  # noqa: E731
    _skipping(
        grid, x=x, weight=weight, bias=x if bias is None else bias, out=target, threshold=limit, inputs=inputs,
        outputs=outputs, per_part=per_part, ADD_BIAS=bias is not None and parts == 1,
    )  # fmt: skip
    if parts > 1:
        add(target, bias, out)
    return out
