"""From scores to masks: one place for comparison groups, n:m groups, ties and counts.

Scores are (out, in); the smallest go. Masks are bool, True = kept. Ties go to the lower index
first (stable sort), as in the reference implementations.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsebench.kernels.bits import bits_of

_PAIRS = 8  # groups of up to this many entries are ranked by comparing pairs,
_MANY = 1024  # if there are at least so many of them: else calls cost more than sorts


def clear(weight: Tensor, kept: Tensor) -> None:
    """Sets what is not kept to zero, in place. On whole numbers: several times faster than a choice per entry."""
    bits_of(weight).mul_(kept)


def value_at(scores: Tensor, rank: int) -> Tensor:
    """The value at 0-based ``rank`` of each ascending row: scores (rows, n) -> (rows, 1)."""
    if scores.is_cpu and scores.dtype == torch.float32:
        # numpy selects with vector instructions: tens of times faster than a sort of the rows
        found = np.partition(scores.numpy(force=True), rank, axis=1)[:, rank : rank + 1]
        return torch.from_numpy(np.ascontiguousarray(found))
    return torch.sort(scores, dim=1).values[:, rank : rank + 1]


def keep_rows(scores: Tensor, sparsity: float) -> Tensor:
    """Each row loses its ``int(in * sparsity)`` smallest scores."""
    return keep_of_rows(scores, int(scores.shape[1] * sparsity))


def keep_of_rows(scores: Tensor, pruned: int) -> Tensor:
    """Each row loses its ``pruned`` smallest scores."""
    if pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = value_at(scores, pruned - 1)
    kept = scores > threshold
    wrong = (scores.shape[1] - kept.sum(dim=1) != pruned).nonzero().flatten()
    if len(wrong):  # rows with ties at the threshold (or what does not compare): not all of them go
        order = torch.sort(scores[wrong], dim=1, stable=True).indices[:, :pruned]
        kept[wrong] = torch.ones_like(kept[wrong]).scatter_(1, order, False)
    return kept


def keep_count(scores: Tensor, pruned: int) -> Tensor:
    """The whole matrix loses exactly its ``pruned`` smallest scores."""
    return keep_of_rows(scores.reshape(1, -1), pruned).view_as(scores)


def keep_above_threshold(scores: Tensor, sparsity: float) -> Tensor:
    """The published layer-wise baseline: prune every score <= the value at 0-based rank
    ``int(numel * sparsity)``. The comparison is not strict, so ties (and at least one entry more) go."""
    if sparsity == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores > value_at(scores.reshape(1, -1), int(scores.numel() * sparsity))


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """In each aligned group of ``m`` columns of a row the ``m - n`` smallest go; columns of a last
    shorter group stay."""
    count = scores.shape[1] // m  # spelled out below: -1 is ambiguous when no whole group fits
    whole = count * m
    mask = torch.ones_like(scores, dtype=torch.bool)
    if n < m:
        groups = scores[:, :whole].reshape(scores.shape[0], count, m).movedim(2, 0).contiguous()
        mask[:, :whole] = keep_largest(groups, n).movedim(0, 2).reshape(scores.shape[0], whole)
    return mask


def keep_largest(scores: Tensor, n: int) -> Tensor:
    """Along the first dimension, the ``n`` largest are kept: scores (m, ...) -> bool of that shape."""
    m = len(scores)
    if m > _PAIRS or scores[0].numel() < _MANY:
        order = torch.sort(scores, dim=0, stable=True).indices[: m - n]
        return torch.ones_like(scores, dtype=torch.bool).scatter_(0, order, False)
    # comparing each with those behind it is faster than many sorts of a few entries
    whole = scores.reshape(m, -1)
    wild = whole.isnan()  # the largest of all for a sort
    rank = torch.arange(m - 1, -1, -1, dtype=torch.int8, device=whole.device)[:, None].repeat(1, whole.shape[1])
    for first in range(m - 1):
        before = ((whole[first] <= whole[first + 1 :]) | wild[first + 1 :]).view(torch.int8)
        rank[first + 1 :] += before
        rank[first] -= before.sum(0, dtype=torch.int8)
    return (rank >= m - n).view_as(scores)


def keep_global(scores: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """One ranking over all matrices: exactly ``round(sparsity * total)`` entries go (half to even)."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    mask = keep_count(flat[None, :], round(sparsity * flat.numel())).flatten()
    sizes = [score.numel() for score in scores.values()]
    parts = mask.split(sizes)
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}
