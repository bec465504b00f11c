"""One run, end to end: model -> sparse model -> audits -> scores -> costs -> record.

Everything a user can get wrong is found before the store is touched; whatever fails after that
leaves a record that says what happened.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sparsebench import columns
from sparsebench.config import Workspace
from sparsebench.errors import UserError
from sparsebench.making import Basis, Fitting, Progress, SparseModel, fit, place_of
from sparsebench.models.saving import check_folder, save_compressed, save_model
from sparsebench.results.store import Attempt, Store
from sparsebench.run import Run

if TYPE_CHECKING:  # imports torch
    from sparsebench.models.base import LoadedModel
    from sparsebench.models.compressed import Sizes
    from sparsebench.models.streaming import StreamedModel


@dataclass
class Experiment:
    """Runs runs. The last sparse model is kept, so that the tasks of one model share it, as are the dense weights for
    the next methods, and the data that was made ready for them.

    ``extra``: more columns of every record, such as the worker's job."""

    workspace: Workspace
    store: Store
    progress: Progress = lambda what, done, total: None
    extra: dict[str, Any] = field(default_factory=dict)
    kept: Fitting | None = None
    drawn: dict[str, Any] = field(default_factory=dict)  # calibration windows, by model, corpus and seed
    prepared: dict[tuple[str, str], Any] = field(default_factory=dict)  # of the last model, by task
    # (folder, sparse model id) -> what was written by this object; None: a plain model
    saved: dict[tuple[str, str], Sizes | None] = field(default_factory=dict)
    clock: Callable[[], float] = time.perf_counter

    def run(self, run: Run) -> dict[str, Any]:
        """The run's record: from the store if it is there, else made now. UserError on bad input."""
        content = self._loader(run).content()
        model_id, run_id = run.sparse_model_id(content), run.run_id(content)
        self._check_save(run, model_id)
        known = self._answer(run_id)
        if known and not run.options.force:
            if run.options.save:
                self._save(run, self._fitting(run, model_id).make(self.progress))
            return known
        fitting = self._fitting(run, model_id)
        task = self._task(run)
        prepared = self._prepared(run, task, fitting.loaded)
        fitting.check_prompts(task, prepared)
        attempt = self.store.begin(run_id, columns.identity(run, model_id) | self.extra)
        return self._finish(run, attempt, fitting, partial(task.evaluate, prepared=prepared))

    def _finish(self, run: Run, attempt: Attempt, fitting: Fitting, evaluate: Callable[..., Any]) -> dict[str, Any]:
        """Sparsifies, evaluates and measures between the record's two lines."""
        from sparsebench.costs.lengths import Lengths
        from sparsebench.costs.timing import Peak
        from sparsebench.tasks.base import Evaluation
        from sparsebench.tasks.decoding import fillers

        fields: dict[str, Any] = {}
        given = Lengths(fillers(fitting.loaded))
        rows: dict[str, Any] = {"layers": [], "samples": [], "config": run.to_dict()}
        how = Evaluation(run.options.batch_size, partial(self.progress, "evaluate"))
        metric = self.workspace.catalogue.get("task", run.task.name).metric
        started = self.clock()
        try:
            with Peak(fitting.loaded.device) as peak:
                sparse = fitting.make(self.progress)
                fields |= columns.made(sparse)
                evaluated = self.clock()
                with sparse.running(), given.watched(sparse.loaded.model):
                    outcome = evaluate(sparse.loaded, how)
            now = self.clock()
            counted = sparse.counted()
            rows["layers"] = columns.layers(sparse, counted)
            leading = self.workspace.catalogue.get("method", run.leading.name)
            fields |= columns.sparsity(sparse, counted, leading.target)
            fields |= columns.scores(metric, outcome)
            at = columns.lengths(outcome, given)
            fields = columns.joined(fields, columns.costs(sparse, at, counted))
            fields |= {"seconds": now - started, "seconds_evaluate": now - evaluated, "peak_memory_bytes": peak.bytes}
            rows["samples"] = outcome.samples
            if run.options.kernel != "none":
                fields = columns.joined(fields, columns.timed(sparse, run.options.kernel, at))
            problem = columns.problem(sparse, outcome, counted)
            if problem and run.options.streamed:
                self.kept = None
                fitting.loaded.discard()
            elif run.options.save and not problem:
                fields |= columns.saved(self._save(run, sparse))
        except KeyboardInterrupt:
            fitting.loaded.discard()
            attempt.finish("lost", fields | {"error": "interrupted"}, **rows)
            raise
        except Exception as error:  # whatever goes wrong in a run is its record's business
            self.kept = None
            fitting.loaded.discard()
            fields |= {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            return attempt.finish("failed", fields, **rows, error=traceback.format_exc())
        return attempt.finish("failed" if problem else "ok", fields | {"error": problem}, **rows, error=problem)

    def _fitting(self, run: Run, model_id: str) -> Fitting:
        """The run's model with its methods and data: the kept one, or loaded and checked now."""
        if self.kept is None or self.kept.id != model_id or self.kept.place != place_of(run):
            basis = self.kept.again(place_of(run)) if self.kept and not run.options.streamed else None
            self.kept = None  # its memory is needed
            if run.options.threads:
                import torch

                torch.set_num_threads(run.options.threads)
            self.kept = fit(self.workspace, run, model_id, basis or Basis(self._load(run)), self.drawn)
        return self.kept

    def _prepared(self, run: Run, task: Any, loaded: LoadedModel) -> Any:
        """The task's data for this model, made once."""
        key = (str(run.model), str((run.task, run.corpus)))
        if key not in self.prepared:
            data = task.prepare(loaded, self._corpora)
            self.prepared = {one: kept for one, kept in self.prepared.items() if one[0] == key[0]} | {key: data}
        return self.prepared[key]

    def check(self, runs: Sequence[Run]) -> None:
        """UserError when any of the runs is bad input, so that a grid starts whole or not at all."""
        for error in self.problems(runs):
            raise error

    def problems(self, runs: Sequence[Run]) -> Iterator[UserError]:
        """What is wrong with any of the runs. Each model that is needed is loaded once for this; what the store
        answers is not checked again."""
        pending: dict[str, list[Run]] = {}
        for run in runs:
            content = self._loader(run).content()
            self._check_save(run, run.sparse_model_id(content))
            if run.options.force or not self._answer(run.run_id(content)):
                pending.setdefault(str(place_of(run)), []).append(run)
        for group in pending.values():
            try:
                loaded = self._load(group[0])
            except UserError as error:
                yield error
                continue
            fitted: dict[str, Fitting] = {}
            for key, run in {_made_of(run): run for run in group}.items():
                try:
                    fitted[key] = fit(self.workspace, run, "", Basis(loaded), self.drawn)
                except UserError as error:
                    yield error
            for run in {str(run.task): run for run in group}.values():
                try:
                    task = self._task(run)
                    prepared = self._prepared(run, task, loaded)
                except UserError as error:
                    yield error
                    continue
                for key in {_made_of(other) for other in group if str(other.task) == str(run.task)} & fitted.keys():
                    try:
                        fitted[key].check_prompts(task, prepared)
                    except UserError as error:
                        yield error

    def _loader(self, run: Run) -> Any:
        return self.workspace.catalogue.load("model", run.model.name)(**run.model.options)

    def _load(self, run: Run) -> LoadedModel:
        loader = self._loader(run)
        if not run.options.streamed:
            return cast("LoadedModel", loader.load())
        if not hasattr(loader, "source"):
            raise UserError(f"streamed=true: model={run.model.label} can only be loaded whole")
        from sparsebench.models.loading import stream_folder

        folder, how = loader.source()
        return stream_folder(folder, how, _target(run), run.options.activations == "disk")

    def _task(self, run: Run) -> Any:
        task = self.workspace.catalogue.load("task", run.task.name)(**run.task.options)
        if run.options.streamed and not getattr(task, "streams", False):
            raise UserError(
                f"streamed=true: task={run.task.label}, as asked, needs the whole model in memory; prune with "
                f"task=perplexity, then run the task with model=hf model.path={run.options.save} method=given"
            )
        return task

    def _corpora(self, name: str) -> Any:
        return self.workspace.catalogue.load("corpus", name)

    def _answer(self, run_id: str) -> dict[str, Any] | None:
        known = self.store.find(run_id)
        return known if known and known["status"] == "ok" else None

    def _check_save(self, run: Run, model_id: str) -> None:
        if run.options.save and (run.options.save, model_id) not in self.saved:
            check_folder(_target(run))

    def _save(self, run: Run, sparse: SparseModel) -> Sizes | None:
        """Writes the sparse model, once for all of its tasks; its sizes if it is compressed."""
        place = (str(run.options.save), sparse.id)
        if place not in self.saved:
            folder = _target(run)
            notes = {"sparse_model_id": sparse.id, "achieved": sparse.achieved.scope, "run": run.to_dict()}
            fitted = {one.method: one.fitted() for one in sparse.applied.attachments}
            if run.options.streamed:
                cast("StreamedModel", sparse.loaded).keep(notes)
                self.saved[place] = None
            elif run.options.save_as == "compressed":
                self.saved[place] = save_compressed(sparse.loaded, folder, notes, fitted)
            else:
                save_model(sparse.loaded, folder, notes, fitted)
                self.saved[place] = None
        return self.saved[place]


def _target(run: Run) -> Path:
    """The folder of a run that saves its model."""
    return Path(str(run.options.save)).expanduser()


def _made_of(run: Run) -> str:
    """What a sparse model of one model is made of."""
    return str((run.methods, run.calibration, run.seed))
