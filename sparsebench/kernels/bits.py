"""Bits, on any device: masks with eight to a byte, the first of them the lowest bit, and the bits of numbers."""

from __future__ import annotations

import torch
from torch import Tensor

_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of a tensor as whole numbers of the same size and shape, sharing its memory."""
    return tensor.view(_OF_SIZE[tensor.element_size()])


def packed_bits(kept: Tensor) -> Tensor:
    """(..., 8 n) bool -> (..., n) uint8."""
    eights = kept.reshape(*kept.shape[:-1], kept.shape[-1] // 8, 8).to(torch.uint8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=kept.device)).sum(-1, dtype=torch.uint8)


def unpacked_bits(octets: Tensor) -> Tensor:
    """(..., n) uint8 -> (..., 8 n) bool."""
    shifted = octets[..., None] >> torch.arange(8, dtype=torch.uint8, device=octets.device)
    return (shifted & 1).bool().flatten(-2)
