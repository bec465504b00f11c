"""The standard tasks of the evaluation harness, and the tinyworld tasks in its form.

``task=lm_eval task.tasks=[arc_easy,winogrande]`` evaluates tasks, groups or tags of EleutherAI's
lm-evaluation-harness, ``task=zero_shot`` the seven of the pruning papers. The tasks named tinyworld_*
(tag ``tinyworld``) are this project's own, made in memory; with them, and with a folder of one's own
(``task.include_path``), the harness's thousands of task files are not read and no network is touched.

The score ``acc`` is the mean over the asked tasks of each one's plain accuracy, as the papers' tables
have it; ``acc/<task>`` and ``acc_norm/<task>`` (length-normalised) stand beside it. A group counts as
one task, its documents pooled; a tag as the tasks it stands for. Other metrics than accuracies: ``lm_eval_score``.
"""

from __future__ import annotations

import difflib
import json
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from math import isclose
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sparsebench.declare import Declared, option, task
from sparsebench.errors import UserError, closest
from sparsebench.tasks.base import Evaluation, Outcome, Score

if TYPE_CHECKING:
    from sparsebench.models.base import LoadedModel

_OWN = Path(__file__).parent / "harness" / "tinyworld"
_ACCURACIES = ("acc", "exact_match")  # a task's main accuracy is the first of these that it reports


def shared_metrics(leaves: dict[str, Any]) -> set[str]:
    """What all ``leaves``, the harness's tasks by name, report."""
    return set.intersection(*(set(leaf.aggregation()) for leaf in leaves.values()))


