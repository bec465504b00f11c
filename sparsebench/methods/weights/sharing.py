"""What runs on one model have in common: how data reaches its first block, and statistics of the dense model.

In front of the first block no run has changed anything yet, so its inputs, and the statistics of that block while it
is dense, are the same at every level; under order ``none`` those of all blocks are. They are kept up to a limit of
bytes; what is not kept is made again. No result depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from sparsebench.methods.weights.statistics import Several, Statistic
from sparsebench.models.blocks import BlockInputs, Blocks, capture

ROOM = 1 << 30  # bytes, of statistics and of hidden states

Makers = Mapping[str, Callable[[], Statistic]]


@dataclass
class Shared:
    """Kept from one walk to the next. Valid only while every walk that is given it begins on the same dense weights.

    ``room``: bytes that may be kept, 0 for nothing."""

    room: int = ROOM
    windows: Tensor | None = None
    model: nn.Module | None = None
    front: BlockInputs | None = None
    statistics: dict[tuple[Hashable, str], Statistic] = field(default_factory=dict)

    def about(self, windows: Tensor) -> None:
        """Forgets what was made of other data."""
        if self.windows is not windows:
            self.windows, self.front = windows, None
            self.statistics.clear()

    def inputs(self, blocks: Blocks, windows: Tensor) -> BlockInputs:
        """Hidden states in front of the first block, as ``capture`` gives them; the caller may advance them."""
        if self.front is None or self.model is not blocks.model:
            made = capture(blocks, windows)
            if sum(group.nbytes for group in made.hidden) > self.room:
                return made
            self.model, self.front = blocks.model, made
        return replace(self.front, hidden=blocks.hold(self.front.hidden))

    def known(self, makers: Makers, names: Iterable[str]) -> dict[str, Several] | None:
        """The statistics of these layers of the dense model by layer; None unless all are known."""
        found = {}
        for name in names:
            parts = {method: self.statistics.get((_key(make), name)) for method, make in makers.items()}
            if any(part is None for part in parts.values()):
                return None
            found[name] = Several({method: part for method, part in parts.items() if part is not None})
        return found

    def remember(self, makers: Makers, found: Mapping[str, Several]) -> None:
        """Keeps statistics that were gathered of the dense model, by layer, while there is room."""
        used = {id(one): one for one in self.statistics.values()}
        new = {id(part): part for several in found.values() for part in several.parts.values()}
        if sum(map(_bytes, (used | new).values())) > self.room or None in map(_key, makers.values()):
            return
        for name, several in found.items():
            for method, make in makers.items():
                self.statistics[_key(make), name] = several.parts[method]


def _key(make: Callable[[], Statistic]) -> Hashable:
    """What tells makers of different statistics apart: a class, or a partial call of one; None if that is unknown."""
    if isinstance(make, partial):
        return (make.func, make.args, tuple(sorted(make.keywords.items())))
    return make if isinstance(make, type) else None


def _bytes(statistic: Any) -> int:
    """Bytes of the tensors of a statistic, twice: some make a second one of their size when they are used."""
    return 2 * sum(value.nbytes for value in vars(statistic).values() if isinstance(value, Tensor))
