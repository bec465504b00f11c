"""Leases: one owner at a time, void once the owner is gone, one successor."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsebench.errors import UserError
from sparsebench.sweep.lease import Leases

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
RACERS = 8


def in_child(work: Callable[[], int]) -> int:
    """Runs ``work`` in a forked process whose exit code is what it returned; its pid."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return pid


def code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def race(store: Path, rounds: int) -> list[int]:
    """How many of eight racing processes took each run. A winner holds until all have tried."""
    start, done = store / "start", store / "done"
    store.mkdir(exist_ok=True)

    def racer() -> int:
        while not start.exists():
            pass
        leases = Leases(store)
        won = 0
        for number in range(rounds):
            won += leases.take(f"run{number}") << number
        (store / f"tried-{os.getpid()}").touch()
        while not done.exists():
            time.sleep(0.001)
        return won

    racers = [in_child(racer) for _ in range(RACERS)]
    start.touch()
    while len(list(store.glob("tried-*"))) < RACERS:
        time.sleep(0.001)
    done.touch()
    codes = [code_of(pid) for pid in racers]
    for file in (start, done, *store.glob("tried-*")):
        file.unlink()
    return [sum(code >> number & 1 for code in codes) for number in range(rounds)]


def test_of_eight_racing_processes_one_wins_and_of_eight_successors_one(tmp_path: Path) -> None:
    assert race(tmp_path, 6) == [1] * 6
    # Its owners are gone now without having given back anything, so all of it can be taken over, once each.
    assert all(Leases(tmp_path).abandoned(f"run{number}") for number in range(6))
    assert race(tmp_path, 6) == [1] * 6


def test_a_lease_ends_with_its_process(tmp_path: Path) -> None:
    reading, writing = os.pipe()

    def owner() -> int:
        assert Leases(tmp_path).take("run")
        os.write(writing, b"x")
        time.sleep(60)
        return 0

    pid = in_child(owner)
    os.read(reading, 1)
    leases = Leases(tmp_path)
    assert leases.held("run")
    assert not leases.take("run")
    os.kill(pid, signal.SIGKILL)
    assert code_of(pid) == -signal.SIGKILL
    assert not leases.held("run")
    assert leases.abandoned("run")
    assert leases.take("run")
    assert leases.held("run")


def test_what_is_given_back_can_be_taken_again(tmp_path: Path) -> None:
    one, other = Leases(tmp_path), Leases(tmp_path)
    assert not one.held("run")
    assert one.owner("run") is None
    assert one.take("run")
    assert not one.take("run")
    assert not other.take("run")
    one.release("run")
    assert not one.held("run")
    assert not one.abandoned("run")
    assert other.take("run")


def test_one_who_was_thought_dead_does_not_give_back_its_successors_lease(tmp_path: Path) -> None:
    cut_off = Leases(tmp_path)
    assert cut_off.take("run")
    successor = Leases(tmp_path, gone=lambda owner: True)
    assert successor.take("run")
    cut_off.release("run")
    assert Leases(tmp_path).held("run")


def owned_elsewhere(store: Path, **more: Any) -> None:
    (store / "leases" / "run").mkdir(parents=True)
    owner = {"host": "far", "pid": 1, "pid_start": "1@far", "job": None, **more}
    (store / "leases" / "run" / "1").write_text(json.dumps(owner))


def test_the_queue_decides_about_other_hosts(tmp_path: Path) -> None:
    owned_elsewhere(tmp_path, job="a_1")
    assert not Leases(tmp_path).take("run")
    assert not Leases(tmp_path, gone=lambda owner: owner["job"] == "a_2").take("run")
    assert Leases(tmp_path, gone=lambda owner: owner["job"] == "a_1").take("run")


def test_a_requeued_job_takes_over_from_itself_only(tmp_path: Path) -> None:
    owned_elsewhere(tmp_path, job="a_1")
    assert not Leases(tmp_path, "a_1").take("run")
    assert not Leases(tmp_path, "a_2", again=True).take("run")
    again = Leases(tmp_path, "a_1", again=True)
    assert again.take("run")
    assert not again.take("run"), "its own lease of this start is not void"


def test_only_what_was_ever_leased_needs_a_look(tmp_path: Path) -> None:
    leases = Leases(tmp_path)
    assert leases.taken() == set()
    leases.take("run")
    assert leases.taken() == {"run"}


def test_a_store_that_refuses_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "leases").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"store=.*cannot be written"):
        Leases(tmp_path).take("run")
