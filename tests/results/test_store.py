"""The store: which line is a run's record, and that no crash, neighbour or bad byte loses a finished one."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebench.errors import UserError
from sparsebench.results import record
from sparsebench.results.store import Store

FIELDS = {"method": "wanda", "model": "tiny_1m", "sparsity": 0.5}
RANK = {"running": 0, "failed": 1, "lost": 1, "ok": 2}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def ok(store: Store, run_id: str, /, **fields: Any) -> dict[str, Any]:
    return store.begin(run_id, FIELDS).finish("ok", fields)


def shards(store: Store, kind: str = "records") -> list[Path]:
    return sorted((store.folder / kind).glob("*.jsonl"))


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


def test_nothing_is_made_before_the_first_begin(store: Store) -> None:
    store.check_writable()
    assert store.find("a") is None and store.records() == [] and store.details("layers", "a", 1) == []
    assert not store.folder.exists()


def test_finish_returns_what_is_read_back(store: Store) -> None:
    attempt = store.begin("a", FIELDS)
    assert attempt.number == 1
    assert store.find("a")["status"] == "running"  # type: ignore[index]
    layers = [{"layer": f"model.layers.{i}.q", "achieved": 0.5} for i in range(3)]
    written = attempt.finish(
        "ok",
        {"achieved": numpy.float32(0.5), "perplexity": 1 / 3, "warnings": ["one", "two"], "flagged": False},
        layers=layers,
        samples=[{"sample": "s0", "nll": 1.5}],
        config={"method": {"wanda": {"norm": "l1"}}},
    )
    assert Store(store.folder).find("a") == written == Store(store.folder).records()[0]
    assert written["status"] == "ok" and written["attempt"] == 1 and written["method"] == "wanda"
    assert written["perplexity"] == 1 / 3 and written["achieved"] == 0.5 and written["warnings"] == "one; two"
    assert store.details("layers", "a", 1) == [{"run_id": "a", "attempt": 1, **row} for row in layers]
    assert store.details("samples", "a", 1) == [{"run_id": "a", "attempt": 1, "sample": "s0", "nll": 1.5}]
    assert store.details("configs", "a", 1)[0]["config"] == {"method": {"wanda": {"norm": "l1"}}}
    assert store.details("errors", "a", 1) == store.details("layers", "a", 2) == []
    assert store.torn == 0


def test_a_failed_run_keeps_its_traceback(store: Store) -> None:
    trace = "Traceback (most recent call last):\n  File ...\nValueError: ein Maß \udc80\n"
    written = store.begin("a", FIELDS).finish("failed", {}, error=trace)
    assert written["error"] == "ValueError: ein Maß ?"
    assert store.details("errors", "a", 1)[0]["error"] == trace.replace("\udc80", "?")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, numpy.float64("nan"), numpy.array(math.inf)])
def test_what_is_not_finite_is_null(store: Store, value: Any) -> None:
    store.begin("a", FIELDS).finish(
        "failed", {"perplexity": value}, samples=[{"sample": 0, "nll": value}], config={"x": [value]}
    )
    assert store.find("a")["perplexity"] is None  # type: ignore[index]
    assert store.details("samples", "a", 1)[0]["nll"] is None
    assert store.details("configs", "a", 1)[0]["config"] == {"x": [None]}
    assert not re.search("NaN|Infinity", "".join(path.read_text() for path in store.folder.rglob("*.jsonl")))


def test_store_columns_cannot_be_overwritten(store: Store) -> None:
    written = store.begin("a", {"attempt": 7, "status": "ok"}).finish("ok", {"run_id": "b", "pid": 0, "schema": 9})
    assert (written["run_id"], written["attempt"], written["pid"], written["schema"]) == ("a", 1, os.getpid(), 1)


def test_finish_is_once_and_final(store: Store) -> None:
    attempt = store.begin("a", FIELDS)
    with pytest.raises(ValueError, match="running"):
        attempt.finish("running", {})
    attempt.finish("ok", {})
    with pytest.raises(RuntimeError, match="finished already"):
        attempt.finish("failed", {})
    with pytest.raises(ValueError, match="kind"):
        store.details("records", "a", 1)


def test_a_record_is_a_documented_line_of_about_1_kb(store: Store) -> None:
    fields = {name: 1234567890.125 for name in record.COLUMNS if name != record.SCORES}
    written = ok(store, "f" * 16, **fields, perplexity=9.87654321, perplexity_stderr=0.1, perplexity_n=64)
    names = list(record.COLUMNS)
    at = names.index(record.SCORES)
    assert list(written) == [*names[:at], "perplexity", "perplexity_stderr", "perplexity_n", *names[at + 1 :]]
    assert len(shards(store)[0].read_bytes().splitlines()[-1]) < 2560  # no run has all of the columns


def test_attempts_count_up_and_the_last_ok_wins(store: Store) -> None:
    store.begin("a", FIELDS).finish("failed", {"seconds": 1})
    ok(store, "a", seconds=2)
    ok(Store(store.folder), "a", seconds=3)
    assert Store(store.folder).begin("a", FIELDS).finish("failed", {})["attempt"] == 4
    assert store.begin("a", FIELDS).number == 5
    assert (store.find("a") or {})["seconds"] == 3
    assert len(store.records()) == 1


def test_an_id_inside_another_value_is_not_that_run(store: Store) -> None:
    ok(store, "b", sparse_model_id="a")
    assert store.find("a") is None
    assert store.begin("a", FIELDS).number == 1


lines = st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.sampled_from(record.STATUSES))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(lines, max_size=8), min_size=1, max_size=4),
    st.lists(st.integers(0, 400), min_size=4, max_size=4),
    st.lists(st.binary(max_size=12), min_size=4, max_size=4),
)
def test_rule_over_torn_shards(
    content: list[list[tuple[str, int, str]]], cuts: list[int], garbage: list[bytes]
) -> None:
    with TemporaryDirectory() as folder:
        store, whole, torn = Store(Path(folder)), [], 0
        (store.folder / "records").mkdir()
        for index, shard in enumerate(content):
            data = b"".join(
                record.encode({"run_id": run, "attempt": attempt, "status": status, "schema": 1, "x": "}, {"})
                for run, attempt, status in shard
            )
            data = data[: len(data) - cuts[index] % (len(data) + 1)]
            intact = data.count(b"\n")
            data += garbage[index]
            (store.folder / "records" / f"{index}.jsonl").write_bytes(data)
            complete, tail = data.split(b"\n")[:-1], data.split(b"\n")[-1]
            found = [line for line in map(_naive, complete) if line]
            assert found[:intact] == shard[:intact]
            whole += found
            torn += len(complete) - len(found) + bool(tail)
        expected = {
            run: max((RANK[status], attempt) for one, attempt, status in whole if one == run)
            for run in dict.fromkeys(run for run, _, _ in whole)
        }
        records = store.records()
        assert store.torn == torn
        assert {one["run_id"]: (RANK[one["status"]], one["attempt"]) for one in records} == expected
        assert [one["run_id"] for one in records] == list(expected)  # order of first appearance
        assert [store.find(run) for run in expected] == records


def _naive(text: bytes) -> tuple[str, int, str] | None:
    try:
        line = json.loads(text)
        return line["run_id"], line["attempt"], line["status"]
    except (ValueError, TypeError, KeyError):
        return None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=40) | st.sampled_from([b"{}", b"[1]", b'{"run_id":1}', b'{"a":[{"b":1}', b"{" * 9])))
def test_garbled_lines_never_raise_nor_hide_their_neighbours(garbage: list[bytes]) -> None:
    good = [record.encode({"run_id": f"r{i}", "attempt": 1, "status": "ok", "schema": 1}) for i in range(3)]
    with TemporaryDirectory() as folder:
        store = Store(Path(folder))
        (store.folder / "records").mkdir()
        data = good[0] + b"\n".join(garbage) + b"\n" + good[1] + good[2]
        (store.folder / "records" / "x.jsonl").write_bytes(data)
        assert [one["run_id"] for one in store.records()] == ["r0", "r1", "r2"]
        assert store.torn == data.count(b"\n") - 3
        assert all(store.find(f"r{i}") for i in range(3))


def test_deep_brackets_are_garbage(store: Store) -> None:
    ok(store, "a")
    (store.folder / "records" / "x.jsonl").write_bytes(b'{"run_id":"a","x":' + b"[" * 200_000 + b"}\n")
    assert store.find("a")["status"] == "ok"  # type: ignore[index]
    assert store.torn == 1


def test_one_who_was_thought_lost_has_reported(store: Store) -> None:
    line = {"run_id": "a", "attempt": 1, "schema": 1}
    (store.folder / "records").mkdir(parents=True)
    for name, status in (("a", "lost"), ("b", "failed"), ("c", "running")):
        (store.folder / "records" / f"{name}.jsonl").write_bytes(record.encode({**line, "status": status}))
    assert store.find("a")["status"] == "failed"  # type: ignore[index]


LOOP = """
import sys
from pathlib import Path
from sparsebench.results.store import Store
store, number = Store(Path(sys.argv[1])), 0
while True:
    run = f"{sys.argv[2]}-{number}"
    attempt = store.begin(run, {"method": "wanda"})
    attempt.finish("ok", {"x": 1.5}, samples=[{"sample": i} for i in range(50)], config={"a": 1})
    print(run, flush=True)
    number += 1
