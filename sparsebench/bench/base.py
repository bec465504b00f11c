"""What every benchmark hands back, and how it is given its threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Say = Callable[[str], None]  # one line of progress, for stderr


@dataclass(frozen=True)
class Report:
    """``rows``: one flat mapping per line of the table, the same keys in each; ``facts``: what holds for all of
    them (machine, threads, versions); ``notes``: sentences that a reader of the numbers needs."""

    rows: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


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
