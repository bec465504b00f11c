"""One run, end to end: model -> sparse model -> audits -> scores -> costs -> record.

Everything a user can get wrong is found before the store is touched; whatever fails after that
leaves a record that says what happened.
"""

from __future__ import annotations

import importlib
import platform
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsebench import __version__
from sparsebench.config import Workspace
from sparsebench.errors import UserError
from sparsebench.results.store import Store
from sparsebench.run import Run

if TYPE_CHECKING:
    from sparsebench.audits import Achieved, Audit
    from sparsebench.methods.base import Applied
    from sparsebench.models.base import LoadedModel
    from sparsebench.tasks.base import Outcome

Progress = Callable[[str, int, int], None]  # what, done, total


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


@dataclass
class Experiment:
    """Runs runs. The last sparse model is kept, so that the tasks of one model share it."""

    workspace: Workspace
    store: Store
    progress: Progress = lambda what, done, total: None
    kept: SparseModel | None = None
    saved: set[tuple[str, str]] = field(default_factory=set)  # (folder, sparse model id), written by this object
    clock: Callable[[], float] = field(default=time.perf_counter)

    def check(self, runs: Sequence[Run]) -> None:
        """UserError when any of the runs is bad input, so that a grid starts whole or not at all.

        Each model that is needed is loaded once for this. What the store answers is not checked again.
        """
        pending: dict[str, list[Run]] = {}
        for run in runs:
            loader = self._loader(run)
            content = loader.content()
            self._check_save(run, run.sparse_model_id(content))
            if run.options.force or not self._answer(run.run_id(content)):
                pending.setdefault(str(run.model), []).append(run)
        for group in pending.values():
            loaded = self._loader(group[0]).load()
            for run in {str((run.methods, run.calibration, run.seed)): run for run in group}.values():
                self._fitting(run, loaded)
            for run in {str(run.task): run for run in group}.values():
                self._task(run).prepare(loaded, partial(self.workspace.catalogue.load, "corpus"))

    def run(self, run: Run) -> dict[str, Any]:
        """The run's record: from the store if it is there, else made now. UserError on bad input."""
        loader = self._loader(run)
        content = loader.content()
        model_id, run_id = run.sparse_model_id(content), run.run_id(content)
        self._check_save(run, model_id)
        known = self._answer(run_id)
        if known and not run.options.force:
            if run.options.save:
                self._save(run, self._sparse_model(run, model_id, loader))
            return known
        task = self._task(run)
        sparsify = self._prepared(run, model_id, loader)
        prepared = task.prepare(sparsify.keywords["loaded"], partial(self.workspace.catalogue.load, "corpus"))
        return self._recorded(run, model_id, run_id, sparsify, task, prepared)

    def _loader(self, run: Run) -> Any:
        return self.workspace.catalogue.load("model", run.model.name)(**run.model.options)

    def _task(self, run: Run) -> Any:
        return self.workspace.catalogue.load("task", run.task.name)(**run.task.options)

    def _answer(self, run_id: str) -> dict[str, Any] | None:
        known = self.store.find(run_id)
        return known if known and known["status"] == "ok" else None

    def _recorded(
        self, run: Run, model_id: str, run_id: str, sparsify: partial[SparseModel], task: Any, prepared: Any
    ) -> dict[str, Any]:
        """Sparsifies, evaluates and measures between the record's two lines."""
        from sparsebench.costs.timing import Peak

        attempt = self.store.begin(run_id, _identity(run, model_id))
        fields: dict[str, Any] = {}
        layers: list[dict[str, Any]] = []
        samples: list[dict[str, Any]] = []
        started = self.clock()
        try:
            with Peak(sparsify.keywords["device"]) as peak:
                sparse = self.kept = sparsify()
                fields |= _sparsity(sparse)
                layers = sparse.achieved.layers
                outcome = self._evaluate(run, sparse, task, prepared)
            samples = outcome.samples
            fields |= _scores(run, self.workspace, outcome) | _costs(sparse, outcome)
            fields |= {"peak_memory_bytes": peak.bytes, "seconds": self.clock() - started}
            fields["seconds_evaluate"] = fields["seconds"] - (0.0 if sparsify.func is _again else sparse.seconds)
            problem = _problem(sparse, outcome)
            if run.options.save:
                self._save(run, sparse)
        except KeyboardInterrupt:
            attempt.finish("lost", fields | {"error": "interrupted"}, layers=layers, config=run.to_dict())
            raise
        except Exception as error:  # whatever goes wrong in a run is its record's business
            self.kept = None
            fields |= {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            trace = traceback.format_exc()
            return attempt.finish("failed", fields, layers=layers, config=run.to_dict(), error=trace)
        status = "failed" if problem else "ok"
        fields |= {"error": problem} if problem else {}
        return attempt.finish(status, fields, layers=layers, samples=samples, config=run.to_dict(), error=problem)

    def _prepared(self, run: Run, model_id: str, loader: Any) -> partial[SparseModel]:
        """What will make (or already has) the sparse model, after everything a user can get wrong."""
        if self.kept and self.kept.id == model_id:
            return partial(_again, sparse=self.kept, loaded=self.kept.loaded, device=self.kept.loaded.device)
        self.kept = None  # its memory is needed
        if run.options.threads:
            import torch

            torch.set_num_threads(run.options.threads)
        loaded = loader.load()
        methods, windows = self._fitting(run, loaded)
        return partial(
            _sparsify,
            self.workspace,
            run,
            model_id,
            loaded=loaded,
            methods=methods,
            windows=windows,
            progress=self.progress,
            device=loaded.device,
        )

    def _fitting(self, run: Run, loaded: LoadedModel) -> tuple[list[tuple[str, Any]], Any]:
        """The methods and the calibration windows. UserError when they do not fit the model."""
        methods = [(part.label, self._build(part.name, part.options)) for part in run.methods]
        windows = self._calibration(run, loaded)
        for family, stack in _families(self.workspace, run, methods):
            family.check(stack, loaded.model)
        return methods, windows

    def _build(self, name: str, options: dict[str, Any]) -> Any:
        return self.workspace.catalogue.load("method", name)(**options)

    def _calibration(self, run: Run, loaded: LoadedModel) -> Any:
        if run.calibration is None:
            return None
        corpus = self.workspace.catalogue.load("corpus", run.calibration.name)(**run.calibration.options)
        return corpus.windows(loaded.tokenizer, loaded.context, run.options.seed)

    def _evaluate(self, run: Run, sparse: SparseModel, task: Any, prepared: Any) -> Outcome:
        from sparsebench.tasks.base import Evaluation

        how = Evaluation(run.options.batch_size, partial(self.progress, "evaluate"))
        outcome: Outcome = task.evaluate(sparse.loaded, how, prepared)
        return outcome

    def _sparse_model(self, run: Run, model_id: str, loader: Any) -> SparseModel:
        self.kept = self._prepared(run, model_id, loader)()
        return self.kept

    def _check_save(self, run: Run, model_id: str) -> None:
        from sparsebench.models.saving import check_folder

        if run.options.save and (run.options.save, model_id) not in self.saved:
            check_folder(Path(run.options.save))

    def _save(self, run: Run, sparse: SparseModel) -> None:
        """Writes the sparse model, once for all of its tasks."""
        from sparsebench.models.saving import save_model

        place = (str(run.options.save), sparse.id)
        if place in self.saved:
            return
        notes = {"sparse_model_id": sparse.id, "achieved": sparse.achieved.scope, "run": run.to_dict()}
        save_model(sparse.loaded, Path(place[0]), notes)
        self.saved.add(place)


def _again(sparse: SparseModel, **_: Any) -> SparseModel:
    return sparse


def _families(
    workspace: Workspace, run: Run, methods: list[tuple[str, Any]]
) -> list[tuple[Any, list[tuple[str, Any]]]]:
    """The stack cut where the target changes, each piece with its family's module."""
    targets = [workspace.catalogue.get("method", part.name).target for part in run.methods]
    paired = list(zip(targets, methods, strict=True))
    pieces = [(target, [method for _, method in group]) for target, group in groupby(paired, key=lambda pair: pair[0])]
    return [(importlib.import_module(f"sparsebench.methods.{target}"), stack) for target, stack in pieces]


def _sparsify(
    workspace: Workspace,
    run: Run,
    model_id: str,
    *,
    loaded: LoadedModel,
    methods: list[tuple[str, Any]],
    windows: Any,
    progress: Progress,
    device: Any,
) -> SparseModel:
    """Applies the stack and audits what came out."""
    from sparsebench import audits
    from sparsebench.costs.timing import stopwatch
    from sparsebench.methods.base import Applied, Surroundings

    before = audits.fingerprint(loaded.model)
    around = Surroundings(loaded, lambda: windows, run.options.seed, partial(progress, "sparsify"))
    applied = Applied()
    with stopwatch() as watch:
        for family, stack in _families(workspace, run, methods):
            part = family.apply(stack, around)
            applied.layers += part.layers
            applied.acts_on |= part.acts_on
            applied.tolerance = max(applied.tolerance, part.tolerance)
            applied.warnings += part.warnings
            applied.notes |= part.notes
    achieved = audits.count(loaded.model, applied)
    checks = audits.audit(loaded.model, applied, achieved, before, not achieved.asked)
    warnings = list(audits.findings(loaded.model, applied, achieved))
    return SparseModel(model_id, loaded, applied, achieved, checks, warnings, watch.seconds)


def _identity(run: Run, model_id: str) -> dict[str, Any]:
    return {
        "sparse_model_id": model_id,
        "method": run.label,
        "model": run.model.label,
        "calibration": run.calibration.label if run.calibration else None,
        "task": run.task.label,
        "sparsity": run.sparsity,
        "pattern": run.pattern,
        "seed": run.seed,
        **{f"model.{key}": value for key, value in run.model.changed.items() if key in ("outliers", "outliers_sigma")},
        **{f"task.{key}": value for key, value in run.task.changed.items() if isinstance(value, (str, int, float))},
        "version": __version__,
        "platform": platform.platform(terse=True),
    }


def _sparsity(sparse: SparseModel) -> dict[str, Any]:
    return {
        "achieved": sparse.achieved.scope,
        "achieved_model": sparse.achieved.model,
        "flagged": sparse.achieved.missed,
        "warnings": "; ".join(sparse.warnings) or None,
        "audits_failed": ", ".join(check.name for check in sparse.audits if not check.held) or None,
        "seconds_sparsify": sparse.seconds,
        "device": str(sparse.loaded.device),
        "dtype": str(sparse.loaded.model.dtype).removeprefix("torch."),
        **sparse.applied.notes,
    }


def _scores(run: Run, workspace: Workspace, outcome: Outcome) -> dict[str, Any]:
    fields: dict[str, Any] = {"metric": workspace.catalogue.get("task", run.task.name).metric}
    for name, score in outcome.scores.items():
        fields |= {name: score.value, f"{name}_stderr": score.stderr, f"{name}_n": score.n}
    return fields | outcome.notes


def _costs(sparse: SparseModel, outcome: Outcome) -> dict[str, Any]:
    """Operations and bytes; a model that cannot be counted leaves the columns empty and a warning."""
    from sparsebench.costs import flops, storage

    model = sparse.loaded.model
    length = int(outcome.notes.get("context") or outcome.notes.get("length") or min(sparse.loaded.context, 512))
    try:
        shape = flops.shape_of(model)
        stored = storage.weight_bytes(model)
    except UserError as error:
        sparse.warnings.append(f"costs not counted: {error}")
        return {"warnings": "; ".join(sparse.warnings)}
    return {
        "cost_length": length,
        "flops_prefill": flops.prefill(shape, length) / length,
        "flops_prefill_dense": flops.prefill(shape, length, dense=True) / length,
        "flops_decode": flops.decode(shape, length),
        "flops_decode_dense": flops.decode(shape, length, dense=True),
        "bytes_weights": stored.sparse,
        "bytes_weights_dense": stored.dense,
        "bytes_format": stored.format,
        "kv_bytes_per_token": storage.kv_bytes_per_token(model),
        "latency": "simulated",
    }


def _problem(sparse: SparseModel, outcome: Outcome) -> str | None:
    """Why the run must not count as ok, or None."""
    failed = [f"{check.name} ({check.detail})" for check in sparse.audits if not check.held]
    if failed:
        return f"audit failed: {'; '.join(failed)}"
    wrong = [f"{name} = {score.value}" for name, score in outcome.scores.items() if not isfinite(score.value)]
    return f"not finite: {', '.join(wrong)}" if wrong else None
