"""What every family of methods hands back, and what a family is given to work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparsebench.models.base import LoadedModel


@dataclass
class LayerReport:
    """What a method did to one layer. ``pruned`` counts the entries its mask removed, ``spare`` the
    zeros among the entries it kept, ``total`` the entries of its scope."""

    layer: str
    method: str
    total: int
    pruned: int
    spare: int
    asked: float | None
    pattern: str = "unstructured"


@dataclass
class Applied:
    """The result of applying a stack: per-layer counts, the stated tolerance, warnings, extra columns.

    ``acts_on``: names of the parameters that were allowed to change."""

    layers: list[LayerReport] = field(default_factory=list)
    acts_on: set[str] = field(default_factory=set)
    tolerance: float = 1e-9
    warnings: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Applied) -> None:
        """Joins what another family of the stack did."""
        self.layers += other.layers
        self.acts_on |= other.acts_on
        self.tolerance = max(self.tolerance, other.tolerance)
        self.warnings += other.warnings
        self.notes |= other.notes


@dataclass
class Surroundings:
    """What methods may use: the model, calibration windows ((sequences, tokens) int64, made on first
    use), the run's seed, and a progress callback (done, total)."""

    loaded: LoadedModel
    calibration: Callable[[], Tensor]
    seed: int
    progress: Callable[[int, int], None] = lambda done, total: None
