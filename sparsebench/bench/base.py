"""What every benchmark hands back, and how it is given its threads.

Threads that wait for each other by spinning were seen to share one core for minutes, while another was idle: every
call, torch's too, then takes as long as the scheduler's slice. So ``bound`` starts them tied to cores, and ``spread``
says whether they are on different ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Say = Callable[[str], None]  # one line of progress, for stderr

_READ, _TIMES = 256 << 20, 7  # bytes, beyond any cache; pairs of reads
_SPREAD = 1.2  # gain below which threads share a core


@dataclass(frozen=True)
class Report:
    """``rows``: one flat mapping per line of the table, the same keys in each; ``facts``: what holds for all of
    them (machine, threads, versions); ``notes``: sentences that a reader of the numbers needs."""

    rows: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def bound() -> None:
    """Loads torch so that its threads stay on their cores; too late once it is loaded. A setting of the user's own
    (OMP_PROC_BIND) holds."""
    before = os.environ.get("OMP_PROC_BIND")
    os.environ.setdefault("OMP_PROC_BIND", "true")
    try:
        import torch  # noqa: F401 (OpenMP reads the setting when it is loaded)
    finally:
        if before is None:  # not for child processes: they would all be tied to the same core
            del os.environ["OMP_PROC_BIND"]


def spread(count: int) -> dict[str, Any]:
    """Facts about ``count`` threads, for a report: how many there are and, of several, how much faster they read memory
    than one does. Near 1 they share a core."""
    if count == 1:
        return {"threads": 1}
    import torch

    from sparsebench.costs.paired import wall
    from sparsebench.kernels import ops

    memory = torch.ones(_READ // 4)
    times: dict[int, list[float]] = {1: [], count: []}
    for _ in range(_TIMES):
        for each, taken in times.items():
            with threads(each):
                taken.append(wall(lambda number: ops.read(memory), 0))
    gain = median(a / b for a, b in zip(*times.values(), strict=True))
    return {"threads": count, "threads_gain": round(gain, 2)}


def judged(rows: list[dict[str, Any]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, whose verdicts are ``stacked`` where the threads gained nothing."""
    if facts.get("threads_gain", _SPREAD) >= _SPREAD:
        return rows
    return [row | {"verdict": "stacked"} for row in rows]


def checked(name: str, got: object, right: Tensor) -> None:
    """RuntimeError when a kernel's result is not ``right`` within 0.05: a wrong kernel is not timed."""
    import torch

    error = float((got.float() - right).abs().max()) if isinstance(got, torch.Tensor) else float("inf")
    if not error < 0.05:
        raise RuntimeError(f"{name}: wrong by {error:.2g}; not timed")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch and the kernels run on ``count`` CPU threads; afterwards on as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
