"""What every family of methods hands back, and what a family is given to work with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from sparsebench.costs.saving import NO_SAVING, Saving
from sparsebench.errors import UserError
from sparsebench.models.base import LoadedModel


@dataclass
class LayerReport:
    """What a method did to one layer. ``pruned`` counts the entries its mask removed, ``spare`` the
    zeros among the entries it kept, ``total`` the entries of its scope. ``stores_zeros``: those zeros are stored
    like any value (codes of a quantised group), so they are no sparsity."""

    layer: str
    method: str
    total: int
    pruned: int
    spare: int
    asked: float | None
    pattern: str = "unstructured"
    stores_zeros: bool = False


@dataclass(frozen=True)
class Counted:
    """What a method of inference time did during one evaluation.

    ``acted``: its hooks were called; ``achieved``: what was really skipped, over its scope; ``rows``: one flat
    mapping per layer or head group (``layer``, ``method``, ``asked``, ``pattern``, ``achieved``, ``zeros``,
    ``total``); ``columns``: more columns of the record; ``saving``: its costs."""

    acted: bool
    achieved: float
    rows: list[dict[str, object]] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    saving: Saving = NO_SAVING
    warnings: list[str] = field(default_factory=list)


class Attachment(Protocol):
    """A method of inference time, fitted to one model: it acts while it is attached, and counts."""

    method: str
    target: str
    asked: float | None  # the sparsity that was asked for; None or 0: nothing
    tolerance: float  # how far achieved may lie from it before the run is flagged

    def attached(self) -> AbstractContextManager[None]:
        """Acts inside the context, which starts counting anew; outside the model is as it was."""
        ...

    def counted(self) -> Counted:
        """What was counted inside the last context."""
        ...

    def fitted(self) -> dict[str, Tensor]:
        """What was learned from calibration data (thresholds, gates), to be saved with the model; {} for nothing."""
        ...


@dataclass
class Applied:
    """The result of applying a stack: per-layer counts, the stated tolerance, warnings, extra columns.

    ``acts_on``: names of the parameters that were allowed to change; ``rewritten``: weights that stay may have changed
    although nothing was removed; ``attachments``: what acts while the model runs."""

    attachments: list[Attachment] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    acts_on: set[str] = field(default_factory=set)
    rewritten: bool = False
    tolerance: float = 1e-9
    warnings: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Applied) -> None:
        """Joins what another family of the stack did."""
        self.attachments += other.attachments
        self.layers += other.layers
        self.acts_on |= other.acts_on
        self.rewritten |= other.rewritten
        self.tolerance = max(self.tolerance, other.tolerance)
        self.warnings += other.warnings
        self.notes |= other.notes


@dataclass
class Surroundings:
    """What methods may use: the model, calibration windows ((sequences, tokens) int64, made on first
    use), the run's seed, a progress callback (done, total), and a place for what a family wants to find again in
    the next run on the same model, which begins on the same weights (None: nothing is kept)."""

    loaded: LoadedModel
    calibration: Callable[[], Tensor]
    seed: int
    progress: Callable[[int, int], None] = lambda done, total: None
    shared: dict[str, Any] | None = None


def read_tensors(where: str, file: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. UserError beginning with ``where``, which names the option with its value."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(Path(file).expanduser())
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{where}: not a readable safetensors file ({' '.join(str(error).split())})") from None
    return found
