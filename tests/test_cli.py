"""The command line: verbs, formats, grids, the store's answers, failures half-way, interruptions."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Answer, Command

import sparsebench
from sparsebench.cli import parse
from sparsebench.errors import UserError
from sparsebench.results.record import COLUMNS

TOP = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "lm_eval", "wandb")


def rows_of(answer: Answer) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(answer.out)
    return found


# -- words ------------------------------------------------------------------------------------------------------


def test_words_are_taken_apart() -> None:
    found = parse(["-m", "method=a,b", "-v", "--config-dir", "mine", "sparsity=0.5"])
    assert (found.verb, found.grid, found.verbose, found.config_dir) == ("run", True, True, Path("mine"))
    assert found.overrides == ["method=a,b", "sparsity=0.5"]
    assert parse(["show", "wanda", "kjv"]).names == ["wanda", "kjv"]
    assert parse(["method=a", "results"]).verb == "results"
    with pytest.raises(UserError, match="unknown flag"):
        parse(["--multirun"])


def test_help(command: Command) -> None:
    for words in (["-h"], ["--help"], ["results", "--help"]):
        answer = command(*words)
        assert (answer.code, answer.err) == (0, "")
        assert sparsebench.__version__ in answer.out
        for verb in ("run", "results", "list", "show", "doctor"):
            assert verb in answer.out


# -- verbs that need no model -----------------------------------------------------------------------------------


def test_list(command: Command) -> None:
    everything = command("list")
    assert everything.code == 0
    for word in ("methods", "wanda", "tiny_1m", "perplexity", "kjv", "arXiv 2306.11695"):
        assert word in everything.out
    methods = rows_of(command("list", "methods", "format=json"))
    assert {"name": "wanda", "target": "weights", "phase": "once"}.items() <= next(
        row for row in methods if row["name"] == "wanda"
    ).items()
    assert all(row["summary"] and row["paper"] for row in methods)
    assert command("list", "models", "corpora").out.count("\n") > 10


def test_show_tells_every_option(command: Command) -> None:
    from sparsebench import catalogue

    known = catalogue.build()
    for kind, name, prefix in (
        ("method", "wanda", "method.wanda."),
        ("task", "perplexity", "task."),
        ("model", "ladder", "model."),
    ):
        answer = command("show", name)
        assert answer.code == 0
        for option, spec in known.get(kind, name).options.items():
            assert f"{prefix}{option}" in answer.out
            assert spec.help in answer.out
            assert f"[{spec.range}]" in answer.out
    shown = json.loads(command("show", "wanda", "format=json").out)
    assert shown["paper"].startswith("Sun et al.")
    assert next(row for row in shown["options"] if row["option"] == "method.wanda.norm")["default"] == "l2"
    run = command("show", "run").out
    for option in ("sparsity", "pattern", "seed", "store", "force", "save", "format"):
        assert option in run
    assert command("show", "wanda", "tiny_1m").code == 0


def test_doctor(command: Command) -> None:
    answer = command("doctor", "format=json")
    assert answer.code == 0
    found = {row["what"]: row for row in rows_of(answer)}
    assert found["torch"]["status"] == "ok"
    assert found["cpu"]["status"] == "ok"
    assert {"cuda", "cuda:0"} & set(found)
    assert all(row["status"] in ("ok", "missing", "problem") and row["detail"] for row in found.values())
    assert "torch" in command("doctor").out


# -- running ----------------------------------------------------------------------------------------------------


def test_a_run_and_its_answer_from_the_store(command: Command, toys: Path, small: list[str]) -> None:
    import sparsebench_plugin_toys  # under the name that the catalogue gives it

    calls = sparsebench_plugin_toys.CALLS
    words = ["--config-dir", str(toys), "method=largest", "format=json", *small]
    calls.clear()
    first = command(*words)
    assert first.code == 0, first.err
    assert first.err == ""  # no progress where nobody watches
    made = len(calls)
    assert made > 0
    (record,) = rows_of(first)
    assert (record["status"], record["attempt"], record["metric"]) == ("ok", 1, "perplexity")
    second = command(*words)
    assert rows_of(second) == rows_of(first)
    assert len(calls) == made, "the second call was computed, not read from the store"
    again = command(*words, "force=true")
    (forced,) = rows_of(again)
    assert (forced["run_id"], forced["attempt"]) == (record["run_id"], 2)
    assert len(calls) == 2 * made
    assert len(again.records) == 1


@pytest.fixture(autouse=True, scope="module")
def toys_imported(toys: Path) -> None:
    """The toy plug-in under the name that the catalogue gives it."""
    from sparsebench.config import Workspace

    Workspace(toys).catalogue.load("method", "largest")


def test_table_says_what_was_achieved(command: Command, small: list[str]) -> None:
    answer = command("method=magnitude", "pattern=2:4", *small)
    assert answer.code == 0, answer.err
    for word in ("magnitude", "perplexity", "2:4", "0.5000", "sparsity", "FLOPs", "bytes", "record"):
        assert word in answer.out


def test_tasks_share_one_sparse_model(command: Command, toys: Path, tiny_folder: Path, text_file: Path) -> None:
    import sparsebench_plugin_toys

    calls = sparsebench_plugin_toys.CALLS
    words = ["method=largest", "model=hf", f"model.path={tiny_folder}", "calibration=kjv", "format=json"]
    words += ["task=[perplexity,constant]", f"task.file={text_file}", "task.context=32", "task.windows=2"]
    calls.clear()
    answer = command("--config-dir", str(toys), *words)
    assert answer.code == 0, answer.err
    first, second = rows_of(answer)
    assert first["sparse_model_id"] == second["sparse_model_id"]
    assert first["run_id"] != second["run_id"]
    assert first["achieved"] == second["achieved"]
    assert len(calls) == len(set(calls)), "the sparse model was made once for each task"


def test_a_saved_model_is_written_once_and_loads_again(
    command: Command, toys: Path, small: list[str], tmp_path: Path
) -> None:
    words = ["--config-dir", str(toys), "task=[perplexity,constant]", *small, f"save={tmp_path / 'saved'}"]
    answer = command("method=magnitude", "format=json", *words)
    assert answer.code == 0, answer.err
    assert [row["status"] for row in rows_of(answer)] == ["ok", "ok"]
    given = [f"model.path={tmp_path / 'saved'}" if word.startswith("model.path=") else word for word in small]
    (record,) = rows_of(command("method=given", "format=json", *given))
    assert record["achieved"] == rows_of(answer)[0]["achieved"]
    assert record["perplexity"] == pytest.approx(rows_of(answer)[0]["perplexity"], rel=1e-6)


def test_saving_what_the_store_answers(command: Command, small: list[str], tmp_path: Path) -> None:
    assert command("method=magnitude", *small).code == 0
    answer = command("method=magnitude", f"save={tmp_path / 'saved'}", "format=json", *small)
    assert answer.code == 0, answer.err
    assert rows_of(answer)[0]["attempt"] == 1
    assert (tmp_path / "saved" / "config.json").exists()


def test_a_grid(command: Command, small: list[str]) -> None:
    answer = command("-m", "method=dense,magnitude", "sparsity=0.25,0.5", "format=json", *small)
    assert answer.code == 0, answer.err
    rows = rows_of(answer)
    # dense has no level, so its two points are one run and one row
    assert [(row["method"], row["sparsity"]) for row in rows] == [
        ("dense", None), ("magnitude", 0.25), ("magnitude", 0.5),
    ]  # fmt: skip
    assert len(answer.records) == 3


# -- results ----------------------------------------------------------------------------------------------------


def test_results_in_every_format(command: Command, small: list[str]) -> None:
    command("-m", "method=dense,magnitude", *small)
    parsed = list(csv.DictReader(io.StringIO(command("results", "format=csv").out)))
    assert len(parsed) == 2
    columns = list(parsed[0])
    assert columns[:4] == ["run_id", "sparse_model_id", "method", "model"]
    assert set(COLUMNS) - {"<score>"} <= set(columns), "all documented columns, empty or not"
    assert columns.index("perplexity_stderr") == columns.index("perplexity") + 1
    assert columns.index("perplexity_n") == columns.index("perplexity") + 2
    rows = rows_of(command("results", "format=json"))
    assert list(rows[0]) == columns
    assert [row["run_id"] for row in rows] == [row["run_id"] for row in parsed]
    assert float(parsed[0]["perplexity"]) == rows[0]["perplexity"]
    table = command("results")
    assert (table.code, table.err) == (0, "")
    assert "dense" in table.out


def test_results_filters(command: Command, small: list[str]) -> None:
    command("-m", "method=dense,magnitude", "sparsity=0.25,0.5", *small)
    for words, count in (
        ("method=magnitude", 2),
        ("method=dense,magnitude", 3),
        ("method=magnitude sparsity=0.50", 1),
        ("sparsity=none", 1),
        ("status=failed", 0),
    ):
        assert len(rows_of(command("results", "format=json", *words.split()))) == count, words
    wrong = command("results", "methd=dense")
    assert wrong.code == 2
    assert "'method'" in wrong.err
    assert command("results", "format=xml").code == 2
    assert command("results", "store=/no/such/store").code == 2


# -- what goes wrong half-way -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "say"), [("raises", "out of memory"), ("makes_nan", "finite_weights"), ("never_acts", "acted")]
)
def test_a_run_that_fails_half_way_is_recorded_and_the_grid_goes_on(
    method: str, say: str, command: Command, toys: Path, small: list[str]
) -> None:
    answer = command("--config-dir", str(toys), "-m", f"method={method},magnitude", "format=json", *small)
    assert answer.code == 1
    failed, fine = rows_of(answer)
    assert (failed["status"], fine["status"]) == ("failed", "ok")
    assert say in str(failed["error"])
    assert "\n" not in str(failed["error"])
    (line,) = answer.err.splitlines()
    assert method in line and say in line and "failed" in line
    (row,) = answer.store.details("errors", str(failed["run_id"]), 1)
    assert say in row["error"]
    assert ("Traceback" in row["error"]) == (method == "raises")
    assert answer.store.details("configs", str(failed["run_id"]), 1)
    # asked again, a failed run is tried again
    again = command("--config-dir", str(toys), f"method={method}", "format=json", *small)
    assert (again.code, rows_of(again)[0]["attempt"]) == (1, 2)


def test_verbose_shows_the_traceback(command: Command, toys: Path, small: list[str]) -> None:
    answer = command("--config-dir", str(toys), "-v", "method=raises", *small)
    assert answer.code == 1
    assert "Traceback" in answer.err
    assert "out of memory" in answer.err


def test_a_score_that_is_not_finite_is_never_ok(command: Command, toys: Path) -> None:
    words = "method=dense model=tiny_100k task=constant task.spoil=true format=json".split()
    answer = command("--config-dir", str(toys), *words)
    assert answer.code == 1
    (record,) = rows_of(answer)
    assert record["status"] == "failed"
    assert "number = nan" in str(record["error"])
    assert record["number"] is None


def test_ctrl_c(command: Command, toys: Path, small: list[str]) -> None:
    answer = command("--config-dir", str(toys), "-m", "method=magnitude,interrupted,dense", *small)
    assert answer.code == 3
    assert answer.err.startswith("sparsebench: interrupted")
    assert {record["method"]: record["status"] for record in answer.records} == {
        "magnitude": "ok",
        "interrupted": "lost",
    }


# -- nothing heavy ----------------------------------------------------------------------------------------------

LIGHT = """
import contextlib, io, json, sys, time
from sparsebench.cli import main
seen = {}
for words in json.loads(sys.argv[1]):
    out, started = io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(out):
        code = main(words)
    seen[" ".join(words[:2])] = [code, sorted(set(sys.modules) & set(json.loads(sys.argv[2]))), out.getvalue()]