@task(name="lm_eval", version=1, metric="acc", better="higher", gives=("prefill", "decode"))
@dataclass(frozen=True)
class LmEval(Declared):
    """Accuracy on tasks of the lm-evaluation-harness."""

    tasks: tuple[str, ...] = option(("tinyworld",), "harness tasks, groups or tags")
    limit: int | None = option(None, "evaluate only the first documents of each task", low=1, unit="documents")
    num_fewshot: int | None = option(
        None, "worked examples before each question; none: each task's own; tasks that fix 0 keep it", low=0
    )
    seed: int = option(1234, "draws the worked examples", low=0, high=4294967295)
    include_path: str | None = option(None, "a folder of your own harness tasks")
    add_bos: bool | None = option(None, "begin each text with BOS; none: as the tokenizer does, like the harness")
    tinyworld_length: int = option(256, "length of the tinyworld documents", low=64, high=8192, unit="tokens")
    tinyworld_samples: int = option(100, "documents of each tinyworld task", low=1, unit="documents")

    primary: ClassVar[str] = "acc"  # what the mean over the asked tasks is called
    outcome: ClassVar[str] = "correct"  # what a sample's outcome is called
    beside: ClassVar[tuple[str, ...]] = ("acc_norm",)  # metrics that are told too, where tasks have them

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise UserError("task.tasks=[]: name at least one harness task, e.g. task.tasks=[arc_easy,winogrande]")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise UserError(f"task.include_path={self.include_path}: no such folder")

    def prepare(self, model: LoadedModel, corpora: Any) -> dict[str, dict[str, Any]]:
        """The harness's task objects with their data sets: asked name (tags replaced by their tasks) ->
        task by name. Some seconds when the harness's own tasks are asked, whose index must be read.

        UserError for an unknown task, a data set that cannot be had, documents longer than the model's
        context, or tasks none of which reports an accuracy.
        """
        with _quiet(), _seeded(self.seed):
            return self._load(model)

    def evaluate(self, model: LoadedModel, how: Evaluation, prepared: dict[str, dict[str, Any]]) -> Outcome:
        """Scores and one row per document: ``sample`` ("arc_easy/17"), ``task``, ``correct`` (0 or 1),
        and ``acc_norm`` where the task has it. UserError when an answer cannot fit the model's context."""
        with _quiet(), _seeded(self.seed):
            import lm_eval.evaluator

            from sparsebench.tasks.harness.bridge import CachedLM

            leaves = {name: leaf for found in prepared.values() for name, leaf in found.items()}
            self._configure(leaves)
            results: dict[str, Any] = lm_eval.evaluator.evaluate(
                lm=CachedLM(model, how, self.add_bos),
                task_dict={"tasks": leaves, "groups": {}, "group_map": {}},
                limit=self.limit,
                bootstrap_iters=0,  # standard errors come from the samples
            )
        return self._outcome(prepared, results)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of metrics, the preferred one first."""
        return _ACCURACIES

    def metric_of(self, leaves: dict[str, Any]) -> str | None:
        """The main metric that all ``leaves`` (of one asked name) report, or None."""
        shared = shared_metrics(leaves)
        return next((name for name in self.wanted if name in shared), None)

    def check_metrics(self, asked: dict[str, dict[str, Any]]) -> None:
        """UserError when nothing of what was asked is scored."""
        if not any(self.metric_of(found) for found in asked.values()):
            raise UserError(
                f"task.tasks={','.join(self.tasks)}: none reports an accuracy; see task=lm_eval_score for other "
                "metrics, task=perplexity for text"
            )

    def metadata(self, model: LoadedModel) -> dict[str, Any]:
        """What tasks that make their documents themselves are told."""
        return {"tinyworld_length": self.tinyworld_length, "tinyworld_samples": self.tinyworld_samples}

    def _manager(self, model: LoadedModel) -> Any:
        """The harness's task manager that knows every asked name; UserError when none does."""
        told = json.dumps(self.metadata(model))
        manager = _manager(self.include_path, told, defaults=False)
        if not set(self.tasks) <= set(manager.all_tasks):
            manager = _manager(self.include_path, told, defaults=True)
        for name in self.tasks:
            if name not in manager.task_index:
                match = difflib.get_close_matches(name, manager.all_tasks, n=1)
                hint = closest(name, match) if match else "; 'lm-eval ls tasks' lists the valid ones"
                raise UserError(f"task.tasks={name}: unknown harness task{hint}")
        return manager

    def _load(self, model: LoadedModel) -> dict[str, dict[str, Any]]:
        manager = self._manager(model)
        asked: dict[str, dict[str, Any]] = {}
        for name in self.tasks:
            try:
                loaded = manager.load([name])
            except Exception as error:  # the user's own task code runs here, and can fail in any way
                raise _unavailable(name, error) from error
            found: dict[str, Any] = loaded["tasks"]
            whole = bool(loaded.get("groups"))
            asked |= {name: found} if whole else {leaf: {leaf: one} for leaf, one in found.items()}
        for leaf, one in [item for found in asked.values() for item in found.items()]:
            if getattr(one, "UNSAFE_CODE", False) or getattr(one, "MULTIMODAL", False):
                raise UserError(f"task.tasks={leaf}: runs generated code or needs more than text, not supported")
            if leaf.startswith("tinyworld_") and self.tinyworld_length > model.context:
                raise UserError(
                    f"task.tinyworld_length={self.tinyworld_length}: the model's context has {model.context} tokens"
                )
        self.check_metrics(asked)
        return asked

    def _configure(self, leaves: dict[str, Any]) -> None:
        """Worked examples, by the harness's own rules: a task that fixes 0 keeps it."""
        for leaf in leaves.values():
            fixed = leaf.get_config("num_fewshot")
            if self.num_fewshot is not None and fixed != 0:
                leaf.set_config(key="num_fewshot", value=self.num_fewshot)
            elif fixed is None:
                leaf.set_config(key="num_fewshot", value=0)
            leaf.set_fewshot_seed(seed=self.seed)

    def _outcome(self, asked: dict[str, dict[str, Any]], results: dict[str, Any]) -> Outcome:
        """The harness's results as scores (the mean first) and rows."""
        main: list[Score] = []
        scores: dict[str, Score] = {}
        samples: dict[str, dict[str, Any]] = {}  # by id: a task may be asked alone and in a group
        for name, leaves in asked.items():
            metric = self.metric_of(leaves)
            for one in [metric, *self.beside] if metric else _metrics(leaves):
                score = _score(one, list(leaves), results)
                if score is not None:
                    scores[f"{one}/{name}"] = score
            if metric:
                if f"{metric}/{name}" not in scores:
                    raise UserError(f"task.tasks={name}: {metric} cannot be pooled over its tasks; name them instead")
                main.append(scores[f"{metric}/{name}"])
                samples |= {row["sample"]: row for leaf in leaves for row in self._rows(leaf, metric, results)}
        return Outcome({self.primary: Score.average(main), **scores}, list(samples.values()), _notes(results))

    def _rows(self, leaf: str, metric: str, results: dict[str, Any]) -> list[dict[str, Any]]:
        rows = []
        for document in _documents(leaf, metric, results):
            row: dict[str, Any] = {"sample": f"{leaf}/{document['doc_id']}", "task": leaf}
            if isinstance(document[metric], Real):  # others are only made over all documents
                row[self.outcome] = float(document[metric])
            row |= {one: float(document[one]) for one in self.beside if one in document}
            rows.append(row)
        return rows


