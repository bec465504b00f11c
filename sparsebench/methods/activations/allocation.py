"""TEAL's greedy allocation: which projection of a block may lose more of its input, step by step.

    s_p = 0; while sum_p w_p s_p / sum_p w_p < target:
        p* = argmin over p with s_p < 1 of E(dense output, output with s_p + base_step / w_p)
        s_p* += base_step / w_p*

E(A, B): of the last positions of A - B the L2 norm along the sequence, averaged over rows and channels. The
steps are not clipped: the last one of a projection may pass 1. The reference goes on to a target of 0.9 and later
takes the row whose effective sparsity is closest to what is asked; since a row depends on those before it alone,
the search here ends with the first row that reaches what is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsebench.methods.activations.gating import Acting, Gate
from sparsebench.methods.activations.sites import BlockSeen, GatedBlock

MakeGate = Callable[[str, float], Gate]  # short name of a projection, its level


@dataclass(frozen=True)
class Row:
    """One step: the block's sparsity, its error, the error of one level for all at that sparsity, the levels."""

    effective: float
    error: float
    uniform_error: float
    levels: dict[str, float]


def relative_weights(block: GatedBlock, kinds: tuple[str, ...], compat: bool = False) -> dict[str, float]:
    """w_p: weights of each projection relative to those of q. ``compat``: k and v count 1/8 where they are as
    large as q, as in the tables that TEAL published for Llama-2."""
    whole = block.linears["q"].weights
    found = {kind: block.linears[kind].weights / whole for kind in kinds}
    return {k: 0.125 if compat and k in ("k", "v") and w == 1 else w for k, w in found.items()}


@torch.no_grad()
def greedy(
    seen: BlockSeen,
    make: MakeGate,
    weights: Mapping[str, float],
    sparse: Callable[[int], int],
    *,
    base_step: float,
    target: float,
    last_fraction: float,
) -> list[Row]:
    """The rows of one block up to the first whose effective sparsity reaches ``target``. ``sparse``: how many of a
    prompt's tokens are acted on."""
    total = sum(weights.values())
    dense = torch.cat(seen.run())

    def error(levels: Mapping[str, float]) -> float:
        gates = [make(kind, level) for kind, level in levels.items() if level > 0]
        with Acting(sparse).on(seen.block.module, gates):
            return distance(dense, torch.cat(seen.run()), last_fraction)

    def effective(levels: Mapping[str, float]) -> float:
        return sum(weights[kind] * levels[kind] for kind in weights) / total

    levels = dict.fromkeys(weights, 0.0)
    rows: list[Row] = []
    while effective(levels) < target:
        steps = {
            kind: levels | {kind: levels[kind] + base_step / weights[kind]} for kind in weights if levels[kind] < 1
        }
        if not steps:
            break
        errors = {kind: error(step) for kind, step in steps.items()}
        best = min(errors, key=lambda kind: errors[kind])  # the first of equals
        levels = steps[best]
        reached = effective(levels)
        rows.append(Row(reached, errors[best], error(dict.fromkeys(weights, reached)), levels))
    return rows


def closest(rows: list[Row], asked: float) -> Row:
    """The row whose effective sparsity is closest to what is asked (the first of equals)."""
    return min(rows, key=lambda row: abs(row.effective - asked))


def distance(dense: Tensor, sparse: Tensor, last_fraction: float) -> float:
    """E(A, B) of two block outputs, each (rows, tokens, features)."""
    last = max(1, int(dense.shape[1] * last_fraction))
    return float((dense - sparse)[:, -last:].float().norm(dim=1).mean())
