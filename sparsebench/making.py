"""Making a sparse model: load, check that everything fits, apply the methods, audit what came out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from sparsebench.config import Workspace
from sparsebench.run import Run

if TYPE_CHECKING:
    from torch import Tensor

    from sparsebench.audits import Achieved, Audit
    from sparsebench.methods.base import Applied, Attachment, Counted
    from sparsebench.models.base import LoadedModel

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
class Fitting:
    """A loaded model with the methods and the calibration windows that fit it: nothing a user can get
    wrong is left. ``made`` holds the sparse model once it was made; the model is changed in place.
    ``model``: which model it is, so that one whose weights nobody changed serves the next sparse model too."""

    id: str
    model: str
    loaded: LoadedModel
    families: list[tuple[Any, list[Named]]]
    windows: Tensor | None
    seed: int
    made: SparseModel | None = field(default=None)

    @property
    def untouched(self) -> bool:
        """Whether the model's weights are as they were loaded."""
        return self.made is None or not (self.made.applied.acts_on or self.made.applied.layers)

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
            self.made = self._make(progress)
        return self.made

    def _make(self, progress: Progress) -> SparseModel:
        from sparsebench import audits
        from sparsebench.costs.timing import stopwatch
        from sparsebench.methods.base import Applied, Surroundings

        model = self.loaded.model
        before = audits.fingerprint(model)
        around = Surroundings(self.loaded, self._calibration, self.seed, partial(progress, "sparsify"))
        applied = Applied()
        with stopwatch() as watch:
            for family, stack in self.families:
                applied.add(family.apply(stack, around))
        achieved = audits.count(model, applied)
        unchanged = not achieved.asked and not applied.notes.get("recovery_steps")
        checks = audits.audit(model, applied, achieved, before, unchanged)
        warnings = list(audits.findings(model, applied, achieved))
        return SparseModel(self.id, self.loaded, applied, achieved, checks, warnings, watch.seconds)

    def _calibration(self) -> Tensor:
        if self.windows is None:
            raise ValueError("a method asked for calibration data without declaring that it uses it")
        return self.windows


def fit(workspace: Workspace, run: Run, model_id: str, loaded: LoadedModel, drawn: dict[str, Tensor]) -> Fitting:
    """Builds the methods and draws the calibration windows (``drawn`` keeps them for other runs).
    UserError when they do not fit the model."""
    methods = [(p.label, workspace.catalogue.load("method", p.name)(**p.options)) for p in run.methods]
    windows = None
    if run.calibration is not None:
        key = str((run.model, run.calibration, run.options.seed))
        if key not in drawn:
            corpus = workspace.catalogue.load("corpus", run.calibration.name)(**run.calibration.options)
            drawn[key] = corpus.windows(loaded.tokenizer, loaded.context, run.options.seed)
        windows = drawn[key]
    families = _families(workspace, run, methods)
    for family, stack in families:
        family.check(stack, loaded.model)
    return Fitting(model_id, str(run.model), loaded, families, windows, run.options.seed)


def _families(workspace: Workspace, run: Run, methods: list[Named]) -> list[tuple[Any, list[Named]]]:
    """The methods gathered by target, in order of first appearance, each with its family's package."""
    stacks: dict[str, list[Named]] = {}
    for part, method in zip(run.methods, methods, strict=True):
        stacks.setdefault(workspace.catalogue.get("method", part.name).target, []).append(method)
    return [(importlib.import_module(f"sparsebench.methods.{target}"), stack) for target, stack in stacks.items()]
