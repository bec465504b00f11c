"""How a kernel is started: tuned by timing on a GPU, in its first configuration in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl

from sparsebench.kernels.gpu import interpreted

INTERPRETED = interpreted()
_ENOUGH = 2  # programs per multiprocessor that keep the memory busy


class Tuned:
    """A kernel with configurations, the best of which is found at the first call for every new ``key`` of argument
    names. A configuration: (its constants, warps, stages)."""

    def __init__(self, kernel: Any, key: Sequence[str], *configurations: tuple[Mapping[str, int], int, int]) -> None:
        self.kernel, self.key, self.configurations = kernel, list(key), configurations

    def __call__(self, grid: tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]], **arguments: Any) -> None:
        """Starts it; ``grid`` may depend on the constants."""
        if INTERPRETED:  # there is no driver to time with
            self.kernel[grid](**arguments, **self.configurations[0][0])
        else:
            self._tuner[grid](**arguments)

    @cached_property
    def _tuner(self) -> Any:
        configs = [triton.Config(dict(one), num_warps=warps, num_stages=stages) for one, warps, stages in self._all]
        return triton.autotune(configs=configs, key=self.key)(self.kernel)

    @property
    def _all(self) -> Sequence[tuple[Mapping[str, int], int, int]]:
        return self.configurations


def splits(programs: int, steps: int, device: torch.device, most: int = 16) -> int:
    """Into how many parts the sums should be cut so that ``programs`` times that fill the device: ``steps`` or
    ``most`` at most.
    The same for every call with the same shapes, so that results do not change by a bit from call to call."""
    if device.type != "cuda":
        return min(2, max(1, steps))
    units = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(most, steps, -(-_ENOUGH * units // max(1, programs))))


@triton.jit
def add_parts(parts, bias, out, count, wide, columns, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out (wide = rows * columns) = the sum of ``parts`` (count, wide) float32, in order, plus bias (columns)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < wide
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(count):
        total += tl.load(parts + part * wide + at, mask=live, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % columns, mask=live, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live)


def add(parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Sums ``parts`` (parts, rows, columns) float32 into ``out`` (rows, columns), plus ``bias`` (columns)."""
    count, columns = len(parts), parts.shape[-1]
    add_parts[(triton.cdiv(out.numel(), 256),)](
        parts, parts if bias is None else bias, out, count, out.numel(), columns, HAS_BIAS=bias is not None, BLOCK=256
    )
