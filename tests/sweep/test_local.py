"""The local launcher with real worker processes, through the command line.

Most tests replace the experiment in the workers (by a ``sitecustomize`` on their path) with one that needs no
torch: its runs nap, fail, or kill their process, depending on their level. One test makes real runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sparsebench.cli import main
from sparsebench.results.store import Store
from sparsebench.sweep import plan as plans
from sparsebench.sweep.chunk import Chunk
from sparsebench.sweep.launch import Local, workers

TOP = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")

STAND_IN = '''
import os, signal, sys, time, types

FAILS, DIES_ONCE, DIES = 0.1, 0.2, 0.3


class Experiment:
    """Makes no sparse model and no scores; begins and ends records as the real one does."""

    def __init__(self, workspace, store, *_, **__):
        self.workspace, self.store = workspace, store

    def problems(self, runs):
        return []

    def run(self, run):
        run_id = run.run_id("content of " + run.model.options["rung"])
        first = self.store.find(run_id) is None
        attempt = self.store.begin(run_id, {"method": run.label, "sparsity": run.sparsity})
        time.sleep(float(os.environ.get("NAP", "0.01")))
        while "GATE" in os.environ and not os.path.exists(os.environ["GATE"]):
            time.sleep(0.02)
        if run.sparsity == DIES or (run.sparsity == DIES_ONCE and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if run.sparsity == FAILS:
            return attempt.finish("failed", {}, error="Traceback\\nValueError: no such luck")
        return attempt.finish("ok", {"seconds": 0.01})


stand_in = types.ModuleType("sparsebench.experiment")
stand_in.Experiment = Experiment
sys.modules["sparsebench.experiment"] = stand_in
from sparsebench.models.embedded import Ladder
Ladder.content = lambda self: "content of " + self.rung
'''

SWEEP = """
summary: a toy
grid:
  method: [magnitude]
  model: tiny_100k
  task: perplexity
  sparsity: {from: 0.1, to: 0.9, step: 0.05}
