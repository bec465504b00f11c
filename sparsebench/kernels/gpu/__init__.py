"""Kernels for GPU tensors, written in Triton: one source for every card, and Triton's interpreter on the CPU in tests.

Nothing here imports Triton until a kernel is about to run, so that the package works without it; ``problem`` says why
the kernels cannot run, and then the torch reference does their work.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights and inputs, always the same for both
_LEAST = (8, 0)  # compute capability: bfloat16 in the tensor cores


@cache
def problem() -> str | None:
    """Why no Triton kernel can run here, or None."""
    try:
        import triton
    except ImportError as error:
        return f"no triton: {error}"
    del triton
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no GPU"
    old = torch.version.hip is None and torch.cuda.get_device_capability() < _LEAST
    return f"compute capability below {_LEAST[0]}.{_LEAST[1]}" if old else None


def status() -> str:
    """What runs on GPU tensors: ``triton 3.9.0``, or ``reference (why)``."""
    why = problem()
    if why is not None:
        return f"reference ({why})"
    import triton

    return f"triton {triton.__version__}" + (" (interpreted)" if interpreted() else "")


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def largest_dim(dtype: torch.dtype) -> int:
    """Of a head whose keys and values fit the shared memory of every card that the kernels are for (99 kB)."""
    return 128 if dtype == torch.float32 else 256


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors: on the GPU (or any, interpreted), of one of ``DTYPES``, all the same,
    and nobody wants gradients. What is None is passed over."""
    given = [tensor for tensor in tensors if tensor is not None]
    fits = all(one.dtype == given[0].dtype and one.device == given[0].device for one in given)
    wanted = torch.is_grad_enabled() and any(one.requires_grad for one in given)
    there = given[0].device.type == "cuda" or interpreted()
    return fits and given[0].dtype in DTYPES and not wanted and there and problem() is None
