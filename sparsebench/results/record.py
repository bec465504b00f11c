"""What a run leaves: one flat line of JSON, its documented columns, its schema versions, and which line counts.

A run can leave many lines: one ``running`` when an attempt begins, one ``ok``, ``failed`` or ``lost``
when it ends. ``rank`` orders them; a run's record is the line of the highest rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from sparsebench.errors import UserError

SCHEMA = 1
STATUSES = ("running", "ok", "failed", "lost")
SCORES = "<score>"  # the entry of COLUMNS that stands for the columns of all scores

COLUMNS: dict[str, str] = {
    "run_id": "hash of everything that can change the result",
    "sparse_model_id": "hash of the run before its task: model, method(s), levels, calibration, seed",
    "method": "name of the method; a stack is joined by +, for example wanda+mustafar",
    "model": "name of the model",
    "calibration": "name of the calibration corpus; empty when the method uses none",
    "task": "name of the task",
    "sparsity": "what was asked for: zeros / all over the method's declared scope",
    "pattern": "unstructured, or n:m: n kept of every m along the input dimension",
    "achieved": "what was counted on the result, over the same scope",
    "achieved_model": "what was counted on the result, over all parameters of the model",
    "seed": "seed of the run; empty when nothing in it is random",
    "status": "running, ok, failed or lost (its process vanished)",
    "attempt": "1, 2, ...: which try of this run the line describes",
    "flagged": "true when achieved misses sparsity by more than the method's tolerance",
    "metric": "name of the task's primary score",
    SCORES: "one triple of columns per score: <score> its value, <score>_stderr its standard error (empty where "
    "none is defined), <score>_n the number of samples; sorted by name",
    "flops_prefill": "FLOPs per token, averaged over a prefill of cost_length tokens, 2 per multiply-add",
    "flops_prefill_dense": "the same for the dense model",
    "flops_decode": "FLOPs to decode one token after cost_length_decode tokens",
    "flops_decode_dense": "the same for the dense model",
    "cost_length": "the length, in tokens, at which costs of a prefill are counted: the mean of the task's prompts",
    "cost_length_decode": "the tokens before a decoded one at which costs of decoding are counted: the mean over what "
    "the task decoded; cost_length where it decoded nothing",
    "bytes_weights": "bytes of the weights in the format bytes_format, indices included",
    "bytes_weights_dense": "bytes of the dense weights in the same dtype",
    "bytes_format": "the storage format that bytes_weights is counted in",
    "bits_average": "stored bits over all parameters of a quantised model (rtn), scales and zero points included",
    "bits_per_weight": "the same over the weights that were quantised (gqsa: over its scope)",
    "bits_of_layers": "how many layers got how many bits (rtn)",
    "bytes_file": "bytes of the weight files that save_as=compressed wrote",
    "bytes_file_dense": "bytes of the same tensors, dense",
    "kv_bytes_per_token": "bytes of the key/value cache that are stored per token of context",
    "kv_bytes_per_token_dense": "the same for the dense model",
    "bytes_decode": "bytes of weights and cache read to decode one token after cost_length_decode tokens",
    "bytes_decode_dense": "the same for the dense model",
    "latency": "measured, and what of it by the reference instead of a kernel; or 'simulated' when nothing was timed "
    "(kernel=none)",
    "kernel": "which kernels were timed",
    "kernel_layers": "how many linear layers ran on them",
    "kernel_formats": "in which formats their weights lay, and how many in each",
    "latency_verdict": "ok, or noisy: while it was measured the dense model differed from itself by over 10%",
    "kernel_error": "largest difference of a logit to the masked model's, over the largest logit",
    "ms_prefill": "milliseconds of a prefill of cost_length tokens on those kernels, median (fewer where the context "
    "has no room for what is decoded then); with a target sparsity the search for the method's own sizes is part of it",
    "ms_prefill_dense": "the same for the dense model, measured in turn",
    "speedup_prefill": "dense / sparse milliseconds of a prefill, median over pairs",
    "ms_decode": "milliseconds of one token decoded after that prefill, median",
    "ms_decode_dense": "the same for the dense model, measured in turn",
    "speedup_decode": "dense / sparse milliseconds of a decoded token, median over pairs",
    "bytes_resident": "bytes of the parameters while the model runs on those kernels",
    "recovery_steps": "steps that a method took to repair the model (perp, gqsa)",
    "trainable_fraction": "parameters that perp trained / all",
    "recovery_loss_first": "mean training loss over the first tenth of those steps",
    "recovery_loss_last": "the same over the last tenth",
    "reconstruction_mse_before": "mean squared error of the blocks' outputs before the repair, summed over blocks",
    "reconstruction_mse_after": "the same after",
    "seconds_recover": "wall time of the repair",
    "groups_kept": "groups of weights that gqsa kept",
    "groups_quantised": "groups of weights that were rounded to few bits",
    "seconds": "wall time of the run",
    "seconds_sparsify": "wall time of making the model sparse",
    "seconds_evaluate": "wall time of the evaluation",
    "peak_memory_bytes": "peak memory of the run's process, on its device",
    "achieved_weights": "achieved over the weights, where a stack acts on several targets",
    "achieved_activations": "the same over activations",
    "achieved_attention": "the same over the query-key pairs of the prefill",
    "achieved_kv_cache": "the same over the key/value cache",
    "statistics": "dense when all calibration statistics were taken of the dense model (sequential=none); else empty",
    "audits_failed": "names of the audits that failed, joined by '; '",
    "warnings": "what the user should know about the numbers, joined by '; '",
    "error": "last line of the error of a failed run; the traceback lies in errors/",
    "version": "version of sparsebench",
    "device": "device the run was computed on",
    "dtype": "dtype the run was computed in",
    "job": "what the launcher or the queue calls the worker that made it; empty for a run by hand",
    "restarts": "how often the queue had restarted that job",
    "host": "host the run's process ran on",
    "pid": "process id on that host",
    "pid_start": "when that process started (clock ticks @ boot), to tell it from a later one with its pid",
    "started": "when the attempt began, UTC (for people: no rule reads it)",
    "schema": "version of this table of columns",
}

# version -> the function that turns a line of that version into one of the next
_UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
_RANK = {"running": 0, "lost": 1, "failed": 1, "ok": 2}
_BATCH = 1024  # lines


def upgrade(line: dict[str, Any]) -> dict[str, Any]:
    """``line`` in the current schema. UserError for a newer schema, ValueError for one that never was."""
    version = line.get("schema")
    if version == SCHEMA and version is not True:
        return line
    if not isinstance(version, int) or isinstance(version, bool):
        raise ValueError(f"a record with schema {version!r}")
    if version > SCHEMA:
        raise UserError(
            f"store: a record has schema {version}, newer than {SCHEMA}, the newest that this version reads; "
            "update the package (pip install --upgrade sparsebench)"
        )
    while version < SCHEMA:
        if version not in _UPGRADES:
            raise ValueError(f"a record with schema {version!r}")
        line = _UPGRADES[version](line)
        version += 1
    return {**line, "schema": SCHEMA}


def rank(line: Mapping[str, Any]) -> tuple[int, int, bool]:
    """What decides which line is a run's record: ``ok`` over ``failed``/``lost`` over ``running``, then the
    higher attempt. At the same attempt ``failed`` beats ``lost``: one who was thought lost has reported."""
    return _RANK[line["status"]], line["attempt"], line["status"] == "failed"


def column_order(columns: Iterable[str]) -> list[str]:
    """``columns`` in the documented order: COLUMNS, with the score triples behind ``metric``; unknown ones last."""
    left = set(columns)
    scores = sorted(name for name in left if f"{name}_n" in left and name not in COLUMNS)
    triples = [part for name in scores for part in (name, f"{name}_stderr", f"{name}_n")]
    order: list[str] = []
    for column in COLUMNS:
        order += triples if column == SCORES else [column]
    known = [column for column in order if column in left]
    return known + sorted(left.difference(known))


def encode(row: Mapping[str, Any], *, flat: bool = True) -> bytes:
    """One line of UTF-8 JSON with its newline; what is not finite becomes null. ``flat``: lists become texts
    joined by '; ', mappings become JSON texts, so that every value is a cell of a table."""
    cells = {str(name): _plain(value) for name, value in row.items()}
    if flat:
        cells = {name: _cell(value) for name, value in cells.items()}
    return json.dumps(cells, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def leading_run_id(line: bytes) -> str:
    """The run id of a stored line, whose first key it is, without parsing the line; empty when it is not first."""
    parts = line[:80].split(b'"', 4)
    return parts[3].decode("ascii", "replace") if len(parts) == 5 and parts[1] == b"run_id" else ""


def decode(lines: Iterable[bytes]) -> Iterator[dict[str, Any] | None]:
    """The JSON object on each line (with its newline), None where a line is not one.

    Whole batches are parsed at once: that is faster, and the objects of a batch share their keys in memory.
    """
    lines = iter(lines)
    while batch := list(islice(lines, _BATCH)):
        # The newlines inside the joint text keep a string that was cut from swallowing the next line.
        found = _parse(b"[" + b",".join(batch) + b"]") if all(map(_looks_whole, batch)) else None
        if isinstance(found, list) and len(found) == len(batch) and all(isinstance(one, dict) for one in found):
            yield from found
        else:
            for line in batch:
                one = _parse(line)
                yield one if isinstance(one, dict) else None


def decode_records(lines: Iterable[bytes]) -> Iterator[dict[str, Any] | None]:
    """The record on each line in the current schema, None where a line is no record. UserError for a newer one."""
    for line in decode(lines):
        try:
            record = upgrade(line) if line is not None else None
        except ValueError:
            record = None
        yield record if record is not None and _is_record(record) else None


def _is_record(line: dict[str, Any]) -> bool:
    attempt, status = line.get("attempt"), line.get("status")
    return isinstance(line.get("run_id"), str) and type(attempt) is int and attempt > 0 and status in STATUSES


def _looks_whole(line: bytes) -> bool:
    return line.startswith(b"{") and line.endswith(b"}\n")


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):  # cut, garbled, not UTF-8, or brackets without end
        return None


def _plain(value: Any) -> Any:
    """``value`` in JSON's types. NumPy and torch values are converted without importing either."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(one) for one in value]
    # Lone surrogates (undecodable file names) are no UTF-8, and other readers refuse their escapes.
    return str(value).encode("utf-8", "replace").decode("utf-8")


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return "; ".join(one if isinstance(one, str) else json.dumps(one) for one in value)
    return json.dumps(value) if isinstance(value, dict) else value
