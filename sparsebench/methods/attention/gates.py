"""SeerAttention's gate: a small map of attention between blocks, and what it is distilled from.

Pool queries and keys over blocks before the rotary embedding, map each head by its own matrix, rotate at the blocks'
first positions, and take products: logits of which key blocks a query block attends to (Gao et al. 2024, arXiv
2410.13276). B is the block size, n blocks, H query heads, K KV heads, g the gate's width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsebench.methods.attention.selections import Heads, causal, masked_softmax

POOLS = ("max", "min", "avg")
_KIND = re.compile(r"Q((?:max|min|avg)+)_K((?:max|min|avg)+)")
_FLOOR = -1e30
_AT_ONCE = 2**22  # attention weights that are held at a time


def pools_of(gate_type: str) -> tuple[list[str], list[str]]:
    """``Qavg_Kmaxminavg`` -> (["avg"], ["max", "min", "avg"]), in the name's order. ValueError for other names."""
    match = _KIND.fullmatch(gate_type)
    if match is None:
        raise ValueError(gate_type)
    query, key = (re.findall("max|min|avg", part) for part in match.groups())
    return query, key


def pool(vectors: Tensor, size: int, kinds: list[str]) -> Tensor:
    """(heads, N, d) -> (heads, n, d * kinds), channels side by side; the last block may be short."""
    tokens = vectors.shape[1]
    padding = -tokens % size
    found = []
    for kind in kinds:
        if kind == "avg":
            counts = (tokens - torch.arange(0, tokens, size, device=vectors.device)).clamp(max=size)
            sums = F.pad(vectors, (0, 0, 0, padding)).unflatten(1, (-1, size)).sum(dim=2)
            found.append(sums / counts[:, None])
        else:
            fill = -torch.inf if kind == "max" else torch.inf
            blocks = F.pad(vectors, (0, 0, 0, padding), value=fill).unflatten(1, (-1, size))
            found.append(blocks.amax(dim=2) if kind == "max" else blocks.amin(dim=2))
    return torch.cat(found, dim=-1)


def block_rotary(blocks: int, size: int, width: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (blocks, width) at the first position of each block, in the layout that rotates halves."""
    rates = base ** (-torch.arange(0, width, 2, device=device).float() / width)
    angles = torch.arange(blocks, device=device)[:, None] * size * rates
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """(heads, n, width), rotated."""
    if rotary is None:
        return x
    cos, sin = rotary
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def gate_logits(
    query: Tensor, key: Tensor, weights: Mapping[str, Tensor], size: int, gate_type: str,
    rotary: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """(H, n, n): query (H, N, d) and key (K, N, d) before the rotary embedding; weights ``q`` (H, d', g), absent where
    queries go as they are, and ``k`` (K or H, d'', g). Blocks of the future are about -1e30."""
    query_kinds, key_kinds = pools_of(gate_type)
    queries, keys = pool(query, size, query_kinds), pool(key, size, key_kinds)
    if len(weights["k"]) != len(keys):  # one matrix per query head
        keys = keys.repeat_interleave(len(weights["k"]) // len(keys), dim=0)
    keys = keys @ weights["k"]
    if "q" in weights:
        queries = queries @ weights["q"]
    queries, keys = rotated(queries, rotary), rotated(keys, rotary)
    keys = keys.repeat_interleave(len(queries) // len(keys), dim=0)
    logits: Tensor = queries @ keys.transpose(1, 2) * queries.shape[-1] ** -0.5
    future = torch.ones_like(logits[0], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, _FLOOR)


@torch.no_grad()
def pooled_attention(heads: Heads, size: int) -> Tensor:
    """What the gate is to say, (H, n, n): the largest attention weight in each block, rows divided by their sums."""
    keys, tokens = heads.keys.float(), heads.tokens
    padding = -tokens % size
    rows = max(1, _AT_ONCE // (len(keys) * tokens * size)) * size
    found = []
    for start in range(0, tokens, rows):
        stop = min(start + rows, tokens)
        logits = heads.query[:, start:stop].float() @ keys.transpose(1, 2) * heads.scaling
        weights = masked_softmax(logits, causal(tokens, tokens, logits.device)[start:stop])
        whole = F.pad(weights, (0, padding, 0, padding if stop == tokens else 0))
        found.append(whole.unflatten(2, (-1, size)).unflatten(1, (-1, size)).amax(dim=(2, 4)))
    largest = torch.cat(found, dim=1)
    return largest / largest.sum(dim=-1, keepdim=True)


def distance(logits: Tensor, wanted: Tensor, drop_first: float) -> Tensor:
    """Kullback-Leibler divergence (mean over elements) of gate logits (..., n, n) from what they are to say, without
    the first share of rows."""
    first = int(logits.shape[-2] * drop_first)
    return F.kl_div(logits[..., first:, :].log_softmax(dim=-1), wanted[..., first:, :], reduction="none").mean()


def by_threshold(scores: Tensor, threshold: float, last_dense: bool) -> Tensor:
    """(H, n, n) bool: softmaxed scores above a threshold; the last two block rows all, if ``last_dense``."""
    mask = scores > threshold
    if last_dense:
        mask[..., -2:, :] = True
    return mask.tril()


def by_share(logits: Tensor, share: float) -> Tensor:
    """(H, n, n) bool: the best k = max(1, int((1 - sqrt(1 - share)) n)) blocks of each row; about ``share`` of the
    triangle in all."""
    count = logits.shape[-1]
    kept = max(1, int((1 - (1 - share) ** 0.5) * count))
    best = logits.topk(kept, dim=-1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True).tril()
