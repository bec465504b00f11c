"""Measuring two things fairly: side by side, turn and turn about, on cold memory.

A machine's speed drifts by more than what is measured. So every ratio is the median over pairs that ran right after one
another, with its quartiles, the order of the candidates turns round in every round, and a pair of the same thing with
itself says how far ratios of equals stray. Weights are taken in turn from copies that together exceed the last-level
cache several times: else a sparse matrix sits in the cache, where in a real model the other layers would have been.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

Call = Callable[[int], object]  # gets the number of the call, to choose a copy by
Timer = Callable[[Call, int], float]  # seconds of a call with that number
T = TypeVar("T")

TIMES_CACHE = 5  # all copies together / last-level cache
STRAY = (0.9, 1.1)  # a median ratio of a thing with itself outside this: nothing can be concluded
_STACKED = 3  # own dense / plain read beyond this: threads share a core
_BEYOND = 1.1  # of the byte bound
NOTE = (
    "verdict: noisy, a base differs from itself by over 10%; stacked, threads share a core; "
    "error, faster than the bytes allow: a cached copy or a broken kernel. Only ok can be compared with anything."
)


@dataclass(frozen=True)
class Ratio:
    """Base time / candidate time: the median over pairs and its quartiles. Above 1: the candidate is faster."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """``seconds``: every time taken, by name; ``pairs``: (base, candidate) -> ratios."""

    seconds: dict[str, list[float]]
    pairs: dict[tuple[str, str], list[float]]

    def ratio(self, base: str, candidate: str) -> Ratio:
        """How much faster the candidate is than the base."""
        low, median, high = np.quantile(self.pairs[base, candidate], (0.25, 0.5, 0.75))
        return Ratio(float(median), float(low), float(high))

    def time(self, name: str) -> float:
        """Seconds of one call: the 20th percentile, what a quiet moment gives."""
        return float(np.quantile(self.seconds[name], 0.2))

    @property
    def noise(self) -> float:
        """Median ratio of a base with itself."""
        return min((self.ratio(a, b).median for a, b in self.pairs if a == b), key=lambda ratio: -abs(ratio - 1))

    def verdict(self, ratio: float | None = None, bound: float | None = None) -> str:
        """Whether a ratio can be believed (``NOTE``). ``ratio``: to our own dense kernel, ``bound``: dense bytes /
        bytes read. Looks at the times of ``own`` and ``read`` where there are any."""
        if not STRAY[0] <= self.noise <= STRAY[1]:
            return "noisy"
        if {"own", "read"} <= self.seconds.keys() and self.time("own") > _STACKED * self.time("read"):
            return "stacked"
        return "error" if ratio is not None and bound is not None and ratio > _BEYOND * bound else "ok"


def columns(measured: Measured, name: str, bases: Sequence[str]) -> dict[str, Any]:
    """Columns of a report: for each base ``vs_<base>``, the median ratio, and its quartiles; None where not paired."""
    found: dict[str, Any] = {}
    for base in bases:
        ratio = measured.ratio(base, name) if (base, name) in measured.pairs else None
        found[f"vs_{base}"] = ratio.median if ratio else None
        found[f"vs_{base}_quartiles"] = f"{ratio.low:.2f}-{ratio.high:.2f}" if ratio else None
    return found


def wall(call: Call, number: int) -> float:
    """Seconds by the clock, until a GPU has done what the call started on it."""
    gpu = torch.cuda.is_initialized()
    if gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    call(number)
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(bases: Mapping[str, Call], candidates: Mapping[str, Call], rounds: int, timer: Timer = wall) -> Measured:
    """Times every candidate in pairs with every base, ``rounds`` times, after two calls of each to warm up."""
    calls = {**bases, **candidates}
    for number in range(2):
        for call in calls.values():
            call(number)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    pairs = [(base, candidate) for candidate in candidates for base in bases]
    pairs += [(one, other) for at, one in enumerate(bases) for other in list(bases)[at:]]
    ratios: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    count = dict.fromkeys(calls, 2)
    for index in range(rounds):
        for pair in pairs if index % 2 == 0 else pairs[::-1]:
            taken = []
            for name in pair if index % 4 < 2 else pair[::-1]:
                taken.append(timer(calls[name], count[name]))
                seconds[name].append(taken[-1])
                count[name] += 1
            base, candidate = taken if index % 4 < 2 else taken[::-1]
            ratios[pair].append(base / candidate)
    return Measured(seconds, ratios)


def copies(item: T, size: int, clone: Callable[[T], T], cache: int | None = None) -> Sequence[T]:
    """``item`` (``size`` bytes) and clones of it that together are five times the last-level cache, at least two.
    ``cache``: its bytes, the processor's if not given."""
    count = max(2, -(-TIMES_CACHE * (cache_bytes() if cache is None else cache) // max(1, size)))
    return [item, *(clone(item) for _ in range(min(count, 4096) - 1))]


def cache_bytes() -> int:
    """The last-level cache; 32 MiB where the system does not say."""
    found = 0
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        found = max(found, int(text.rstrip("KM") or 0) * unit)
    return found or 32 << 20
