"""Counting bits inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ones(word):
    """Set bits of each uint32, as int32. The compiler knows this pattern and makes one instruction of it; the library's
    own popcount does not run in the interpreter."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def below(bit):
    """uint32 with all bits below ``bit`` (0 to 31) set."""
    return (tl.full(bit.shape, 1, tl.uint32) << bit.to(tl.uint32)) - 1


@triton.jit
def halves(word):
    """The low and the high half of int64 mask words, as uint32: 64-bit integers are slow on GPUs."""
    return word.to(tl.uint32), (word >> 32).to(tl.uint32)