"""


def test_kill_9_loses_at_most_the_run_in_flight(store: Store) -> None:
    choose, done = random.Random(0), []
    for turn in range(3):
        process = python(LOOP, str(store.folder), str(turn))
        assert process.stdout is not None
        done.append(process.stdout.readline().strip())
        time.sleep(choose.uniform(0, 0.15))
        process.kill()
        done += process.communicate()[0].split()
    records = {one["run_id"]: one["status"] for one in Store(store.folder).records()}
    assert {run: records.get(run) for run in done} == dict.fromkeys(done, "ok")
    beyond = [run for run in records if run not in done]  # at most one a turn, finished or not
    assert len({run.split("-")[0] for run in beyond}) == len(beyond)
    assert all(len(store.details("samples", run, 1)) == 50 for run in done[:3] + done[-3:])


STOP_AFTER_BEGIN = """
import sys, time
from pathlib import Path
from sparsebench.results.store import Store
Store(Path(sys.argv[1])).begin("a", {"method": "wanda"})
print("begun", flush=True)
time.sleep(60)
"""


def test_the_dead_are_declared_lost_and_the_living_are_not(store: Store) -> None:
    process = python(STOP_AFTER_BEGIN, str(store.folder))
    assert process.stdout is not None and process.stdout.readline()
    attempt = store.begin("a", FIELDS)
    assert attempt.number == 2
    assert (store.find("a") or {})["status"] == "running"  # nobody is lost: the other one lives
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, yet still a zombie
    assert store.begin("a", FIELDS).number == 3
    found = store.find("a") or {}
    assert (found["status"], found["attempt"], found["pid"]) == ("lost", 1, process.pid)
    assert str(process.pid) in found["error"]
    process.communicate()
    store.begin("a", FIELDS)
    assert sum(b'"lost"' in line for path in shards(store) for line in path.read_bytes().splitlines()) == 1
    attempt.finish("ok", {})
    assert (store.find("a") or {})["attempt"] == 2


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_recycled_pid_is_another_process(store: Store) -> None:
    store.begin("a", FIELDS)
    path = shards(store)[0]
    path.write_text(re.sub(r'"pid_start":"\d+', '"pid_start":"1', path.read_text()))
    Store(store.folder).begin("a", FIELDS)
    assert (store.find("a") or {})["status"] == "lost"


def test_another_host_is_never_declared_lost(store: Store) -> None:
    store.begin("a", FIELDS)
    path = shards(store)[0]
    text = re.sub(
        r'"host":"[^"]*"', '"host":"elsewhere"', re.sub(r'"pid_start":"\d+', '"pid_start":"1', path.read_text())
    )
    path.write_text(text)
    Store(store.folder).begin("a", FIELDS)
    assert (store.find("a") or {})["status"] == "running"


TWENTY = """
import sys
from pathlib import Path
from sparsebench.results.store import Store
store = Store(Path(sys.argv[1]))
for number in range(20):
    for run in (f"shared-{number}", f"{sys.argv[2]}-{number}"):
        rows = [{"sample": i, "by": sys.argv[2]} for i in range(5)]
        store.begin(run, {}).finish("ok", {"by": sys.argv[2]}, samples=rows)
