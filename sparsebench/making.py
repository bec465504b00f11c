"""Making a sparse model: load, check that everything fits, apply the methods, audit what came out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sparsebench.config import Workspace
from sparsebench.errors import UserError
from sparsebench.run import Run

if TYPE_CHECKING:
    from torch import Tensor

    from sparsebench.audits import Achieved, Audit
    from sparsebench.methods.base import Applied, Attachment, Counted
    from sparsebench.models.base import LoadedModel
    from sparsebench.models.restoring import Original

Progress = Callable[[str, int, int], None]  # what, done, total
Named = tuple[str, Any]  # a method with its label


@dataclass
class SparseModel:
    """A model after its methods, with what was counted and checked on it."""

    id: str
    loaded: LoadedModel
    applied: Applied
    achieved: Achieved
    audits: list[Audit]
    warnings: list[str]
    seconds: float

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the methods of inference time act on the model and count what they skip."""
        with ExitStack() as stack:
            for attachment in self.applied.attachments:
                stack.enter_context(attachment.attached())
            yield

    def counted(self) -> list[tuple[Attachment, Counted]]:
        """Each method of inference time with what it did while the model last ran."""
        return [(attachment, attachment.counted()) for attachment in self.applied.attachments]


@dataclass
class Basis:
    """A loaded model with its weights as they were loaded, and what runs on it have in common.

    ``original``: a copy of those weights, made before the first run changes them, if they are few; ``shared``: what
    methods want to find again (``Surroundings.shared``)."""

    loaded: LoadedModel
    original: Original | None = None
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass
class Fitting:
    """A loaded model with the methods and the calibration windows that fit it: nothing a user can get
    wrong is left. ``made`` holds the sparse model once it was made; the model is changed in place.
    ``place``: which model it is, and where it is streamed to."""

    id: str
    place: tuple[str, str | None]
    basis: Basis
    families: list[tuple[Any, list[Named]]]
    windows: Tensor | None
    seed: int
    made: SparseModel | None = field(default=None)

    @property
    def loaded(self) -> LoadedModel:
        return self.basis.loaded

    def again(self, place: tuple[str, str | None]) -> Basis | None:
        """The model for the next sparse model, if it is the same one and its weights are those that were loaded: they
        were never changed, or could be put back."""
        if self.place != place:
            return None
        if self.made is None or not (self.made.applied.acts_on or self.made.applied.layers):
            return self.basis
        original = self.basis.original
        return self.basis if original is not None and original.restore(self.loaded.model) else None

    def check_prompts(self, task: Any, prepared: Any) -> None:
        """UserError when a method's options do not fit the task's prompts, where the task knows their lengths
        (``prompts``) and the family cares (``check_prompts``)."""
        if not hasattr(task, "prompts"):
            return
        for family, stack in self.families:
            if hasattr(family, "check_prompts"):
                family.check_prompts(stack, self.loaded.model, task.prompts(prepared))

    def make(self, progress: Progress) -> SparseModel:
        """The sparse model, made on the first call."""
        if self.made is None:
            try:
                self.made = self._make(progress)
            except BaseException:
                self.loaded.discard()
                raise
        return self.made

    def _make(self, progress: Progress) -> SparseModel:
        from sparsebench import audits
        from sparsebench.costs.timing import stopwatch
        from sparsebench.methods.base import Applied, Surroundings
        from sparsebench.models.restoring import Original

        model, read = self.loaded.model, self.loaded.values
        before = audits.fingerprint(model, read)
        if self.place[1] is None and self.basis.original is None:
            self.basis.original = Original.of(model)
        around = Surroundings(self.loaded, self._calibration, self.seed, partial(progress, "sparsify"))
        applied = Applied()
        with stopwatch() as watch:
            for index, (family, stack) in enumerate(self.families):
                # only the first family finds the weights as they were loaded
                fresh = index == 0 and self.basis.original is not None
                applied.add(family.apply(stack, replace(around, shared=self.basis.shared if fresh else None)))
        achieved = audits.count(model, applied, read)
        unchanged = not achieved.asked and not applied.rewritten
        checks = audits.audit(model, applied, achieved, before, unchanged, read)
        warnings = list(audits.findings(model, applied, achieved))
        return SparseModel(self.id, self.loaded, applied, achieved, checks, warnings, watch.seconds)

    def _calibration(self) -> Tensor:
        if self.windows is None:
            raise ValueError("a method asked for calibration data without declaring that it uses it")
        return self.windows


def fit(workspace: Workspace, run: Run, model_id: str, basis: Basis, drawn: dict[str, Tensor]) -> Fitting:
    """Builds the methods and draws the calibration windows (``drawn`` keeps them for other runs).
    UserError when they do not fit the model."""
    methods = [(p.label, workspace.catalogue.load("method", p.name)(**p.options)) for p in run.methods]
    windows = None
    if run.calibration is not None:
        key = str((run.model, run.calibration, run.options.seed))
        if key not in drawn:
            corpus = workspace.catalogue.load("corpus", run.calibration.name)(**run.calibration.options)
            drawn[key] = corpus.windows(basis.loaded.tokenizer, basis.loaded.context, run.options.seed)
        windows = drawn[key]
    families = _families(workspace, run, methods)
    for label, method in methods if run.options.streamed else []:
        if not getattr(method, "blockwise", False):
            raise UserError(f"streamed=true: method={label}, as asked, needs more than one block in memory at a time")
    for family, stack in families:
        family.check(stack, basis.loaded.model)
    return Fitting(model_id, place_of(run), basis, families, windows, run.options.seed)


def place_of(run: Run) -> tuple[str, str | None]:
    """Which model a run begins with, and where that is streamed to."""
    return str(run.model), run.options.save if run.options.streamed else None


def _families(workspace: Workspace, run: Run, methods: list[Named]) -> list[tuple[Any, list[Named]]]:
    """The methods gathered by target, in order of first appearance, each with its family's package."""
    stacks: dict[str, list[Named]] = {}
    for part, method in zip(run.methods, methods, strict=True):
        stacks.setdefault(workspace.catalogue.get("method", part.name).target, []).append(method)
    return [(importlib.import_module(f"sparsebench.methods.{target}"), stack) for target, stack in stacks.items()]
