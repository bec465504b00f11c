"""The engine: whatever dies, the plan ends, nothing is made twice at once, and what is lost is known."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sweep_world as world
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sparsebench.errors import UserError
from sparsebench.results.store import Store
from sparsebench.results.tail import Tail
from sparsebench.sweep import chunk as chunk_module
from sparsebench.sweep import engine as engine_module
from sparsebench.sweep.chunk import Chunk
from sparsebench.sweep.engine import Engine, cancel_file
from sparsebench.sweep.launch import ClusterOptions
from sparsebench.sweep.lease import Leases
from sparsebench.sweep.plan import Plan, Planned

TOP = Path(__file__).parents[2]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def statuses(folder: Path) -> dict[str, str]:
    return {record["run_id"]: record["status"] for record in Store(folder).records()}


def ended_lines(folder: Path) -> list[dict[str, Any]]:
    """Every line of the store but the ``running`` ones."""
    tail = Tail(folder)
    found: list[dict[str, Any]] = []
    tail._add = found.append  # type: ignore[method-assign]
    tail.look()
    return [line for line in found if line["status"] != "running"]


# -- with real processes -----------------------------------------------------------------------------------------


@needs_fork
def test_each_kind_of_end_is_told_apart_and_touches_no_other_run(tmp_path: Path) -> None:
    special = {2: "fail", 5: "die_once", 8: "die", 11: "die_early_once", 14: "die_early"}
    runs = [world.planned(number, special.get(number, "")) for number in range(18)]
    launcher = world.Forked(3)
    counts = Engine(world.plan_of(runs), Store(tmp_path), launcher, world.FAST).run()
    assert counts == {"ok": 15, "failed": 1, "lost": 2}
    found = statuses(tmp_path)
    ids = {word: world.planned(number).run_id for number, word in special.items()}
    assert {word: found[run_id] for word, run_id in ids.items()} == {
        "fail": "failed", "die_once": "ok", "die": "lost", "die_early_once": "ok", "die_early": "lost",
    }  # fmt: skip
    made = world.attempts_made(tmp_path)
    assert made[ids["fail"]] == 1, "a failure is not tried again by itself"
    assert made[ids["die_once"]] == 2
    assert made[ids["die"]] == 1 + world.FAST.retries
    assert all(made[run_id] == 1 for run_id in found if run_id not in ids.values())
    assert lost_counts(tmp_path) == {ids["die_once"]: 1, ids["die"]: 3, ids["die_early_once"]: 1, ids["die_early"]: 3}
    later = [group for group in launcher.chunks if ids["die"] in group or ids["die_early"] in group]
    assert sorted(map(len, later))[:4] == [1, 1, 1, 1], "lost runs are tried again alone"
    assert world.overlaps(tmp_path) == []


def lost_counts(folder: Path) -> dict[str, int]:
    tail = Tail(folder)
    tail.look()
    return {run_id: count for run_id, count in tail.lost.items() if count}


@needs_fork
def test_a_failure_is_made_again_only_when_asked_for(tmp_path: Path) -> None:
    runs = [world.planned(0, "fail"), world.planned(1)]
    plan = world.plan_of(runs)
    for _ in range(2):
        counts = Engine(plan, Store(tmp_path), world.Forked(1), world.FAST).run()
        assert counts == {"ok": 1, "failed": 1}
    assert world.attempts_made(tmp_path)[runs[0].run_id] == 1
    Engine(plan, Store(tmp_path), world.Forked(1), world.FAST, redo={runs[0].run_id}).run()
    assert world.attempts_made(tmp_path) == {runs[0].run_id: 2, runs[1].run_id: 1}


@needs_fork
def test_a_failure_that_somebody_else_has_just_made_is_not_made_again(tmp_path: Path) -> None:
    run = world.planned(0, "fail")
    chunk = world.StubChunk.of(tmp_path, None, [run], {})
    assert chunk() == {run.run_id: "failed"}
    assert chunk() == {}
    again = world.StubChunk.of(tmp_path, None, [run], {run.run_id: 1})
    assert again() == {run.run_id: "failed"}


def test_a_run_that_its_last_owner_finished_while_we_looked_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Leases):
        def take(self, run_id: str) -> bool:
            Store(tmp_path).begin(run_id, {}).finish("ok", {})
            return super().take(run_id)

    monkeypatch.setattr(chunk_module, "Leases", Late)
    run = world.planned(0)
    assert world.StubChunk.of(tmp_path, None, [run])() == {}
    assert not (tmp_path / "journal").exists()
    assert not Leases(tmp_path).held(run.run_id)


@needs_fork
def test_workers_that_never_begin_a_run_end_the_sweep_with_a_message(tmp_path: Path) -> None:
    class Barren(world.Forked):
        def start(self, chunks: Sequence[Chunk], label: str) -> list[str]:
            return super().start([Chunk(str(tmp_path / "nowhere"), None, []) for _ in chunks], label)

    engine = Engine(world.plan_of([world.planned(0)]), Store(tmp_path), Barren(1), ClusterOptions(poll=0.001))
    with pytest.raises(UserError, match="without beginning a run; logs:"):
        engine.run()


@needs_fork
def test_two_engines_at_once_share_the_work(tmp_path: Path) -> None:
    runs = [world.planned(number, "fail" if number % 10 == 0 else "nap") for number in range(40)]

    def engine() -> int:
        options = ClusterOptions(poll=0.002, chunk_minutes=0.001)
        counts = Engine(world.plan_of(runs), Store(tmp_path), world.Forked(2), options).run()
        return 0 if counts == {"ok": 36, "failed": 4} else 1

    children = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            code = 9
            try:
                code = engine()
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    assert set(world.attempts_made(tmp_path).values()) == {1}


@needs_fork
def test_ctrl_c_leaves_the_workers_and_the_next_engine_waits_for_what_they_hold(tmp_path: Path) -> None:
    runs = [world.planned(number, "nap") for number in range(30)]
    looks = iter(range(100))

    def interrupt(counts: Counter[str], left: float | None) -> None:
        if counts["ok"] >= 3 or next(looks) > 90:
            raise KeyboardInterrupt

    launcher = world.Forked(2)
    with pytest.raises(KeyboardInterrupt):
        Engine(world.plan_of(runs), Store(tmp_path), launcher, world.FAST, look=interrupt).run()
    assert launcher.alive(), "the workers outlive the engine"
    counts = Engine(world.plan_of(runs), Store(tmp_path), world.Forked(2), world.FAST).run()
    assert counts == {"ok": 30}
    assert set(world.attempts_made(tmp_path).values()) == {1}
    while launcher.alive():
        time.sleep(0.001)


@needs_fork
def test_a_cancelled_sweep_stops_and_can_be_started_again(tmp_path: Path) -> None:
    runs = [world.planned(number, "nap") for number in range(10)]
    file = cancel_file(tmp_path, "toy")

    def cancel(counts: Counter[str], left: float | None) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    launcher = world.Forked(2)
    with pytest.raises(KeyboardInterrupt):
        Engine(world.plan_of(runs), Store(tmp_path), launcher, world.FAST, look=cancel).run()
    counts = Engine(world.plan_of(runs), Store(tmp_path), world.Forked(2), world.FAST).run()
    assert counts == {"ok": 10}
    while launcher.alive():
        time.sleep(0.001)


@needs_fork
def test_killed_at_random_moments_it_always_converges(tmp_path: Path) -> None:
    """Engine and workers are killed 20 times, each time at another moment; then the same command ends the plan."""
    dice, kills, met, store, count = random.Random(1), 0, 0, tmp_path / "store", 80
    words = [sys.executable, str(Path(world.__file__)), str(store), str(count)]
    around = {**os.environ, "PYTHONPATH": str(TOP)}
    before: dict[str, str] = {}
    while kills < 20:
        lines = journal_lines(store)
        with subprocess.Popen([*words, str(kills)], env=around, start_new_session=True) as engine:
            wanted, deadline = lines + dice.randrange(8), time.monotonic() + 5
            while engine.poll() is None and journal_lines(store) < wanted and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(dice.uniform(0.0, 0.02))
            workers = children_of(engine.pid)
            met += engine.poll() is None
            engine.kill()
            for pid in workers if dice.random() < 0.7 else ():  # sometimes the workers live on
                os.kill(pid, signal.SIGKILL)
        kills += 1
        now = statuses(store)
        assert all(now[run_id] == status for run_id, status in before.items() if status == "ok")
        before = now
    assert met >= 10, "too few of the kills met an engine at work to show anything"
    subprocess.run([*words, "99"], env=around, check=True, timeout=60)
    expected = {run.run_id: {("fail",): "failed", ("die",): "lost"}.get(run.words, "ok") for run in world.many(count)}
    assert statuses(store) == expected
    ok = Counter(line["run_id"] for line in ended_lines(store) if line["status"] == "ok")
    assert set(ok.values()) == {1}, "no run was finished twice"
    failed = Counter(line["run_id"] for line in ended_lines(store) if line["status"] == "failed")
    assert set(failed.values()) == {1}
    assert world.overlaps(store) == []


def journal_lines(store: Path) -> int:
    file = store / "journal"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def children_of(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(one) for one in task.read_text().split()]
    return found


# -- in a simulated world ----------------------------------------------------------------------------------------


class Death(BaseException):
    """A simulated kill -9."""


@dataclass
class World:
    """A launcher on another host, whose workers run when they are looked at, and die when the dice say so."""

    deaths: random.Random
    rate: float
    slots: int = 2
    waiting: dict[str, Chunk] = field(default_factory=dict)
    number: int = 0
    pid: int = 1000
    here: int = 1
    living: set[int] = field(default_factory=lambda: {1})

    @property
    def width(self) -> int:
        return self.slots

    def process(self) -> dict[str, Any]:
        return {"host": "sim", "pid": self.here, "pid_start": f"{self.here}@sim"}

    def start(self, chunks: Sequence[Chunk], label: str) -> list[str]:
        room = list(chunks)[: self.deaths.randint(1, len(chunks))]  # a queue need not take all
        names = []
        for chunk in room:
            self.number += 1
            chunk.job = f"sim_{self.number}"
            self.waiting[chunk.job] = chunk
            names.append(chunk.job)
        return names

    def attach(self) -> dict[str, list[str]]:
        return {name: chunk.run_ids() for name, chunk in self.waiting.items()}

    def alive(self) -> set[str]:
        """One of the waiting chunks runs, to its end or its death."""
        if self.waiting:
            name = self.deaths.choice(sorted(self.waiting))
            self.work(self.waiting.pop(name))
        return set(self.waiting)

    def work(self, chunk: Chunk) -> None:
        self.pid += 1
        self.here = self.pid
        self.living.add(self.here)
        try:
            SimChunk(**vars(chunk))()
        except Death:
            pass
        finally:
            self.living.discard(self.here)
            self.here = 1

    def gone(self, owner: Any) -> bool:
        return owner["pid"] not in self.living

    def fate(self, owner: Any) -> str:
        return "died"

    def withdrawn(self, job: str) -> bool:
        return False

    def stop(self) -> None:
        self.waiting.clear()

    def maybe(self) -> None:
        """A moment at which the worker can die."""
        if self.here != 1 and self.deaths.random() < self.rate:
            raise Death


WORLD: World


class SimLeases(Leases):
    def take(self, run_id: str) -> bool:
        WORLD.maybe()
        taken = super().take(run_id)
        WORLD.maybe()
        return taken

    def release(self, run_id: str) -> None:
        if not isinstance(sys.exc_info()[1], Death):  # the dead give nothing back
            super().release(run_id)
            WORLD.maybe()


class SimChunk(world.StubChunk):
    def _one(self, experiment: Any, run_id: str, words: Sequence[str]) -> str:
        WORLD.maybe()
        attempt = experiment.begin(run_id, {})
        WORLD.maybe()
        if "die" in words:
            raise Death
        attempt.finish("failed" if "fail" in words else "ok", {"seconds": 0.1})
        WORLD.maybe()
        return "ok"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    rate=st.sampled_from([0.0, 0.02, 0.1]),
    slots=st.integers(1, 4),
    kinds=st.lists(st.sampled_from(["", "", "", "fail", "die"]), min_size=1, max_size=15),
    minutes=st.sampled_from([0.01, 10.0]),
    retries=st.integers(0, 3),
)
@example(seed=0, rate=0.1, slots=1, kinds=["die"], minutes=10.0, retries=0)
def test_the_simulated_world_always_converges(
    seed: int, rate: float, slots: int, kinds: list[str], minutes: float, retries: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    global WORLD
    store = tmp_path_factory.mktemp("sim")
    WORLD = World(random.Random(seed), rate, slots)
    options = ClusterOptions(poll=1e-6, chunk_minutes=minutes, retries=retries)
    runs = [world.planned(number, kind, model=f"m{number % 2}") for number, kind in enumerate(kinds)]
    with pytest.MonkeyPatch.context() as patch:
        for module in ("sparsebench.results.store", "sparsebench.sweep.lease", "sparsebench.sweep.engine"):
            patch.setattr(f"{module}.own_process", lambda: WORLD.process())
        patch.setattr(chunk_module, "Leases", SimLeases)
        patch.setattr(engine_module, "MOST_BARREN", 1000)
        counts = Engine(world.plan_of(runs), Store(store), WORLD, options).run()
    found = statuses(store)
    assert sum(counts.values()) == len(runs) == len(found)
    assert counts == Counter(found.values())
    lost = lost_counts(store)
    for run in runs:
        (kind,), status = run.words, found[run.run_id]
        assert status in {"": ("ok", "lost"), "fail": ("failed", "lost"), "die": ("lost",)}[kind]
        assert lost.get(run.run_id, 0) <= retries + 1
        assert (status == "lost") == (lost.get(run.run_id, 0) == retries + 1)
        if rate == 0:
            assert status == {"": "ok", "fail": "failed", "die": "lost"}[kind]
    ends = Counter(line["run_id"] for line in ended_lines(store) if line["status"] != "lost")
    assert set(ends.values()) <= {1}, "nothing that ended was made again"


def test_a_chunk_that_a_person_withdrew_is_not_started_again(tmp_path: Path) -> None:
    class Withdrawn(World):
        def alive(self) -> set[str]:
            self.waiting.clear()
            return set()

        def withdrawn(self, job: str) -> bool:
            return True

    plan: Plan = world.plan_of([world.planned(0)])
    counts = Engine(plan, Store(tmp_path), Withdrawn(random.Random(0), 0.0), ClusterOptions(poll=1e-6)).run()
    assert counts == {"pending": 1}


def test_the_engine_says_how_long_it_will_take(tmp_path: Path) -> None:
    told: list[tuple[Counter[str], float | None]] = []
    runs: list[Planned] = [world.planned(number) for number in range(6)]

    class Here(world.Forked):
        def start(self, chunks: Sequence[Chunk], label: str) -> list[str]:
            for chunk in chunks:
                world.StubChunk(**vars(chunk))()
            return ["x"]

    options = ClusterOptions(poll=1e-6, chunk_minutes=1e-4)
    Engine(world.plan_of(runs), Store(tmp_path), Here(1), options, look=lambda c, left: told.append((c, left))).run()
    assert told[0] == ({"pending": 6}, None)
    assert told[-1] == ({"ok": 6}, 0.0)
    assert all(left is not None and left > 0 for counts, left in told[1:-1])
