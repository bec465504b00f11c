"""The pair-token recall model: embedded like the ladder, for methods that drop, merge or select cached tokens."""

from __future__ import annotations

from dataclasses import dataclass

from sparsebench.declare import model, option
from sparsebench.models.embedded import Ladder


@model(name="pair_recall", version=1, calibration="recall")
@dataclass(frozen=True)
class PairRecall(Ladder):
    """Two tiny layers that recall facts of one token each: what a cache loses, it cannot answer."""

    rung: str = option("pair_recall", "the one model there is", choices=("pair_recall",))