"""


def test_two_writers_at_once(store: Store) -> None:
    processes = [python(TWENTY, str(store.folder), name) for name in ("p", "q")]
    while any(process.poll() is None for process in processes):
        assert all(one["status"] in ("ok", "running") for one in store.records())
    assert [process.communicate()[0] for process in processes] == ["", ""]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(shards(store)) == 2
    records = store.records()
    assert store.torn == 0
    assert len(records) == 60 and {one["status"] for one in records} == {"ok"}
    for one in records:  # also where both made the same attempt, rows belong to the record
        rows = store.details("samples", one["run_id"], one["attempt"])
        assert [(row["sample"], row["by"]) for row in rows] == [(i, one["by"]) for i in range(5)]
    frame = pandas.concat([pandas.read_json(path, lines=True) for path in shards(store)])
    assert (frame.status == "ok").sum() == 80


def test_a_forked_child_writes_its_own_shard(store: Store) -> None:
    ok(store, "a")
    child = os.fork()
    if child == 0:
        ok(store, "b")
        os._exit(0)
    os.waitpid(child, 0)
    ok(store, "c")
    assert len(shards(store)) == 2 and len(store.records()) == 3


def test_a_torn_shard_is_never_appended_to(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = store.begin("a", FIELDS)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            attempt.finish("ok", {}, samples=[{"sample": 1}])
        with pytest.raises(UserError, match=r"store=.*No space left on device"):
            store.begin("b", FIELDS)
    broken = shards(store, "samples")[0]
    broken.write_bytes(broken.read_bytes()[:-5])
    attempt.finish("ok", {}, samples=[{"sample": 1}])
    assert store.details("samples", "a", 1) == [{"run_id": "a", "attempt": 1, "sample": 1}]
    assert (store.find("a") or {})["status"] == "ok"
    assert len(shards(store, "samples")) == 2


def test_a_file_in_the_way(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match=r"store=.*is not a folder"):
        Store(file)
    for act in (Store.check_writable, lambda store: store.begin("a", FIELDS), Store.records):
        with pytest.raises(UserError, match=r"^store=[^\n]*$"):
            act(Store(file / "below"))
    store = Store(tmp_path / "store")
    store.folder.mkdir()
    (store.folder / "samples").write_text("x")
    with pytest.raises(UserError, match=r"store=.*cannot be written"):
        store.check_writable()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_read_only_place() -> None:
    store = Store(Path("/proc/store"))
    for act in (store.check_writable, lambda: store.begin("a", FIELDS)):
        with pytest.raises(UserError, match="store=/proc/store: cannot be written"):
            act()
    assert store.records() == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(store: Store) -> None:
    ok(store, "a")
    folders = [store.folder, store.folder / "records"]
    for folder in folders:
        folder.chmod(0o555)
    try:
        with pytest.raises(UserError, match="cannot be written: Permission denied"):
            store.check_writable()
        assert Store(store.folder).find("a")  # reading needs no permission to write
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_the_store_needs_no_torch() -> None:
    code = (
        "import sys, sparsebench.results.store, sparsebench.results.view\n"
        "print(sorted({'torch', 'transformers', 'pandas', 'pyarrow', 'numpy', 'rich'} & set(sys.modules)))"
    )
    assert python(code).communicate()[0].strip() == "[]"
