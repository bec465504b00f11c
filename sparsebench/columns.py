"""Which columns of a record come from what: the run, its sparse model, its scores, its costs."""

from __future__ import annotations

import platform
from math import isfinite
from typing import TYPE_CHECKING, Any

from sparsebench.errors import UserError
from sparsebench.run import Run

if TYPE_CHECKING:
    from sparsebench.making import SparseModel
    from sparsebench.tasks.base import Outcome


def identity(run: Run, model_id: str) -> dict[str, Any]:
    """What is known before the run starts."""
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
        "platform": platform.platform(terse=True),
    }


def sparsity(sparse: SparseModel) -> dict[str, Any]:
    """What was counted and checked on the sparse model."""
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


def scores(metric: str, outcome: Outcome) -> dict[str, Any]:
    """Each score with its standard error and number of samples; ``metric`` names the task's primary one."""
    fields: dict[str, Any] = {"metric": metric}
    for name, score in outcome.scores.items():
        fields |= {name: score.value, f"{name}_stderr": score.stderr, f"{name}_n": score.n}
    return fields | outcome.notes


def costs(sparse: SparseModel, outcome: Outcome) -> dict[str, Any]:
    """Operations and bytes; a model that cannot be counted leaves the columns empty and a warning."""
    from sparsebench.costs import flops, storage

    model = sparse.loaded.model
    length = int(outcome.notes.get("context") or outcome.notes.get("length") or min(sparse.loaded.context, 512))
    try:
        shape = flops.shape_of(model)
        stored = storage.weight_bytes(model)
    except UserError as error:
        # not added to the sparse model's own warnings: its other tasks share them
        return {"warnings": "; ".join([*sparse.warnings, f"costs not counted: {error}"])}
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


def problem(sparse: SparseModel, outcome: Outcome) -> str | None:
    """Why the run must not count as ok, or None."""
    failed = [f"{check.name} ({check.detail})" for check in sparse.audits if not check.held]
    if failed:
        return f"audit failed: {'; '.join(failed)}"
    wrong = [f"{name} = {score.value}" for name, score in outcome.scores.items() if not isfinite(score.value)]
    return f"not finite: {', '.join(wrong)}" if wrong else None
