"""Masks as bits, on any device: eight to a byte, the first of them the lowest bit."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bits(kept: Tensor) -> Tensor:
    """(..., 8 n) bool -> (..., n) uint8."""
    eights = kept.reshape(*kept.shape[:-1], kept.shape[-1] // 8, 8).to(torch.uint8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=kept.device)).sum(-1, dtype=torch.uint8)


def unpacked_bits(octets: Tensor) -> Tensor:
    """(..., n) uint8 -> (..., 8 n) bool."""
    shifted = octets[..., None] >> torch.arange(8, dtype=torch.uint8, device=octets.device)
    return (shifted & 1).bool().flatten(-2)
