"""Golden prefill vectors as the heads of one layer, and masks out of what methods select."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsebench.methods.attention.selections import Heads, Selection, causal


def heads_of(query: Tensor, key: Tensor, value: Tensor | None = None) -> Heads:
    """Tensors (1, H or K, N, d) as one prompt's heads."""
    query, key = query[0].float(), key[0].float()
    value = key if value is None else value[0].float()
    return Heads(0, query, key, value, query.shape[-1] ** -0.5, lambda: (query, key))


def causal_mask(selection: Selection) -> Tensor:
    """(H or 1, N, N) bool: what is computed, without the future."""
    tokens = selection.tokens
    return selection.rows(0, tokens) & causal(tokens, tokens, torch.device("cpu"))


def unpacked(packed: Tensor, tokens: int) -> Tensor:
    """np.packbits over the last axis, undone: (..., tokens) bool."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1)[..., :tokens].astype(bool))


def attend(heads: Heads, mask: Tensor) -> Tensor:
    """Softmax attention over the mask: (H, N, d)."""
    groups = heads.query.shape[0] // heads.value.shape[0]
    logits = (heads.query @ heads.keys.transpose(1, 2)) * heads.scaling
    weights = logits.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return weights @ heads.value.repeat_interleave(groups, dim=0)
