"""What the kernels must compute, in plain torch: the fallback without a compiler, and the tests' yardstick in float64.

Every function takes what its namesake in ``ops`` takes and works on any device, in any dtype, with gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from sparsebench.kernels.formats import Columns, Matrix
from sparsebench.kernels.gpu.layout import Packed
from sparsebench.kernels.lists import Lists

if TYPE_CHECKING:
    from sparsebench.kernels.attention import BlockIndex, Records


def linear(x: Tensor, weight: Matrix | Packed | Lists, bias: Tensor | None = None) -> Tensor:
    """x (..., in) -> (..., out)."""
    return functional.linear(x, weight.dense().to(device=x.device, dtype=x.dtype), bias)


def skipping_linear(x: Tensor, weight: Columns, threshold: float, bias: Tensor | None = None) -> Tensor:
    """x (..., in) -> (..., out), with every entry of x that is not beyond the threshold set to zero.

    ``|x| <= threshold`` is what goes, compared in the dtype of x; a NaN stays.
    """
    kept = torch.where(x.abs() <= threshold, torch.zeros_like(x), x)
    return functional.linear(kept, weight.dense().to(x.device), bias)


def selected_linear(x: Tensor, weight: Tensor, kept: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) -> (..., out), with every entry that is not kept set to zero."""
    return torch.where(kept, functional.linear(x, weight, bias), 0)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndex, scale: float, positions: Tensor | None = None
) -> Tensor:
    """Per query block: gathers the listed key blocks and attends with the causal mask on them."""
    shape, (queries, dim), keys = q.shape, q.shape[-2:], k.shape[-2]
    q, k, v = q.reshape(-1, queries, dim), k.reshape(-1, keys, dim), v.reshape(-1, keys, dim)
    share = len(q) // max(1, len(k))
    where = torch.arange(keys, device=q.device)
    rows = []
    for head in range(len(q)):
        at = where if positions is None else positions.reshape(-1, keys)[head].to(q.device)
        for number, listed in enumerate(blocks.lists(head)):
            query = torch.arange(number * 64, min(queries, number * 64 + 64), device=q.device)
            key = (listed.to(q.device).long()[:, None] * 64 + torch.arange(64, device=q.device)).flatten()
            key = key[key < keys]
            seen = at[key][None] <= (query + keys - queries)[:, None]
            score = (q[head, query] @ k[head // share, key].T * scale).masked_fill(~seen, float("-inf"))
            weight = (
                score.to(torch.promote_types(score.dtype, torch.float32))
                .softmax(-1)
                .masked_fill(~seen.any(-1, keepdim=True), 0)
            )
            rows.append(weight.to(q.dtype) @ v[head // share, key])
    return torch.cat(rows).view(shape) if rows else torch.zeros_like(q).view(shape)


def kv_attention(
    q: Tensor,
    keys: Records,
    values: Records,
    recent_keys: Tensor | None,
    recent_values: Tensor | None,
    scale: float,
) -> Tensor:
    """Unpacks the records and attends densely, in float32."""
    k, v = keys.dense(), values.dense()
    if recent_keys is not None and recent_values is not None:
        k, v = torch.cat([k, recent_keys], 1), torch.cat([v, recent_values], 1)
    if not k.shape[1]:
        return torch.zeros_like(q)
    share = len(q) // keys.heads
    grouped = q.float().view(keys.heads, share, -1)
    weight = (grouped @ k.float().transpose(1, 2) * scale).softmax(-1)
    return (weight @ v.float()).view(q.shape).to(q.dtype)
