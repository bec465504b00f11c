"""The verb ``bench``: what there is, bad input, and the overhead of the orchestration measured for real."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from commands import Command

from sparsebench.bench import base, sweep
from sparsebench.bench import command as bench


def test_every_benchmark_is_listed_with_what_it_measures(command: Command) -> None:
    answer = command("bench")
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert [line.split()[1] for line in lines] == bench.names()
    assert all(len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["swep"], "bench swep: unknown benchmark"),
        (["sweep", "runs=3"], "runs=3"),
        (["sweep", "colour=red"], "colour: unknown option of bench sweep"),
        (["sweep", "format=csv"], "format=csv: valid: table, json"),
        (["sweep", "runs=20,30"], "runs: takes one value"),
    ],
)
def test_mistakes_are_one_line(command: Command, words: list[str], message: str) -> None:
    answer = command("bench", *words)
    assert answer.code == 2
    assert message in answer.err
    assert answer.err.count("\n") == 1


def test_a_report_as_table_and_as_json(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    rows = [{"what": "dense", "ratio": None}, {"what": "bitmap", "ratio": 2.34567}]
    monkeypatch.setattr(sweep, "run", lambda options, say: base.Report(rows, {"cores": options.runs}, ["a note"]))
    answer = command("bench", "sweep", "runs=20")
    assert answer.out.splitlines() == ["cores: 20", "  what  ratio", " dense      -", "bitmap  2.346", "a note"]
    found = json.loads(command("bench", "sweep", "format=json").out)
    assert found == {"rows": rows, "facts": {"cores": 100}, "notes": ["a note"]}


def test_threads_that_share_a_core_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"what": "own", "verdict": "ok"}, {"what": "bitmap", "verdict": "noisy"}]
    assert base.judged(rows, base.spread(1)) == rows and base.spread(1) == {"threads": 1}
    assert base.judged(rows, {"threads": 2, "threads_gain": 1.9}) == rows
    assert {row["verdict"] for row in base.judged(rows, {"threads": 2, "threads_gain": 1.05})} == {"stacked"}
    monkeypatch.setattr(base, "_READ", 1 << 20)
    assert base.spread(2)["threads"] == 2 and base.spread(2)["threads_gain"] > 0


def test_binding_threads_to_cores_leaves_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    base.bound()
    assert "OMP_PROC_BIND" not in os.environ
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    base.bound()
    assert os.environ["OMP_PROC_BIND"] == "close"


def test_runs_that_do_nothing_go_through_the_engine(tmp_path: Path) -> None:
    assert 0 < sweep._idle(25, tmp_path) < 5
