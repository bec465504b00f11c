"""Scores tokens with a causal model: in one forward, or through the cache after a prefill."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsebench.models import caching
from sparsebench.models.base import LoadedModel


@torch.no_grad()
def score_tokens(loaded: LoadedModel, ids: Tensor, *, prefill: int = 0, step: int = 0) -> tuple[Tensor, Tensor]:
    """Negative log likelihood (float32, nats) and hit (the token is the most likely one) of each token.

    ids: (rows, tokens) int64 -> two (rows, scored) tensors on the CPU, for tokens 1 .. tokens - 1.
    With ``prefill=p`` the first p tokens fill the cache and only tokens p .. tokens - 1 are scored,
    ``step`` at a time through the cache (0: all at once), so that cache and decode methods act.
    """
    ids = ids.to(loaded.device)
    if prefill == 0:
        logits = loaded.model(input_ids=ids[:, :-1], use_cache=False).logits
        return score_logits(logits, ids[:, 1:])
    logits, cache = caching.read(loaded.model, ids[:, :prefill])
    size = step or ids.shape[1]
    pieces = [logits[:, -1:]]
    for start in range(prefill, ids.shape[1] - 1, size):
        logits, cache = caching.read(loaded.model, ids[:, start : min(start + size, ids.shape[1] - 1)], cache)
        pieces.append(logits)
    return score_logits(torch.cat(pieces, dim=1), ids[:, prefill:])


def score_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As ``score_tokens``, from logits (rows, scored, vocabulary) of the tokens (rows, scored) that they predict."""
    nll = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return nll.cpu(), (logits.argmax(-1) == targets).cpu()
