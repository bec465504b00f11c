"""A small store with a plan, as a sweep leaves it, written in a moment: what the tests of reports stand on.

Four methods on one model: dense, magnitude, wanda and random, nine levels, forty windows of text. Of magnitude one run
missed its sparsity, one failed and one was never run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsebench.results.store import Store

WINDOWS = 40
LEVELS = [round(0.1 * k, 1) for k in range(1, 10)]
HARM = {"magnitude": 1.0, "wanda": 0.6, "random": 3.0}  # nats at full sparsity
FLAGGED, FAILED, MISSING = "magnitude-0.7", "magnitude-0.8", "magnitude-0.9"


def nll(method: str, level: float, window: int) -> float:
    """Harm grows with the square of the level; windows differ in difficulty, and a little in how they suffer."""
    base = 2.3 + 0.02 * ((window * window) % 7) + 0.003 * (window % 11)
    if method == "dense":
        return base
    return base + HARM[method] * level**2 * (1 + 0.1 * ((7 * window) % 10 - 4.5) / 4.5)


def points() -> Iterator[tuple[str, dict[str, Any]]]:
    """(run id, planned point) of every run."""
    common = {"model": "tiny_100k", "task": "perplexity", "pattern": "unstructured", "model.outliers": False}
    yield "dense", {**common, "method": "dense", "calibration": None, "sparsity": None, "seed": None}
    for method in HARM:
        for level in LEVELS:
            seed = 0 if method == "random" else None
            calibration = "kjv" if method == "wanda" else None
            own = {"method": method, "calibration": calibration, "sparsity": level, "seed": seed}
            yield f"{method}-{level}", {**common, **own}


def plan(folder: Path, name: str) -> None:
    """Keeps the plan of ``points`` under that name."""
    kept = folder / "plans" / name
    kept.mkdir(parents=True)
    lines = [{"sweep": name, "version": "0.1.0", "runs": 0, "number": 1, "point": {}}]
    for run_id, point in points():
        words = [f"method={point['method']}", *([f"sparsity={point['sparsity']}"] if point["sparsity"] else [])]
        own = {"run_id": run_id, "sparse_model_id": f"s-{run_id}", "words": words, "group": "g", "point": point}
        lines.append(own)
    (kept / "0001.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")


def made(folder: Path, name: str = "wanda", versions: tuple[int, int] = (1, 1), only: str | None = None) -> Path:
    """The store with its plan. ``versions``: of wanda below and from sparsity 0.5; ``only``: the status of all runs."""
    plan(folder, name)
    store = Store(folder)
    for run_id, point in points():
        if run_id == MISSING:
            continue
        attempt = store.begin(run_id, {**fields(point), "sparse_model_id": f"s-{run_id}"})
        if run_id == FAILED or only == "failed":
            attempt.finish("failed", {}, error="RuntimeError: out of memory")
            continue
        version = versions[(point["sparsity"] or 0) >= 0.5] if point["method"] == "wanda" else 1
        samples = [
            {"sample": f"window/{k}", "nll": nll(point["method"], point["sparsity"] or 0, k)} for k in range(WINDOWS)
        ]
        config = {"methods": [{"label": point["method"], "name": point["method"], "version": version, "options": {}}]}
        attempt.finish(
            "ok", result(run_id, point, samples), layers=layers(point), samples=samples, config={**config, "task": None}
        )
    return folder


def fields(point: dict[str, Any]) -> dict[str, Any]:
    return {key: point[key] for key in ("method", "model", "task", "calibration", "sparsity", "pattern", "seed")}


def result(run_id: str, point: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The columns of a finished run."""
    level = point["sparsity"] or 0.0
    achieved = (
        level - 0.1 if run_id == FLAGGED else level + (0.02 if point["method"] == "wanda" and level == 0.3 else 0)
    )
    mean = sum(one["nll"] for one in samples) / len(samples)
    spread = math.sqrt(sum((one["nll"] - mean) ** 2 for one in samples) / (len(samples) - 1) / len(samples))
    return {
        "achieved": achieved,
        "flagged": run_id == FLAGGED,
        "metric": "perplexity",
        "perplexity": math.exp(mean),
        "perplexity_stderr": math.exp(mean) * spread,
        "perplexity_n": len(samples),
        "flops_prefill": 1e6 * (1 - 0.6 * achieved),
        "bytes_weights": 4e5 * (1 - 0.5 * achieved),
        "bytes_weights_dense": 4e5,
        "latency": "simulated",
        "seconds": 2.0,
        "dtype": "float32",
        "device": "cpu",
    }


def layers(point: dict[str, Any]) -> list[dict[str, Any]]:
    level = point["sparsity"]
    names = [f"model.layers.{block}.{module}" for block in (0, 1) for module in ("self_attn.q_proj", "mlp.up_proj")]
    return [{"layer": name, "achieved": level, "zeros": 10, "total": 20} for name in names] if level else []
