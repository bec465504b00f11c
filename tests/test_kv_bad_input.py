"""Cache methods whose options do not fit: exit code 2, one line, nothing stored."""

from __future__ import annotations

import pytest

CASES = {
    "windows": ("method=snapkv", "decode if protocol=continuation"),
    "kernel": (
        "method=snapkv method.snapkv.kernel_size=4 task.protocol=continuation",
        "method.snapkv.kernel_size=4: must be odd",
    ),
    "window": (
        "method=snapkv method.snapkv.window_size=90 task.protocol=continuation task.prefill=64",
        "method.snapkv.window_size=90: the prompt has 64 tokens",
    ),
    "forced": (
        "method=streaming_llm method.streaming_llm.budget=4 task.protocol=continuation",
        "method.streaming_llm.budget=4: keeps 4 of a prompt's",
    ),
    "protected": (
        "method=kvmerger sparsity=0.9 task.protocol=continuation",
        "method.kvmerger.sparsity=0.9: keeps",
    ),
    "bytes": (
        "method=h2o method.h2o.budget_bytes=3 task.protocol=continuation",
        "method.h2o.budget_bytes=3: one token takes",
    ),
    "session": (
        "method=snapkv method.snapkv.window_size=600 task=scbench_kv task.samples=1 task.turns=1",
        "method.snapkv.window_size=600: the prompt has 5",
    ),
    "instead": (
        "method=h2o method.h2o.heavy_size=4 method.h2o.recent_size=4 method.h2o.sparsity=0 task.protocol=continuation",
        "method.h2o.heavy_size=4: is given instead of sparsity",
    ),
    "calibrated": (
        "method=kvmerger method.kvmerger.eps_mode=calibrated method.kvmerger.linkage=pivot task.protocol=continuation",
        "method.kvmerger.linkage=pivot: method.kvmerger.eps_mode=calibrated goes with",
    ),
    "dense": (
        "method=quest method.quest.dense_layers=9 task.protocol=continuation",
        "method.quest.dense_layers=9: the model has",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_cache_methods(command, case):
    words, line = CASES[case]
    given = words.split() + ([] if "task=" in words else ["task.windows=1"])
    answer = command(*given, "model=tiny_100k")
    assert answer.code == 2
    assert line in answer.err and len([one for one in answer.err.splitlines() if one.startswith("sparsebench:")]) == 1
    assert answer.records == []