baselines: [dense]
"""


@dataclass
class Machine:
    """Commands in processes of their own, whose experiments are the stand-in."""

    folder: Path
    environment: dict[str, str]

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def jobs(self) -> Path:
        return self.store / "jobs" / "toy"

    def words(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "sparsebench", *words]

    def start(self, *words: str, **around: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.words("sweep", "toy", "--config-dir", str(self.folder / "mine"), "cluster.poll=0.02", *words),
            env=self.environment | around, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.folder,
        )  # fmt: skip

    def sweep(self, *words: str, **around: str) -> tuple[int, str, str]:
        process = self.start(*words, **around)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def command(self, *words: str) -> str:
        return subprocess.run(
            self.words(*words), env=self.environment, text=True, capture_output=True, check=True, cwd=self.folder
        ).stdout

    def lines(self) -> list[dict[str, Any]]:
        found = []
        for shard in (self.store / "records").glob("*.jsonl"):
            found += [json.loads(line) for line in shard.read_text().splitlines() if line.endswith("}")]
        return found

    def wait_for(self, ended: int) -> None:
        deadline = time.monotonic() + 120
        while sum(line["status"] != "running" for line in self.lines()) < ended:
            assert time.monotonic() < deadline, "no run ends"
            time.sleep(0.01)

    def wait_for_workers(self) -> None:
        deadline = time.monotonic() + 120
        while workers(self.jobs):
            assert time.monotonic() < deadline, "a worker does not end"
            time.sleep(0.05)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(STAND_IN, encoding="utf-8")
    (tmp_path / "mine" / "sweeps").mkdir(parents=True)
    (tmp_path / "mine" / "sweeps" / "toy.yaml").write_text(SWEEP, encoding="utf-8")
    around = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(TOP)]),
        "SPARSEBENCH_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    found = Machine(tmp_path, os.environ | around)
    yield found
    for pid in workers(found.jobs).values():
        os.kill(pid, signal.SIGKILL)


def by_level(machine: Machine) -> dict[float | None, str]:
    return {record["sparsity"]: record["status"] for record in Store(machine.store).records()}


def ends(machine: Machine, *statuses: str) -> Counter[str]:
    return Counter(line["run_id"] for line in machine.lines() if line["status"] in statuses)


LEVELS = [round(0.1 + 0.05 * step, 2) for step in range(17)]
EXPECTED = {None: "ok"} | dict.fromkeys(LEVELS, "ok") | {0.1: "failed", 0.3: "lost"}


def test_a_sweep_with_failing_and_dying_runs_ends_as_it_must(machine: Machine) -> None:
    code, out, err = machine.sweep("cluster.workers=2", "cluster.retries=1")
    assert code == 1, err
    assert by_level(machine) == EXPECTED
    assert set(ends(machine, "ok", "failed").values()) == {1}
    records = {record["sparsity"]: record for record in Store(machine.store).records()}
    failed, lost = records[0.1], records[0.3]
    assert sum(line["run_id"] == lost["run_id"] and line["status"] == "lost" for line in machine.lines()) == 2
    assert "toy: 18 runs: 16 ok, 1 failed, 1 lost" in out
    assert f"{failed['run_id'][:8]} failed: ValueError: no such luck" in out
    assert f"{lost['run_id'][:8]} lost: process {lost['pid']} on {lost['host']} vanished" in out
    assert "python -m sparsebench method=magnitude model=tiny_100k task=perplexity sparsity=0.1 force=true" in out
    # What the other verbs say of it.
    assert "16 ok, 1 failed, 1 lost" in machine.command("status", "toy")
    said = machine.command("logs", failed["run_id"][:8])
    assert "ValueError: no such luck" in said
    assert "--- " in said
    plan = machine.command("sweep", "toy", "--plan", "--config-dir", str(machine.folder / "mine"))
    assert "18 runs, 16 already in" in plan
    # A failure is made again when asked for, and only then.
    machine.sweep("cluster.workers=1", "cluster.retries=0", "retry=failed", "sparsity=0.1,0.4", "method=magnitude")
    assert ends(machine, "failed")[failed["run_id"]] == 2
    assert ends(machine, "ok").most_common(1)[0][1] == 1


def test_killed_and_interrupted_launchers_leave_workers_that_the_next_one_finds(machine: Machine) -> None:
    words = ["cluster.workers=2", "sparsity=0.35,0.4,0.45,0.5,0.55,0.6,0.65,0.7", "method=magnitude", "seed=0"]
    gate = machine.folder / "gate"
    killed = machine.start(*words, GATE=str(gate))  # its runs wait for the gate, so that nothing here is a race
    deadline = time.monotonic() + 120
    while sum(line["status"] == "running" for line in machine.lines()) < 2:
        assert time.monotonic() < deadline, "no run begins"
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    alive = workers(machine.jobs)
    assert len(alive) == 2, "the workers outlive their launcher"
    interrupted = machine.start(*words)
    assert interrupted.stderr is not None
    assert "2 jobs that were started earlier are still at work" in interrupted.stderr.readline()
    assert set(workers(machine.jobs)) == set(alive), "no third worker: the pool is bounded across launchers"
    interrupted.send_signal(signal.SIGINT)
    _, err = interrupted.communicate(timeout=30)
    assert interrupted.returncode == 3, err
    assert "interrupted" in err
    gate.touch()
    code, out, err = machine.sweep(*words)
    assert code == 0, out + err
    assert set(by_level(machine).values()) == {"ok"}
    assert set(Counter(line["run_id"] for line in machine.lines()).values()) == {2}, "each run began and ended once"


def test_another_grid_waits_for_the_old_ones_workers_and_cancel_ends_them(machine: Machine) -> None:
    engine = machine.start("cluster.workers=2", "sparsity=0.4,0.5,0.6,0.7", "method=magnitude", NAP="30")
    deadline = time.monotonic() + 120
    while sum(line["status"] == "running" for line in machine.lines()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    code, _, err = machine.sweep("sparsity=0.8", "method=magnitude")
    assert code == 2
    assert "are still alive" in err and "cancel toy" in err
    newest = plans.newest(machine.store, "toy")
    assert newest is not None and newest.number == 1, "nothing was half submitted"
    said = machine.command("cancel", "toy")
    _, err = engine.communicate(timeout=30)
    assert engine.returncode == 3, err
    machine.wait_for_workers()
    assert said.startswith("cancelled toy: 2 processes ended")
    assert "2 lost" in machine.command("status", "toy")
    code, _, err = machine.sweep("sparsity=0.8", "method=magnitude")
    assert code == 0, err
    assert "plan 2 of toy: 1 runs are new, 4 are no longer in it" in err


def test_detached_it_goes_on_by_itself(machine: Machine) -> None:
    code, out, _ = machine.sweep("cluster.workers=1", "sparsity=0.4,0.5", "method=magnitude", "--detach")
    assert code == 0
    assert "3 runs, 0 already in" in out and "goes on as process" in out
    machine.wait_for(3)
    machine.wait_for_workers()
    assert set(by_level(machine).values()) == {"ok"}


def test_workers_that_cannot_start_are_told_with_their_logs(machine: Machine) -> None:
    broken = machine.folder / "site" / "sitecustomize.py"
    broken.write_text(STAND_IN + "\nif 'sparsebench.sweep.chunk' in ' '.join(sys.orig_argv): os._exit(1)\n")
    code, _, err = machine.sweep("cluster.workers=2", "sparsity=0.4", "method=magnitude")
    assert code == 2
    assert "workers in a row ended without beginning a run; logs: " in err
    assert "Traceback" not in err


def test_no_two_chunks_ever_share_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/true")
    one, other = Local(tmp_path / "jobs", 2), Local(tmp_path / "jobs", 2)
    chunks = [Chunk(str(tmp_path), None, []) for _ in range(3)]
    names = one.start(chunks, "toy") + other.start(chunks, "toy")
    assert len(set(names)) == 6
    for launcher in (one, other):
        for process in launcher.running.values():
            process.wait(timeout=30)
        assert launcher.alive() == set()


DEADLY = '''
import os, signal
from dataclasses import dataclass
from pathlib import Path

from sparsebench.declare import Taxonomy, method
from sparsebench.methods.weights.base import ScorePruner


@method(name="deadly", version=1, paper="none", target="weights", phase="once", stage="select",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class Deadly(ScorePruner):
    """Magnitude; kills its process the first time."""

    def score(self, layer):
        mark = Path(__file__).with_suffix(".mark")
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return layer.weight.abs().float()


@method(name="broken", version=1, paper="none", target="weights", phase="once", stage="select",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class Broken(ScorePruner):
    """Raises."""

    def score(self, layer):
        raise RuntimeError("out of luck")
'''


@pytest.mark.slow
def test_real_runs_give_the_same_records_as_inline(
    machine: Machine, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (machine.folder / "site" / "sitecustomize.py").unlink()
    mine = machine.folder / "mine"
    (mine / "deadly.py").write_text(DEADLY, encoding="utf-8")
    (mine / "sparsebench.yaml").write_text("plugins: [deadly.py]\n", encoding="utf-8")
    grid = dict(word.split("=", 1) for word in small) | {"method": "[magnitude, deadly, broken]", "sparsity": "0.5"}
    lines = [f"  {key}: {value}" for key, value in grid.items()]
    text = "\n".join(["summary: real", "grid:", *lines, "baselines: [dense]"])
    (mine / "sweeps" / "toy.yaml").write_text(text, encoding="utf-8")
    code, out, err = machine.sweep("cluster.workers=1")
    assert code == 1, err
    assert "4 runs: 3 ok, 1 failed" in out, out + err
    words = ["sweep", "toy", "--config-dir", str(mine), "cluster=inline", f"store={machine.folder / 'other'}"]
    assert main(words) == 1
    assert "4 runs: 3 ok, 1 failed" in capsys.readouterr().out
    here, there = (
        {record["method"]: record for record in Store(folder).records()}
        for folder in (machine.store, machine.folder / "other")
    )
    assert {name: record["status"] for name, record in here.items()} == {
        "dense": "ok", "magnitude": "ok", "deadly": "ok", "broken": "failed",
    }  # fmt: skip
    assert (here["deadly"]["attempt"], there["deadly"]["attempt"]) == (2, 1)
    for name, record in here.items():
        for column in ("run_id", "sparse_model_id", "status", "achieved", "perplexity", "perplexity_stderr", "error"):
            assert record.get(column) == there[name].get(column), (name, column)
