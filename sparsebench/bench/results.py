"""A store of a million records: how fast it answers and reports, and what memory that takes.

A synthetic store is written (records as runs leave them: a ``running`` and an ``ok`` line each) with a sweep of
10,000 runs in it. Then questions are asked in processes of their own: one method of twenty at one level, before and
after ``results compact``, and the report of the sweep.
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

from sparsebench.bench import synthetic
from sparsebench.bench.base import Report, Say
from sparsebench.declare import Declared, option
from sparsebench.errors import UserError
from sparsebench.paths import import_path

_ASK = """
import json, resource, sys
from pathlib import Path
from sparsebench.results import query
from sparsebench.results.store import Store
filters = dict(word.split("=", 1) for word in sys.argv[2:])
store = Store(Path(sys.argv[1]))
count = len(query.records(store, filters).records) if filters != {"compact": "1"} else query.compact(store)[1]
print(json.dumps([count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""
_REPORT = """
import json, resource, sys
from pathlib import Path
from sparsebench.config import Workspace
from sparsebench.reports import command
store = Path(sys.argv[1])
command.run([sys.argv[2]], {}, store, Workspace(Path(sys.argv[3])))
used = [resource.getrusage(one).ru_maxrss for one in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps([int(sys.argv[4]), max(used)]))
"""


@dataclass(frozen=True)
class Options(Declared):
    """What is measured."""

    records: int = option(1_000_000, "records of the synthetic store", low=1000, high=100_000_000)
    runs: int = option(10_000, "runs of the synthetic sweep in it (rounded up to whole levels)", low=30, high=1_000_000)


def run(options: Options, say: Say) -> Report:
    """Seconds and peak memory of each question, in a process of its own with its imports."""
    with tempfile.TemporaryDirectory(prefix="sparsebench-bench-") as folder:
        store, config = Path(folder) / "store", Path(folder) / "conf"
        say(f"writing {options.records} records")
        size = synthetic.records(store, options.records)
        say(f"planning {options.runs} runs")
        runs = synthetic.sweep(store, config, options.runs)
        rows = []
        one = ["method=method_07", "sparsity=0.5"]
        report = [synthetic.SWEEP, str(config), str(runs)]
        for what, script, words in (
            ("filter, from the shards", _ASK, one),
            ("report of the sweep, from the shards", _REPORT, report),
            ("compact", _ASK, ["compact=1"]),
            ("filter, compacted", _ASK, one),
            ("filter, one method", _ASK, ["method=method_07"]),
            ("report of the sweep, compacted", _REPORT, report),
        ):
            say(what)
            rows.append({"what": what} | _ask(script, store, words))
    facts = {"records": options.records, "runs": runs, "store": f"{size / 1e9:.2f} GB", "cores": os.cpu_count()}
    return Report(rows, facts, ["seconds include the imports of a fresh process; memory is its largest resident set"])


def _ask(script: str, store: Path, words: list[str]) -> dict[str, Any]:
    env = os.environ | {"PYTHONPATH": import_path()}
    started = time.perf_counter()
    ended = subprocess.run([sys.executable, "-c", script, str(store), *words], env=env, capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"bench results: a question failed: {ended.stderr.strip()[-300:]}")
    count, memory = json.loads(ended.stdout)
    return {"records": count, "seconds": time.perf_counter() - started, "peak MB": memory / 1024}
