"""A store that is followed as it grows says the same as one that is read whole."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebench.results.record import encode
from sparsebench.results.store import Store
from sparsebench.results.tail import Tail

FAR = {"host": "far", "pid": 7, "pid_start": "7@far"}


def line(run_id: str, attempt: int, status: str, **more: Any) -> bytes:
    return encode({"run_id": run_id, "attempt": attempt, "status": status, **FAR, **more, "schema": 1})


def write(store: Path, shard: str, *lines: bytes) -> None:
    (store / "records").mkdir(parents=True, exist_ok=True)
    with open(store / "records" / f"{shard}.jsonl", "ab") as file:
        file.write(b"".join(lines))


def looked(store: Path) -> Tail:
    tail = Tail(store)
    tail.look()
    return tail


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_it_finds_what_the_store_finds_however_the_lines_arrive(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """Three writers make attempts of four runs; the file is looked at in the middle of lines, too."""
    dice, store = random.Random(seed), tmp_path_factory.mktemp("store")
    tail, open_attempts, lost = Tail(store), 0, set()
    for attempt in range(1, dice.randint(2, 12)):
        run_id, shard = f"run{dice.randrange(4)}", f"shard{dice.randrange(3)}"
        pid = {"pid": dice.randrange(3)}
        write(store, shard, line(run_id, attempt, "running", **pid))
        if dice.random() < 0.3:
            tail.look()
        end = dice.choice(["ok", "failed", "lost", None])
        if end is None:
            open_attempts += 1
            continue
        text = line(run_id, attempt, end, **pid)
        if end == "lost":
            lost.add((run_id, attempt))
            write(store, f"a{shard}", text)  # by another writer, whose shard is read before
            write(store, f"z{shard}", text)  # and once more
            continue
        cut = dice.randrange(len(text))
        write(store, shard, text[:cut])
        tail.look()
        write(store, shard, text[cut:])
    for one in (tail, Tail(store)):
        one.look()
        assert one.best == {record["run_id"]: record for record in Store(store).records()}
        assert sum(map(len, one.running.values())) == open_attempts
        assert one.lost.total() == len(lost), "an attempt is lost once, whoever says so"


def test_a_try_that_goes_on_shows_over_an_older_end(tmp_path: Path) -> None:
    assert looked(tmp_path).status("a") is None
    write(tmp_path, "x", line("a", 1, "running"))
    assert (looked(tmp_path).status("a"), looked(tmp_path).attempt("a")) == ("running", 0)
    write(tmp_path, "x", line("a", 1, "failed"))
    assert (looked(tmp_path).status("a"), looked(tmp_path).attempt("a")) == ("failed", 1)
    write(tmp_path, "x", line("a", 2, "running"))
    assert (looked(tmp_path).status("a"), looked(tmp_path).attempt("a")) == ("running", 1)
    write(tmp_path, "x", line("a", 2, "ok"))
    assert (looked(tmp_path).status("a"), looked(tmp_path).going("a")) == ("ok", [])


def test_an_old_try_that_nobody_ended_does_not_hide_a_newer_end(tmp_path: Path) -> None:
    write(tmp_path, "x", line("a", 1, "running"), line("a", 2, "running", pid=8), line("a", 2, "failed", pid=8))
    assert looked(tmp_path).status("a") == "failed"


def test_a_process_of_this_host_that_vanished_shows_as_lost(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.begin("a", {})
    assert looked(tmp_path).status("a") == "running"
    (shard,) = (tmp_path / "records").iterdir()
    text = shard.read_text().replace('"pid_start":"', '"pid_start":"before-')
    shard.write_text(text)
    assert looked(tmp_path).status("a") == "lost"


def test_a_shard_that_is_removed_meanwhile_is_no_error(tmp_path: Path) -> None:
    write(tmp_path, "x", line("a", 1, "ok"))
    tail = looked(tmp_path)
    (tmp_path / "records" / "x.jsonl").unlink()
    tail.look()
    assert tail.status("a") == "ok"
