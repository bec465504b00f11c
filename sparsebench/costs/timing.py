"""Measured cost: wall time and peak memory of a block of code.

Both measure what really ran. A masked model run by dense kernels costs as much as the dense one: these
numbers say so, and the theoretical saving is in ``flops`` and ``storage``.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_PROC = Path("/proc/self")
_POLL = 0.005  # seconds between two looks at the resident set, where it must be polled


class Stopwatch:
    """Context manager: ``seconds`` of wall time, waiting for the GPUs at both ends. NaN before the block ends."""

    def __init__(self) -> None:
        self.seconds = float("nan")

    def __enter__(self) -> Self:
        _synchronize()
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:  # after a CUDA error a wait would raise again and hide the first
            _synchronize()
        self.seconds = time.perf_counter() - self._start


def stopwatch() -> Stopwatch:
    """``with stopwatch() as watch: ...; watch.seconds``."""
    return Stopwatch()


class Peak:
    """Context manager: ``bytes``, the most memory held at once during the block, and ``how`` it was measured.

    On CUDA (``device="cuda"``): most bytes that tensors held, by PyTorch's allocator, summed over all GPUs
    (each at its own worst moment); memory of other libraries and the allocator's cache are not in it.
    Elsewhere: the largest resident set of this whole process, so interpreter, libraries and whatever was
    loaded before count too. ``how`` is one of

    - ``cuda allocator``;
    - ``resident set``: the kernel's own high-water mark, reset at the start (Linux): exact;
    - ``resident set, polled``: looked at every 5 ms where it cannot be reset: a shorter peak may be missed;
    - ``lifetime resident set``: no /proc (macOS): the peak since the process began, an upper bound;
    - ``unknown``: the system tells nothing (Windows); ``bytes`` is None.

    Resets a counter of the whole process: do not nest two, nor run two at once in threads.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.bytes: int | None = None
        self.how = "unknown"
        self._cuda = torch.device(device).type == "cuda"

    def __enter__(self) -> Self:
        self._poller: _Poller | None = None
        if self._cuda:
            self.how = "cuda allocator"
            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)
        elif _reset_high_water():
            self.how = "resident set"
        elif (_PROC / "statm").exists():
            self.how, self._poller = "resident set, polled", _Poller()
            self._poller.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._cuda:
            self.bytes = sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
        elif self._poller is not None:
            self.bytes = self._poller.stop()
        elif self.how == "resident set":
            self.bytes = _status("VmHWM")
        else:
            self.bytes = _lifetime_peak()
            self.how = self.how if self.bytes is None else "lifetime resident set"


class _Poller(threading.Thread):
    """Remembers the largest resident set it sees until stopped."""

    def __init__(self) -> None:
        super().__init__(name="peak-memory", daemon=True)
        self._done = threading.Event()
        self._most = _resident()

    def run(self) -> None:
        while not self._done.wait(_POLL):
            self._most = max(self._most, _resident())

    def stop(self) -> int:
        self._done.set()
        self.join()
        return max(self._most, _resident())


def _reset_high_water() -> bool:
    """Asks Linux to forget the peak (proc(5), clear_refs 5). False where it may not or does not."""
    try:
        (_PROC / "clear_refs").write_text("5", encoding="ascii")
        most, now = _status("VmHWM"), _status("VmRSS")
    except (OSError, KeyError):  # not Linux, not permitted, or a sandbox's partial /proc: the caller polls
        return False
    return most <= now * 1.05 + (1 << 20)  # some sandboxes accept the write and ignore it


def _status(field: str) -> int:
    """Bytes of a memory field of /proc/self/status. KeyError if it is not there."""
    for line in (_PROC / "status").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def _resident() -> int:
    """Bytes of this process in memory now."""
    import resource

    return int((_PROC / "statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def _lifetime_peak() -> int | None:
    """Largest resident set since the process began (KiB on Linux and BSD, bytes on macOS), None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    most = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return most if sys.platform == "darwin" else most * 1024


def _synchronize() -> None:
    """Waits for every GPU that this process uses; starts none."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
