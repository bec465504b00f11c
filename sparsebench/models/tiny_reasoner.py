"""The tiny reasoner: embedded like the ladder, it writes its steps before it answers."""

from __future__ import annotations

from dataclasses import dataclass

from sparsebench.declare import model, option
from sparsebench.models.embedded import Ladder


@model(name="tiny_reasoner", version=1, calibration="chains")
@dataclass(frozen=True)
class TinyReasoner(Ladder):
    """Three tiny layers taught arithmetic, rules, timelines and facts with chains of thought."""

    rung: str = option("tiny_reasoner", "the one model there is", choices=("tiny_reasoner",))
