"""Which columns of a record come from what: the run, its sparse model, its scores, its costs."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import reduce
from math import isfinite
from operator import mul
from typing import TYPE_CHECKING, Any

from sparsebench.errors import UserError
from sparsebench.run import Run

if TYPE_CHECKING:
    from sparsebench.costs.lengths import Lengths
    from sparsebench.making import SparseModel
    from sparsebench.methods.base import Attachment, Counted
    from sparsebench.models.compressed import Sizes
    from sparsebench.tasks.base import Outcome

    Uses = Sequence[tuple[Attachment, Counted]]

_SAID = ("outliers", "outliers_sigma", "rung", "path")  # options that make another model under the same name


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
        **{f"model.{key}": value for key, value in run.model.changed.items() if key in _SAID},
        **{f"task.{key}": value for key, value in run.task.changed.items() if isinstance(value, (str, int, float))},
        "platform": platform.platform(terse=True),
    }


def made(sparse: SparseModel) -> dict[str, Any]:
    """What is known once the sparse model was made."""
    return {
        "audits_failed": ", ".join(check.name for check in sparse.audits if not check.held) or None,
        "seconds_sparsify": sparse.seconds,
        "device": str(sparse.loaded.device),
        "dtype": str(sparse.loaded.model.dtype).removeprefix("torch."),
        **sparse.applied.notes,
    }


def sparsity(sparse: SparseModel, counted: Uses, leading: str) -> dict[str, Any]:
    """What was counted on the sparse model and while it ran. A stack over several targets has ``achieved`` of the
    ``leading`` one, whose level is the run's, and a column for each."""
    weights = sparse.achieved
    found = [("weights", weights.scope)] if sparse.applied.layers or not counted else []
    found += [(attachment.target, use.achieved) for attachment, use in counted]
    found.sort(key=lambda one: one[0] != leading)
    missed = [(a, use) for a, use in counted if a.asked is not None and abs(use.achieved - a.asked) > a.tolerance]
    warnings = [*sparse.warnings, *(text for _, use in counted for text in use.warnings)]
    warnings += [f"{a.method}: asked sparsity {a.asked:.6g}, achieved {use.achieved:.6g}" for a, use in missed]
    return {
        "achieved": found[0][1],
        "achieved_model": weights.model,
        "flagged": weights.missed or bool(missed),
        "warnings": "; ".join(warnings) or None,
        **({f"achieved_{target}": value for target, value in found} if len(found) > 1 else {}),
        **{key: value for _, use in counted for key, value in use.columns.items()},
    }


def layers(sparse: SparseModel, counted: Uses) -> list[dict[str, object]]:
    """The per-layer table: weights, then what was skipped while the model ran."""
    return [*sparse.achieved.layers, *(row for _, use in counted for row in use.rows)]


def scores(metric: str, outcome: Outcome) -> dict[str, Any]:
    """Each score with its standard error and number of samples; ``metric`` names the task's primary one."""
    fields: dict[str, Any] = {"metric": metric}
    for name, score in outcome.scores.items():
        fields |= {name: score.value, f"{name}_stderr": score.stderr, f"{name}_n": score.n}
    return fields | outcome.notes


def lengths(outcome: Outcome, given: Lengths) -> dict[str, Any]:
    """At how many tokens costs are counted: what the model was given. The last token of a window is only predicted; it
    is counted all the same, as the window is the prompt. Nothing where the task did not run the model as a whole and
    tells no length."""
    told = outcome.notes.get("context") or outcome.notes.get("length")
    read = told if given.prompt is None else round(given.prompt)
    if read is None:
        return {}
    prompt = told if told == read + 1 else read
    return {"cost_length": prompt, "cost_length_decode": prompt if given.decode is None else round(given.decode)}


def costs(sparse: SparseModel, at: dict[str, Any], counted: Uses) -> dict[str, Any]:
    """Operations and bytes at the lengths that ``lengths`` gives; what cannot be counted leaves its columns empty and a
    warning."""
    from sparsebench.costs import flops, storage
    from sparsebench.costs.saving import NO_SAVING

    model = sparse.loaded.model
    saving = reduce(mul, (use.saving for _, use in counted), NO_SAVING)
    try:
        shape = flops.shape_of(model, sparse.loaded.values)
        stored = storage.weight_bytes(model, sparse.loaded.values)
    except UserError as error:
        return at | {"warnings": f"costs not counted: {error}"}
    kv = storage.kv_bytes_per_token(model)
    found = {
        "bytes_weights": stored.sparse,
        "bytes_weights_dense": stored.dense,
        "bytes_format": stored.format,
        "kv_bytes_per_token": kv * saving.kv_stored,
        "kv_bytes_per_token_dense": kv,
        "latency": "simulated",
    }
    if not at:
        return found | {"warnings": "costs of a prompt not counted: the task tells no length of prompts"}
    length, behind = at["cost_length"], at["cost_length_decode"]
    return {
        **at,
        **found,
        "flops_prefill": flops.prefill(shape, length, saving=saving) / length,
        "flops_prefill_dense": flops.prefill(shape, length, dense=True) / length,
        "flops_decode": flops.decode(shape, behind, saving=saving),
        "flops_decode_dense": flops.decode(shape, behind, dense=True),
        "bytes_decode": stored.read(saving) + kv * saving.kv_read * behind,
        "bytes_decode_dense": stored.dense + kv * behind,
    }


def timed(sparse: SparseModel, kernel: str, at: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds on a ``kernel``. What was evaluated counts also where they cannot be had; a warning says why."""
    from sparsebench import latency

    try:
        if not at:
            raise UserError("the task tells no length of prompts")
        return latency.columns(sparse, kernel, at["cost_length"])
    except UserError as error:
        return {"warnings": f"not timed: {error}"}


def joined(fields: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """All columns, the warnings of both."""
    texts = [one for one in (fields.get("warnings"), more.get("warnings")) if one]
    return fields | more | {"warnings": "; ".join(texts) or None}


def saved(sizes: Sizes | None) -> dict[str, Any]:
    """Bytes of the files that ``save_as=compressed`` wrote; nothing for a plain model."""
    return {} if sizes is None else {"bytes_file": sizes.file, "bytes_file_dense": sizes.file_dense}


def problem(sparse: SparseModel, outcome: Outcome, counted: Uses) -> str | None:
    """Why the run must not count as ok, or None."""
    failed = [f"{check.name} ({check.detail})" for check in sparse.audits if not check.held]
    for attachment, use in counted:
        if not use.acted:
            failed.append(f"acted ({attachment.method}: nothing that it acts on ran in this task)")
        elif attachment.asked and use.achieved <= 0:
            failed.append(f"acted ({attachment.method}: asked {attachment.asked:g}, achieved {use.achieved:g})")
    if failed:
        return f"audit failed: {'; '.join(failed)}"
    wrong = [f"{name} = {score.value}" for name, score in outcome.scores.items() if not isfinite(score.value)]
    return f"not finite: {', '.join(wrong)}" if wrong else None
