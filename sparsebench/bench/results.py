"""A store of a million records: how fast it answers, and what memory it takes.

A synthetic store is written (records as runs leave them: a ``running`` and an ``ok`` line each), then questions are
asked in processes of their own: one method of twenty at one level, before and after ``results compact``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsebench.bench.base import Report, Say
from sparsebench.declare import Declared, option
from sparsebench.errors import UserError
from sparsebench.paths import import_path
from sparsebench.results.record import SCHEMA, encode

METHODS, LEVELS, SHARDS = 20, 50, 16

_ASK = """
import json, resource, sys, time
from pathlib import Path
started = time.perf_counter()
from sparsebench.results import query
from sparsebench.results.store import Store
filters = dict(word.split("=", 1) for word in sys.argv[2:])
store = Store(Path(sys.argv[1]))
count = len(query.records(store, filters).records) if filters != {"compact": "1"} else query.compact(store)[1]
seconds = time.perf_counter() - started
print(json.dumps([count, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


@dataclass(frozen=True)
class Options(Declared):
    """What is measured."""

    records: int = option(1_000_000, "records of the synthetic store", low=1000, high=100_000_000)


def run(options: Options, say: Say) -> Report:
    """Seconds and peak memory of each question, in a process of its own with its imports."""
    with tempfile.TemporaryDirectory(prefix="sparsebench-bench-") as folder:
        store = Path(folder) / "store"
        say(f"writing {options.records} records")
        size = write(store, options.records)
        rows = []
        one = ["method=method_07", "sparsity=0.5"]
        for what, words in (
            ("filter, from the shards", one),
            ("compact", ["compact=1"]),
            ("filter, compacted", one),
            ("filter, one method", ["method=method_07"]),
        ):
            say(what)
            rows.append({"what": what} | _ask(store, words))
    facts = {"records": options.records, "store": f"{size / 1e9:.2f} GB", "cores": os.cpu_count()}
    return Report(rows, facts, ["seconds include the imports of a fresh process; memory is its largest resident set"])


def write(store: Path, count: int) -> int:
    """A synthetic store of ``count`` runs in ``SHARDS`` shards; its bytes."""
    (store / "records").mkdir(parents=True)
    size = 0
    for shard in range(SHARDS):
        with open(store / "records" / f"host-{shard:05}-20260101T000000-{shard:016x}.jsonl", "wb") as file:
            for index in range(shard, count, SHARDS):
                size += file.write(b"".join(_lines(index)))
    return size


def _lines(index: int) -> list[bytes]:
    """The two lines of one run, about as long as real ones."""
    running: dict[str, Any] = {
        "run_id": f"{index:016x}",
        "sparse_model_id": f"{index:016x}"[::-1],
        "method": f"method_{index % METHODS:02}",
        "model": f"model_{index // METHODS % 7}",
        "calibration": "kjv",
        "task": "perplexity",
        "sparsity": round(index // METHODS % LEVELS / LEVELS, 4),
        "pattern": "unstructured",
        "seed": index % 3,
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
    value = 10 + index % 997 / 100
    done = running | {
        "status": "ok",
        "achieved": running["sparsity"],
        "achieved_model": running["sparsity"] * 0.6,
        "flagged": False,
        "metric": "perplexity",
        **{f"{name}{end}": value for name in ("perplexity", "nll", "bits_per_byte") for end in ("", "_stderr", "_n")},
        **dict.fromkeys(("flops_prefill", "flops_prefill_dense", "flops_decode", "flops_decode_dense"), 1234567.0),
        **dict.fromkeys(("bytes_weights", "bytes_weights_dense", "kv_bytes_per_token", "bytes_decode"), 123456),
        "cost_length": 1024,
        "bytes_format": "bitmap",
        "latency": "simulated",
        "seconds": 12.5,
        "device": "cpu",
        "dtype": "float32",
    }
    return [encode(running), encode(done)]


def _ask(store: Path, words: list[str]) -> dict[str, Any]:
    env = os.environ | {"PYTHONPATH": import_path()}
    started = time.perf_counter()
    ended = subprocess.run([sys.executable, "-c", _ASK, str(store), *words], env=env, capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"bench results: a question failed: {ended.stderr.strip()[-300:]}")
    count, _, memory = json.loads(ended.stdout)
    return {"records": count, "seconds": time.perf_counter() - started, "peak MB": memory / 1024}
