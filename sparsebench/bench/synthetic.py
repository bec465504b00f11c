"""Stores that no run made: records about as long as real ones, with made-up numbers, and a sweep with its details."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsebench.config import Workspace
from sparsebench.results.record import SCHEMA, encode
from sparsebench.sweep import plan, spec

METHODS, LEVELS, SHARDS = 20, 50, 16
SWEEP = "synthetic"
_PRUNERS = ("magnitude", "wanda", "sparsegpt", "essential_sparsity", "random")
_SEEDS, _RANDOM = 5, 4  # seeds of a level, and how many of the pruners use one
_MODELS = ("tiny_100k", "tiny_400k", "tiny_1m")
_WINDOWS, _LAYERS = 16, 8  # samples and layers of a run


def records(store: Path, count: int) -> int:
    """A store of ``count`` runs in ``SHARDS`` shards; its bytes."""
    (store / "records").mkdir(parents=True)
    size = 0
    for shard in range(SHARDS):
        lines = (line for index in range(shard, count, SHARDS) for line in _lines(_numbered(index), index))
        size += _write(store, "records", shard, lines)
    return size


def sweep(store: Path, config: Path, runs: int) -> int:
    """A planned sweep of about ``runs`` runs that are all done, with samples and layers, added to ``store``; its file
    lies under ``config``. Returns how many runs it has."""
    each = len(_PRUNERS) + (_SEEDS - 1) * _RANDOM
    levels = max(1, math.ceil(runs / (2 * len(_MODELS) * each)))
    grid = {
        "model": [*_MODELS],
        "model.outliers": [False, True],
        "method": [*_PRUNERS],
        "sparsity": [round((at + 1) / (levels + 1), 6) for at in range(levels)],
        "task": ["perplexity"],
    }
    (config / "sweeps").mkdir(parents=True)
    seeds = [*range(_SEEDS)]
    text = json.dumps({"summary": "A synthetic sweep", "grid": grid, "baselines": ["dense"], "seeds": seeds})
    (config / "sweeps" / f"{SWEEP}.yaml").write_text(text, encoding="utf-8")
    workspace = Workspace(config)
    made = plan.make(workspace, spec.load(workspace, SWEEP))
    plan.keep(made, store)
    named = [(_planned(run.run_id, run.sparse_model_id, run.point), index) for index, run in enumerate(made.runs)]
    _write(store, "records", SHARDS, (line for run, index in named for line in _lines(run, index)))
    for kind, rows in (("samples", _samples), ("layers", _layers)):
        _write(store, kind, SHARDS, (encode(row) for run, index in named for row in rows(run, index)))
    return len(named)


def _write(store: Path, kind: str, shard: int, lines: Iterable[bytes]) -> int:
    (store / kind).mkdir(exist_ok=True)
    with open(store / kind / f"host-{shard:05}-20260101T000000-{shard:016x}.jsonl", "wb") as file:
        return sum(file.write(line) for line in lines)


def _numbered(index: int) -> dict[str, Any]:
    """What says which run it is, of a run that is only a number."""
    return {
        "run_id": f"{index:016x}",
        "sparse_model_id": f"{index:016x}"[::-1],
        "method": f"method_{index % METHODS:02}",
        "model": f"model_{index // METHODS % 7}",
        "calibration": "kjv",
        "task": "perplexity",
        "sparsity": round(index // METHODS % LEVELS / LEVELS, 4),
        "pattern": "unstructured",
        "seed": index % 3,
    }


def _planned(run_id: str, sparse_model_id: str, point: Mapping[str, Any]) -> dict[str, Any]:
    names = ("method", "model", "calibration", "task", "sparsity", "pattern", "seed")
    return {"run_id": run_id, "sparse_model_id": sparse_model_id} | {name: point.get(name) for name in names}


def _nll(run: Mapping[str, Any], index: int) -> float:
    """More zeros, a higher loss; every run its own."""
    return 2.3 + 2 * float(run["sparsity"] or 0) ** 3 + index % 97 / 1000


def _lines(run: Mapping[str, Any], index: int) -> list[bytes]:
    """The two lines of one run, about as long as real ones."""
    running: dict[str, Any] = {
        **run,
        "status": "running",
        "attempt": 1,
        "version": "0.1.0",
        "platform": "Linux-x86_64-glibc2.36",
        "host": "node0123",
        "pid": 4000 + index % 1000,
        "pid_start": "123456@abcdef12",
        "started": "2026-01-01T00:00:00+00:00",
        "schema": SCHEMA,
    }
    kept = 1 - float(run["sparsity"] or 0)
    scores = {"nll": _nll(run, index), "perplexity": math.exp(_nll(run, index)), "bits_per_byte": _nll(run, index) / 3}
    done = running | {
        "status": "ok",
        "achieved": 1 - kept,
        "achieved_model": (1 - kept) * 0.6,
        "flagged": False,
        "metric": "perplexity",
        **scores,
        **{f"{name}_stderr": 0.02 * value for name, value in scores.items()},
        **dict.fromkeys((f"{name}_n" for name in scores), _WINDOWS),
        **dict.fromkeys(("flops_prefill_dense", "flops_decode_dense"), 1234567.0),
        **dict.fromkeys(("flops_prefill", "flops_decode"), 1234567.0 * kept),
        **dict.fromkeys(("bytes_weights_dense", "kv_bytes_per_token", "bytes_decode_dense"), 123456),
        **dict.fromkeys(("bytes_weights", "bytes_decode"), round(123456 * kept)),
        "cost_length": 1024,
        "bytes_format": "bitmap",
        "latency": "simulated",
        "seconds": 12.5,
        "device": "cpu",
        "dtype": "float32",
    }
    return [encode(running), encode(done)]


def _samples(run: Mapping[str, Any], index: int) -> Iterator[dict[str, Any]]:
    for window in range(_WINDOWS):
        nll = _nll(run, index) + (window - (_WINDOWS - 1) / 2) / 50
        yield {"run_id": run["run_id"], "attempt": 1, "sample": f"window/{window}", "nll": nll, "tokens": 255}


def _layers(run: Mapping[str, Any], index: int) -> Iterator[dict[str, Any]]:
    for layer in range(_LAYERS):
        zeros = round(4096 * float(run["sparsity"] or 0))
        facts = {"layer": f"model.layers.{layer}.mlp.up_proj", "achieved": zeros / 4096, "zeros": zeros, "total": 4096}
        yield {"run_id": run["run_id"], "attempt": 1} | facts
