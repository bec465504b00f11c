"""Sweeps on a real Slurm: they finish whatever dies, and what they leave is what an inline run leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from one_machine import OneMachine, missing

from sparsebench.cli import main
from sparsebench.results.store import Store

pytestmark = pytest.mark.slurm

TOP = Path(__file__).resolve().parents[2]

METHODS = '''
"""Magnitude pruning that takes its time, one that raises, and one that kills its process."""

import os
import signal
import time
from dataclasses import dataclass

from sparsebench.declare import Taxonomy, method
from sparsebench.methods.weights.base import ScorePruner


@method(name="steady", version=1, paper="none", target="weights", phase="once", stage="select",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class Steady(ScorePruner):
    """Prunes by magnitude, slowly."""

    def score(self, layer):
        time.sleep(float(os.environ.get("TOY_SECONDS", "0")) / 14)  # a model of two blocks has 14 layers
        return layer.weight.abs().float()


@method(name="breaks", version=1, paper="none", target="weights", phase="once", stage="select",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class Breaks(ScorePruner):
    """Raises."""

    def score(self, layer):
        raise RuntimeError("broken on purpose")


@method(name="dies", version=1, paper="none", target="weights", phase="once", stage="select",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class Dies(ScorePruner):
    """As if the kernel had ended it for want of memory."""

    def score(self, layer):
        os.kill(os.getpid(), signal.SIGKILL)
'''


@pytest.fixture(scope="session")
def slurm() -> Iterator[OneMachine]:
    """A real Slurm on this machine for the whole session, or a skip that says why not."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    pytest.importorskip("submitit", reason="submitit is not installed")
    cluster = OneMachine()
    before = os.environ.get("SLURM_CONF")
    try:
        cluster.up()
        os.environ["SLURM_CONF"] = str(cluster.conf)
        yield cluster
    finally:
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before
        cluster.down()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, text_file: Path) -> Path:
    """A ``--config-dir`` with the methods above, the sweeps ``sixty``, ``safe`` (without what dies) and
    ``few``, and a cluster of its own."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "methods.py").write_text(METHODS, encoding="utf-8")
    (folder / "sparsebench.yaml").write_text("plugins: [methods.py]\n", encoding="utf-8")
    common = {"model": "hf", "model.path": str(tiny_folder), "task.file": str(text_file)}
    common |= {"task.context": 32, "task.windows": 4}
    levels = {"dies": [0.1, 0.2], "breaks": [0.1, 0.2, 0.3], "steady": [round(0.01 * (i + 1), 2) for i in range(55)]}
    sixty = {"grid": {**common, "method": list(levels)}, "levels": levels}
    safe = {"grid": {**common, "method": ["breaks", "steady"]}, "levels": {k: levels[k] for k in ("breaks", "steady")}}
    few = {"grid": {**common, "method": ["steady"], "sparsity": [0.1, 0.2, 0.3, 0.4]}}
    (folder / "sweeps").mkdir()
    for name, content in {"sixty": sixty, "safe": safe, "few": few}.items():
        (folder / "sweeps" / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (folder / "cluster").mkdir()
    ours = {"launcher": "slurm", "partition": "main", "cpus": 2, "mem_gb": 0.5, "time_min": 5, "poll": 0.5}
    (folder / "cluster" / "ours.yaml").write_text(
        yaml.safe_dump({**ours, "array_parallelism": 4, "setup": ["export TOY_SETUP=yes"]}), encoding="utf-8"
    )
    return folder


class Launcher:
    """``sparsebench sweep`` as a process of its own."""

    def __init__(self, site: Path, store: Path, sweep: str, *words: str, seconds: float = 0.0) -> None:
        env = os.environ | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1", "TOY_SECONDS": str(seconds)}
        command = ["sweep", sweep, "cluster=ours", f"store={store}", "--config-dir", str(site), *words]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sparsebench", *command],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, seconds: float) -> tuple[int, str]:
        """Its exit code and what it printed."""
        try:
            out, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, out

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def launched(slurm: OneMachine) -> Iterator[list[Launcher]]:
    """Launchers that are ended with the test, and their jobs with them."""
    started: list[Launcher] = []
    yield started
    for launcher in started:
        if launcher.process.poll() is None:
            launcher.kill()
    slurm("scancel", "--user=root")


def lines(store: Path) -> list[dict[str, Any]]:
    """Every whole record line, whichever counts."""
    found = []
    for shard in sorted((store / "records").glob("*.jsonl")):
        found += [json.loads(line) for line in shard.read_bytes().split(b"\n")[:-1]]
    return found


def ok(store: Path) -> int:
    return sum(line["status"] == "ok" for line in lines(store))


def scores(store: Path) -> dict[str, tuple[Any, ...]]:
    """Run id -> what a run must give wherever it is made."""
    columns = ("perplexity", "perplexity_stderr", "perplexity_n", "achieved", "bytes_weights", "flops_prefill")
    return {r["run_id"]: tuple(r[c] for c in columns) for r in Store(store).records() if r["status"] == "ok"}


def test_a_sweep_survives_its_runs_preemption_its_node_and_its_launcher(
    slurm, site, tmp_path, launched, monkeypatch, capsys
):
    store = tmp_path / "store"
    launched.append(Launcher(site, store, "sixty", seconds=0.6))
    slurm.wait(lambda: ok(store) >= 6, "first records")

    running = [line.split() for line in slurm("squeue", "-h", "-r", "-t", "R", "-o", "%i %N").splitlines()]
    assert {node for _, node in running} == {"n1", "n2"}
    preempted = next(job for job, node in running if node == "n1")
    slurm("scancel", "--signal=USR2", preempted)  # what Slurm sends before it takes a job's place or its time is up
    slurm.kill_node("n2")
    slurm.wait(lambda: ok(store) >= 16, "records after the death of a node")
    launched[0].kill()
    left = ok(store)
    submitted = len(slurm("squeue", "-h", "-r", "-t", "all", "-o", "%i").split())

    launched.append(Launcher(site, store, "sixty"))
    time.sleep(4)
    capsys.readouterr()
    assert main(["status", "sixty", f"store={store}"]) == 0
    status = capsys.readouterr().out
    assert "60 runs" in status and "Slurm jobs:" in status
    code, out = launched[1].end(150)

    assert code == 1, out
    assert "55 ok, 3 failed, 2 lost" in out
    assert left < 55
    records = Store(store).records()
    assert Counter(r["status"] for r in records) == {"ok": 55, "failed": 3, "lost": 2}
    twice = Counter(line["run_id"] for line in lines(store) if line["status"] == "ok")
    assert max(twice.values()) == 1, "a run was made twice"
    assert {r["method"] for r in records if r["status"] == "lost"} == {"dies"}
    assert all("Slurm job" in r["error"] and "FAILED" in r["error"] for r in records if r["status"] == "lost")
    tries = Counter(line["run_id"] for line in lines(store) if line["status"] == "lost")
    assert all(3 <= tries[r["run_id"]] <= 6 for r in records if r["status"] == "lost")  # retries=2 of two launchers
    restarted = [r for r in records if r["restarts"]]
    assert restarted, "no chunk of the dead node was started again"
    chunk = "_" + preempted.rpartition("_")[2]
    assert any(str(r["job"]).endswith(chunk) for r in restarted), "the preempted chunk did not go on"
    assert len({r["job"] for r in records}) < 60 / 4, "chunks were not shared"
    assert submitted >= 4

    for record in records:
        if record["status"] == "failed":
            assert "broken on purpose" in record["error"]
    capsys.readouterr()
    assert main(["logs", restarted[0]["run_id"], f"store={store}"]) == 0
    assert "submitit" in capsys.readouterr().out
    slurm.start_node("n2")

    inline = tmp_path / "inline"
    monkeypatch.setenv("TOY_SECONDS", "0")
    assert main(["sweep", "safe", "cluster=inline", f"store={inline}", "--config-dir", str(site)]) == 1
    assert len(scores(inline)) == 55
    assert scores(inline) == scores(store)


def test_a_sweep_is_cancelled_and_goes_on(slurm, site, tmp_path, launched, capsys):
    store = tmp_path / "store"
    launched.append(Launcher(site, store, "few", seconds=100))
    slurm.wait(lambda: len(lines(store)) > 0, "running line")
    assert main(["cancel", "few", f"store={store}"]) == 0
    assert "jobs ended" in capsys.readouterr().out
    code, out = launched[0].end(20)
    assert code == 3, out
    assert not slurm("squeue", "-h").strip()
    assert {line["status"] for line in lines(store)} == {"running", "lost"}

    launched.append(Launcher(site, store, "few", "sparsity=0.1,0.2"))
    code, out = launched[1].end(60)
    assert code == 0, out
    assert "2 are no longer in it" in out and "2 runs: 2 ok" in out
    used = slurm("squeue", "-h", "-t", "all", "-o", "%P %C %m")
    assert "main 2 512M" in used


def test_another_grid_waits_for_the_jobs_of_the_one_before(slurm, site, tmp_path, launched, capsys):
    store = tmp_path / "store"
    launched.append(Launcher(site, store, "few", seconds=100))
    slurm.wait(lambda: slurm("squeue", "-h", "-t", "R").strip() != "", "job")
    launched[0].kill()
    words = ["cluster=ours", f"store={store}", "--config-dir", str(site)]
    assert main(["sweep", "few", *words, "sparsity=0.7,0.8"]) == 2
    error = capsys.readouterr().err
    assert "still alive" in error and "cancel few" in error
    assert len(list((store / "plans" / "few").glob("*.jsonl"))) == 1
    assert main(["cancel", "few", f"store={store}"]) == 0


def test_a_partition_that_does_not_exist(slurm, site, tmp_path, capsys):
    store = tmp_path / "store"
    words = ["cluster=slurm", "cluster.partition=mian", f"store={store}", "--config-dir", str(site)]
    assert main(["sweep", "few", *words]) == 2
    assert "cluster.partition=mian: Slurm has no such partition" in capsys.readouterr().err
    assert not store.exists()


def test_a_job_that_slurm_refuses(slurm, site, tmp_path, capsys):
    store = tmp_path / "store"
    words = ["cluster=slurm", "cluster.constraint=nosuch", f"store={store}", "--config-dir", str(site)]
    assert main(["sweep", "few", *words]) == 2
    error = capsys.readouterr().err
    assert "sbatch refused" in error and "\n" not in error.strip()
    assert not lines(store)


def test_slurm_is_not_here(site, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    store = tmp_path / "store"
    assert main(["sweep", "few", "cluster=slurm", f"store={store}", "--config-dir", str(site)]) == 2
    assert "cluster=slurm: there is no sbatch on PATH" in capsys.readouterr().err
    assert not store.exists()