@lru_cache(maxsize=4)
def _manager(include_path: str | None, told: str, defaults: bool) -> Any:
    """A task manager over our own tasks, the user's folder and, if ``defaults``, the harness's. ``told``: metadata for
    all of them, as JSON."""
    from lm_eval.tasks import TaskManager

    folders = [str(_OWN)] + ([include_path] if include_path else [])
    return TaskManager(include_defaults=defaults, include_path=folders, metadata=json.loads(told))


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness logs and draws bars of its own; progress is ours to show."""
    try:
        import lm_eval.api.task as harness
    except ModuleNotFoundError as error:
        raise UserError(f"task=lm_eval: needs the package lm_eval ({error})") from None
    logger, module = logging.getLogger("lm_eval"), vars(harness)
    level, bar = logger.level, module["tqdm"]
    logger.setLevel(logging.ERROR)
    module["tqdm"] = partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        module["tqdm"] = bar


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Some harness tasks draw from the global generators while they are built; put them back after."""
    import numpy

    before, before_numpy = random.getstate(), numpy.random.get_state()
    random.seed(seed)
    numpy.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
        numpy.random.set_state(before_numpy)


def _unavailable(name: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, OSError):  # no network, not on the hub, or offline and not in the cache
        return UserError(f"task.tasks={name}: its data set needs a network or a local cache: {reason}")
    return UserError(f"task.tasks={name}: cannot be loaded: {type(error).__name__}: {reason}")


def _metrics(leaves: dict[str, Any]) -> list[str]:
    return sorted({metric for leaf in leaves.values() for metric in leaf.aggregation()})


def _score(metric: str, leaves: list[str], results: dict[str, Any]) -> Score | None:
    """``metric`` over the pooled documents of ``leaves``; None where one does not report it. The standard
    error is that of a mean, None where the harness aggregates in another way."""
    values: list[Any] = []
    for leaf in leaves:
        found = _documents(leaf, metric, results)
        if not found:
            return None
        values += [row[metric] for row in found]
    plain = all(isinstance(value, Real) for value in values)
    score = Score.mean([float(value) for value in values]) if plain else None
    if len(leaves) > 1:
        return score
    reported = float(next(v for k, v in results["results"][leaves[0]].items() if k.split(",")[0] == metric))
    if score is not None and isclose(score.value, reported, abs_tol=1e-9):
        return score
    return Score(reported, None, len(values))


def _documents(leaf: str, metric: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    """The logged documents that carry ``metric``, under the first filter of the task that does."""
    found = [row for row in results["samples"][leaf] if metric in row]
    return [row for row in found if row["filter"] == found[0]["filter"]]


def _notes(results: dict[str, Any]) -> dict[str, Any]:
    from importlib.metadata import version

    versions = results["versions"]
    return {
        "lm_eval_version": version("lm_eval"),
        "lm_eval_tasks": " ".join(f"{name}:{versions[name]}" for name in sorted(versions)),
    }