print(json.dumps(seen))
"""


def test_no_verb_that_only_reads_imports_anything_heavy(command: Command, small: list[str], tmp_path: Path) -> None:
    made = command("method=magnitude", "format=json", *small)
    embedded = command("method=dense", "model=tiny_100k", "format=json", *small[2:])
    assert (made.code, embedded.code) == (0, 0), made.err + embedded.err
    commands = [
        ["--help"],
        ["list"],
        ["show", "wanda"],
        ["show", "perplexity"],
        ["results", "format=table"],
        ["results", "format=csv"],
        ["results", "format=json"],
        ["method=wonda"],
        ["sparsity=1.5"],
        ["method=dense", "model=tiny_100k", "format=json", *small[2:]],
        ["method=magnitude", "format=json", *small],
    ]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps(commands), json.dumps(HEAVY)],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60,
        env={**os.environ, "PYTHONPATH": str(TOP), "SPARSEBENCH_STORE": str(tmp_path / "store")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert {words: heavy for words, (_, heavy, _) in seen.items() if heavy} == {}
    assert [code for code, _, _ in seen.values()] == [0, 0, 0, 0, 0, 0, 0, 2, 2, 0, 0]
    assert seen["method=magnitude format=json"][2] == made.out, "answered from the store, without torch"
    assert seen["method=dense model=tiny_100k"][2] == embedded.out


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "sparsebench", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()  # before anything is written
        said = running.stderr.read()
    assert (running.returncode, said) == (0, b"")
