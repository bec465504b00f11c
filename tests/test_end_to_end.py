"""The whole way, as a user sees it: repeated runs agree, and a run that is killed anywhere converges."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from commands import Command

from sparsebench.results.store import DETAILS, Store

TOP = Path(__file__).parents[1]
KILLS = 10

# Imports everything once and then starts each command in a child of its own, which can be killed:
# the real run path, without paying for the imports of torch at every kill.
NURSERY = """
import json, os, sys
from sparsebench.cli import main
words = json.loads(sys.argv[1])
import torch
torch.set_num_threads(1)
main([*words, "store=" + sys.argv[2]])
for line in sys.stdin:
    print("ready", flush=True)
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os._exit(main(words))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

SLEEPY = '''
import time
from dataclasses import dataclass

from sparsebench.declare import Declared, Taxonomy, method, option, task
from sparsebench.methods.weights.base import ScorePruner
from sparsebench.tasks.base import Outcome, Score


@method(name="sleepy", version=1, paper="none", target="weights", phase="once", stage="select",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class Sleepy(ScorePruner):
    """Magnitude, with a nap before each layer."""

    def score(self, layer):
        time.sleep(0.002)
        return layer.weight.abs().float()


@task(name="naps", version=1, metric="naps", better="higher")
@dataclass(frozen=True)
class Naps(Declared):
    """Sleeps for a while."""

    count: int = option(40, "naps of two milliseconds", low=1)

    def prepare(self, model, corpora):
        return None

    def evaluate(self, model, how, prepared):
        for _ in range(self.count):
            time.sleep(0.002)
        samples = [{"sample": str(i)} for i in range(self.count)]
        return Outcome({"naps": Score(float(self.count), None, self.count)}, samples)
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_the_same_command_converges(tiny_folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "sleepy.py").write_text(SLEEPY, encoding="utf-8")
    (mine / "sparsebench.yaml").write_text("plugins: [sleepy.py]\n", encoding="utf-8")
    store = tmp_path / "store"
    words = ["--config-dir", str(mine), "-m", "method=sleepy,dense", "sparsity=0.25,0.5,0.75", "task=naps"]
    words += ["model=hf", f"model.path={tiny_folder}", "calibration=kjv"]
    command = [sys.executable, "-c", NURSERY, json.dumps(words), str(tmp_path / "warm")]
    around = {**os.environ, "PYTHONPATH": str(TOP), "SPARSEBENCH_STORE": str(store), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    whole = []
    with subprocess.Popen(command, **pipes, text=True, bufsize=1, cwd=tmp_path, env=around) as nursery:
        dice = random.Random(0)
        try:
            for kill in range(KILLS):
                before = Store(store).records()
                child = start(nursery)
                wait_for_lines(store, count_lines(store) + dice.randrange(4), nursery)
                time.sleep(dice.uniform(0.0, 0.15))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                code = int(nursery.stdout.readline())
                now = {record["run_id"]: record for record in Store(store).records()}
                for record in before:  # what was finished stays as it was
                    assert record["status"] != "ok" or now[record["run_id"]] == record
                if code == 0:  # it was faster than the kill: begin again
                    whole.append(store.rename(tmp_path / f"whole-{kill}"))
            start(nursery)
            assert int(nursery.stdout.readline()) == 0
        finally:
            nursery.kill()
    lost = sum(assert_whole(folder) for folder in (store, *whole))
    assert lost >= 3, "too few of the kills met a run in flight to show anything"


def start(nursery: subprocess.Popen[str]) -> int:
    """Starts the command once more; the process id of its child."""
    assert nursery.stdin is not None and nursery.stdout is not None
    nursery.stdin.write("go\n")
    while nursery.stdout.readline() != "ready\n":
        assert nursery.poll() is None, "the nursery died"
    return int(nursery.stdout.readline())


def count_lines(store: Path) -> int:
    return sum(shard.read_bytes().count(b"\n") for shard in (store / "records").glob("*.jsonl"))


def wait_for_lines(store: Path, wanted: int, nursery: subprocess.Popen[str]) -> None:
    """Until the store has so many record lines, or the child has nothing more to write (at most 5 s)."""
    deadline = time.monotonic() + 5
    while count_lines(store) < wanted and time.monotonic() < deadline:
        if nursery.stdout is not None and select.select([nursery.stdout], [], [], 0.005)[0]:
            return


def assert_whole(folder: Path) -> int:
    """Four runs, each ok, each with all of its details; the number of attempts that were lost on the way."""
    lost = 0
    store = Store(folder)
    records = store.records()
    assert store.torn <= KILLS
    assert {record["status"] for record in records} == {"ok"}
    assert sorted((record["method"], record["sparsity"] or 0.0) for record in records) == [
        ("dense", 0.0), ("sleepy", 0.25), ("sleepy", 0.5), ("sleepy", 0.75),
    ]  # fmt: skip
    lines: list[dict[str, Any]] = []
    for shard in (folder / "records").glob("*.jsonl"):
        lines += [json.loads(line) for line in shard.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    for record in records:
        attempts = [line for line in lines if line["run_id"] == record["run_id"]]
        assert record["attempt"] == max(line["attempt"] for line in attempts)
        for number in range(1, record["attempt"]):
            ended = {line["status"] for line in attempts if line["attempt"] == number} - {"running"}
            assert ended == {"lost"}, (number, ended)
            lost += 1
        details = {kind: store.details(kind, record["run_id"], record["attempt"]) for kind in DETAILS}
        assert len(details["samples"]) == record["naps_n"] == 40
        assert len(details["configs"]) == 1
        assert details["errors"] == []
    return lost


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda"])
def test_the_same_run_twice_gives_the_same_bits(method: str, command: Command, small: list[str]) -> None:
    words = [f"method={method}", "calibration.nsamples=2", "calibration.seqlen=16", "format=json", *small]
    if method != "wanda":
        words = [word for word in words if not word.startswith("calibration.")]
    first = command(*words)
    second = command(*words, "force=true")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    (one,), (two,) = json.loads(first.out), json.loads(second.out)
    assert (one["attempt"], two["attempt"]) == (1, 2)
    differ = {key for key in one if one[key] != two[key]}
    assert differ <= {"attempt", "started", "seconds", "seconds_sparsify", "seconds_evaluate", "peak_memory_bytes"}
    for kind in ("samples", "layers", "configs"):
        rows = [
            [
                {key: value for key, value in row.items() if key != "attempt"}
                for row in second.store.details(kind, one["run_id"], n)
            ]
            for n in (1, 2)
        ]
        assert rows[0] == rows[1], kind
        assert rows[0], kind


@pytest.mark.parametrize("streamed", [[], ["streamed=true"]], ids=["whole", "streamed"])
def test_a_run_that_fails_saves_no_model(
    streamed: list[str], command: Command, small: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = copytree(tiny_folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    words = [f"model.path={broken}" if word.startswith("model.path=") else word for word in small]
    answer = command(*words, "method=magnitude", f"save={tmp_path / 'out'}", *streamed)
    assert answer.code == 1 and not (tmp_path / "out").exists()
    assert [record["status"] for record in answer.store.records()] == ["failed"]


def test_another_seed_is_another_run_where_a_method_draws(command: Command, small: list[str]) -> None:
    answer = command("-m", "method=random", "seed=0,1", "format=json", *small)
    one, two = json.loads(answer.out)
    assert one["run_id"] != two["run_id"]
    assert one["perplexity"] != two["perplexity"]
    assert one["achieved"] == two["achieved"]


def test_sparsity_zero_is_dense_to_the_bit(command: Command, small: list[str]) -> None:
    words = [
        "-m",
        "method=dense,random,magnitude,wanda",
        "sparsity=0",
        "calibration.nsamples=2",
        "calibration.seqlen=16",
    ]
    answer = command(*words, "format=json", *small)
    assert answer.code == 0, answer.err
    rows = json.loads(answer.out)
    assert {row["perplexity"] for row in rows} == {rows[0]["perplexity"]}
    assert all(row["achieved"] == 0 for row in rows)


def test_the_main_job_on_the_embedded_model(command: Command) -> None:
    words = "method=wanda sparsity=0.5 model=tiny_100k calibration.nsamples=4 calibration.seqlen=64".split()
    answer = command(*words, "task.context=128", "task.windows=4", "format=json")
    assert answer.code == 0, answer.err
    (record,) = json.loads(answer.out)
    assert record["status"] == "ok"
    assert record["achieved"] == pytest.approx(0.5, abs=0.02)
    assert record["flagged"] is False
    assert record["perplexity"] > 1
    assert record["perplexity_n"] == 4
    assert record["flops_decode"] < record["flops_decode_dense"]
    assert record["latency"] == "simulated"
    assert record["audits_failed"] is None
    layers = answer.store.details("layers", record["run_id"], 1)
    assert len(layers) >= 7
    assert sum(row["zeros"] for row in layers) / sum(row["total"] for row in layers) == record["achieved"]
