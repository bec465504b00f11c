"""A user's own methods, tasks, models and corpora: from a ``--config-dir``, and from an installed package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import TOYS, Command

TOP = Path(__file__).parents[1]


def test_a_config_dir_adds_a_method_a_task_a_model_and_a_corpus(command: Command, toys: Path) -> None:
    words = "method=largest sparsity=0.25 model=smallest task=constant task.number=7 format=json".split()
    answer = command("--config-dir", str(toys), *words)
    assert answer.code == 0, answer.err
    (record,) = json.loads(answer.out)
    assert (record["method"], record["model"], record["task"]) == ("largest", "smallest", "constant")
    assert (record["status"], record["number"], record["number_n"]) == ("ok", 7.0, 1)
    assert record["achieved"] == pytest.approx(0.25, abs=0.01)


def test_a_plugin_corpus_calibrates_and_scores(command: Command, toys: Path) -> None:
    words = "method=wanda model=smallest calibration.nsamples=2 calibration.seqlen=16".split()  # alphabet by default
    words += "task.corpus=alphabet task.context=32 task.windows=2 format=json".split()
    answer = command(f"--config-dir={toys}", *words)
    assert answer.code == 0, answer.err
    (record,) = json.loads(answer.out)
    assert record["calibration"] == "alphabet"
    assert record["perplexity"] > 0


def test_plugins_are_listed_and_shown(command: Command, toys: Path) -> None:
    listed = command("--config-dir", str(toys), "list", "methods", "format=json")
    assert {"largest", "evicts", "wanda"} <= {row["name"] for row in json.loads(listed.out)}
    shown = command("--config-dir", str(toys), "show", "largest", "format=json")
    options = {row["option"]: row for row in json.loads(shown.out)["options"]}
    assert options["method.largest.sign"]["range"] == "-1 | 1"
    assert options["method.largest.group"]["default"] == "row"


def test_a_stack_keeps_each_methods_own_options(command: Command, toys: Path, small: list[str]) -> None:
    stack = ["method=[largest,keeps_mask]", "method.keeps_mask.rounds=3", "method.largest.sparsity=0.25"]
    answer = command("--config-dir", str(toys), *stack, "sparsity=0.5", "format=json", *small)
    assert answer.code == 0, answer.err
    (record,) = json.loads(answer.out)
    assert (record["method"], record["sparsity"]) == ("largest+keeps_mask", 0.25)
    assert record["achieved"] == pytest.approx(0.25, abs=0.02)
    (row,) = answer.store.details("configs", record["run_id"], 1)
    assert [part["options"].get("rounds") for part in row["config"]["methods"]] == [None, 3]
    wrong = command("--config-dir", str(toys), stack[0], "method.keeps_mask.rounds=30")
    assert wrong.code == 2
    assert "method.keeps_mask.rounds=30" in wrong.err


def test_a_users_yaml_is_a_new_choice(command: Command, small: list[str], tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "method").mkdir(parents=True)
    (mine / "method" / "gentle.yaml").write_text(
        "# @package method.gentle\nkind: magnitude\nsparsity: 0.25\ngroup: row\n", encoding="utf-8"
    )
    answer = command("--config-dir", str(mine), "method=gentle", "format=json", *small)
    assert answer.code == 0, answer.err
    (record,) = json.loads(answer.out)
    assert (record["method"], record["sparsity"]) == ("gentle", 0.25)
    # the same thing under its own name is the same run
    same = command("method=magnitude", "sparsity=0.25", "method.magnitude.group=row", "format=json", *small)
    assert json.loads(same.out)[0]["run_id"] == record["run_id"]
    assert json.loads(same.out)[0]["attempt"] == 1


def test_a_plugin_is_not_there_without_its_config_dir(command: Command) -> None:
    answer = command("method=keeps_mask")
    assert answer.code == 2
    assert "unknown method" in answer.err


def test_an_installed_package_adds_through_its_entry_point(tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "toy_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "toy_plugin.py").write_text(TOYS, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-plugin\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[sparsebench.plugins]\ntoys = toy_plugin\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "sparsebench", "list", "methods", "corpora", "format=json"],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(TOP)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {"largest", "alphabet"} <= {row["name"] for row in json.loads(done.stdout)}
