"""Where a benchmark runs, and how a call is timed there.

On a GPU a call takes less than its launch from Python: so calls are captured into CUDA graphs, many to a graph, each on
the next copy of its weights, and a replay is timed with events on the GPU.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsebench.costs import paired
from sparsebench.costs.paired import Call
from sparsebench.errors import UserError
from sparsebench.kernels import gpu, ops

T = TypeVar("T")

_LONG = 5e-3  # seconds: a graph holds so many calls that it takes this long
_MOST_CALLS = 64


@dataclass(frozen=True)
class Captured:
    """A graph of ``calls`` calls, replayed by calling it."""

    replay: Callable[[], None]
    calls: int

    def __call__(self, number: int) -> None:
        """Starts all of them, whatever ``number`` is."""
        self.replay()


@dataclass(frozen=True)
class Place:
    """The CPU or a GPU."""

    device: torch.device

    @classmethod
    def named(cls, device: str) -> Place:
        """``cpu`` or ``cuda``. UserError where there is no GPU, or nothing that could run on it."""
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("device=cuda: torch sees no GPU here; valid: cpu")
        if device == "cuda" and gpu.problem() is not None:
            raise UserError(f"device=cuda: the GPU kernels cannot run ({gpu.problem()}); valid: cpu")
        return cls(torch.device(device))

    @property
    def name(self) -> str:
        """The processor."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return platform.processor() or platform.machine()

    def copies(self, item: T, size: int, clone: Callable[[T], T]) -> Sequence[T]:
        """Copies that no cache holds (``paired.copies``)."""
        gpu_cache = torch.cuda.get_device_properties(self.device).L2_cache_size if self.device.type == "cuda" else None
        return paired.copies(item, size, clone, gpu_cache)

    def read(self, memory: Tensor) -> object:
        """Reads every byte of a contiguous tensor once."""
        return memory.view(torch.float32).sum() if self.device.type == "cuda" else ops.read(memory)

    def measure(self, bases: Mapping[str, Call], candidates: Mapping[str, Call], rounds: int) -> paired.Measured:
        """``paired.measure`` with this place's clock."""
        if self.device.type == "cpu":
            return paired.measure(bases, candidates, rounds)
        graphs = [{name: _captured(name, call) for name, call in calls.items()} for calls in (bases, candidates)]
        return paired.measure(graphs[0], graphs[1], rounds, _events)


def _captured(name: str, call: Call) -> Captured:
    """Warms up (kernels are compiled and tuned, which no graph can hold), then captures."""
    for number in range(2):
        call(number)
    calls = max(1, min(_MOST_CALLS, math.ceil(_LONG / max(1e-6, _events(call, 2)))))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for number in range(calls):
                call(number)
    except RuntimeError as error:
        raise UserError(
            f"device=cuda: {name} cannot be captured in a CUDA graph ({str(error).splitlines()[0]})"
        ) from error
    return Captured(graph.replay, calls)


def _events(call: Any, number: int) -> float:
    """Seconds of one call on the GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call(number)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / (call.calls if isinstance(call, Captured) else 1)
