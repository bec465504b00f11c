"""From scores to masks: one place for comparison groups, n:m groups, ties and counts.

Scores are (out, in); the smallest go. Masks are bool, True = kept. Ties go to the lower index
first (stable sort), as in the reference implementations.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_rows(scores: Tensor, sparsity: float) -> Tensor:
    """Each row loses its ``int(in * sparsity)`` smallest scores."""
    order = torch.sort(scores, dim=1, stable=True).indices[:, : int(scores.shape[1] * sparsity)]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order, False)


def keep_count(scores: Tensor, pruned: int) -> Tensor:
    """The whole matrix loses exactly its ``pruned`` smallest scores."""
    order = torch.sort(scores.flatten(), stable=True).indices[:pruned]
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order] = False
    return mask.view_as(scores)


def keep_above_threshold(scores: Tensor, sparsity: float) -> Tensor:
    """The published layer-wise baseline: prune every score <= the value at 0-based rank
    ``int(numel * sparsity)``. The comparison is not strict, so ties (and at least one entry more) go."""
    if sparsity == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = torch.sort(scores.flatten()).values[int(scores.numel() * sparsity)]
    return scores > threshold


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """In each aligned group of ``m`` columns of a row the ``m - n`` smallest go; columns of a last
    shorter group stay."""
    count = scores.shape[1] // m  # spelled out below: -1 is ambiguous when no whole group fits
    whole = count * m
    groups = scores[:, :whole].reshape(scores.shape[0], count, m)
    order = torch.sort(groups, dim=2, stable=True).indices[:, :, : m - n]
    kept = torch.ones_like(groups, dtype=torch.bool).scatter_(2, order, False)
    mask = torch.ones_like(scores, dtype=torch.bool)
    mask[:, :whole] = kept.reshape(scores.shape[0], whole)
    return mask


def keep_global(scores: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """One ranking over all matrices: exactly ``round(sparsity * total)`` entries go (half to even)."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    mask = keep_count(flat[None, :], round(sparsity * flat.numel())).flatten()
    sizes = [score.numel() for score in scores.values()]
    parts = mask.split(sizes)
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}
