"""``save_as=compressed``, the verb ``export``, and runs on what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Answer, Command
from transformers import AutoModelForCausalLM


def row(answer: Answer) -> dict[str, object]:
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    return dict(found[0] if isinstance(found, list) else found)


def on(folder: Path, small: list[str]) -> list[str]:
    return ["method=dense", "format=json", *(f"model.path={folder}" if "path=" in w else w for w in small)]


def test_saved_compressed_exported_and_evaluated(command: Command, small: list[str], tmp_path: Path) -> None:
    packed, plain, again = (tmp_path / name for name in ("packed", "plain", "again"))
    made = row(
        command("method=magnitude", "sparsity=0.75", f"save={packed}", "save_as=compressed", "format=json", *small)
    )
    notes = json.loads((packed / "sparsebench.json").read_text())
    assert notes["size"]["file_bytes"] == made["bytes_file"] < made["bytes_file_dense"]
    assert notes["sparse_model_id"] == made["sparse_model_id"]
    assert notes["size"]["linears_ratio"] < 0.5
    exported = row(command("export", str(packed), f"to={plain}", "format=json"))
    assert exported == {"folder": str(plain), "form": "plain", **notes["size"]}
    assert "size" not in json.loads((plain / "sparsebench.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(plain).config.hidden_size == 16
    answer = command("export", str(plain), f"to={again}")
    assert answer.out.startswith(f"compressed in {again}\n") and f"{made['bytes_file']:,}" in answer.out
    assert {file.name: file.read_bytes() for file in packed.iterdir()} == {
        file.name: file.read_bytes() for file in again.iterdir()
    }
    runs = [row(command(*on(folder, small))) for folder in (packed, plain)]
    assert runs[0]["perplexity"] == runs[1]["perplexity"] == pytest.approx(made["perplexity"], rel=1e-6)
    assert runs[0]["achieved_model"] == made["achieved_model"]
    assert runs[0]["run_id"] != runs[1]["run_id"], "the content is that of the files"
    timed = row(command(*on(packed, small), "kernel=auto"))
    assert timed["perplexity"] == runs[0]["perplexity"] and timed["kernel_layers"] == 14


def test_sizes_are_told_also_where_the_store_answers(command: Command, small: list[str], tmp_path: Path) -> None:
    assert command("method=magnitude", *small).code == 0
    answer = command("method=magnitude", f"save={tmp_path / 'a'}", "save_as=compressed", *small)
    assert answer.code == 0 and f"saved in {tmp_path / 'a'}" in answer.out and "whole file" in answer.out
    assert len(answer.store.records()) == 1, "how a model is saved is not part of the run"
    answer = command("method=magnitude", f"save={tmp_path / 'b'}", "save_as=compressed", "format=json", *small)
    assert json.loads(answer.out) and "whole file" in answer.err


def test_what_cannot_be_exported(command: Command, tiny_folder: Path, tmp_path: Path) -> None:
    packed, new, full = tmp_path / "packed", tmp_path / "new", tmp_path / "full"
    assert command("export", str(tiny_folder), f"to={packed}").code == 0
    full.mkdir()
    (full / "mine").touch()
    for words, message in (
        ([], "name one model folder"),
        ([str(packed), str(packed), f"to={new}"], "name one model folder"),
        ([str(packed)], "to=: needed"),
        ([str(packed), f"to={full}"], "not empty"),
        ([str(packed), f"to={full / 'mine'}"], "not a folder"),
        ([str(packed), f"to={full / 'mine' / 'below'}"], "cannot be written"),
        ([str(tmp_path / "nowhere"), f"to={new}"], "no such folder"),
        ([str(full), f"to={new}"], "not a Hugging Face model"),
        ([str(packed), f"to={new}", "form=compressed"], "is compressed already"),
        ([str(tiny_folder), f"to={new}", "form=plain"], "is plain already"),
        ([str(packed), f"to={new}", "form=zip"], "form=zip: valid: plain, compressed"),
        ([str(packed), f"to={new}", "format=csv"], "format=csv: valid: table, json"),
        ([str(packed), f"to={new}", "colour=red"], "colour: unknown option"),
        ([str(packed), f"to={new}", "negative_zeros=drop"], "form=compressed alone"),
    ):
        answer = command("export", *words)
        assert (answer.code, answer.err.count("\n")) == (2, 1), (words, answer.err)
        assert message in answer.err and not new.exists() and list(full.iterdir()) == [full / "mine"]
    file = next(packed.glob("compressed-00002*"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    before = sorted(tmp_path.iterdir())
    answer = command("export", str(packed), f"to={new}")
    assert (answer.code, answer.err.count("\n")) == (2, 1) and "checksum" in answer.err
    assert sorted(tmp_path.iterdir()) == before, "a failed export leaves nothing behind"
    answer = command("method=dense", "model=hf", f"model.path={packed}")
    assert (answer.code, answer.err.count("\n")) == (2, 1) and "model.path=" in answer.err


def test_saving_options_that_contradict(command: Command, small: list[str], tmp_path: Path) -> None:
    for words in (
        ["save_as=compressed"],
        ["save_as=zip", f"save={tmp_path / 'a'}"],
        ["-m", "save_as=plain,compressed", f"save={tmp_path / 'a'}"],
    ):
        answer = command("method=magnitude", *words, *small)
        assert answer.code == 2 and "save" in answer.err and not (tmp_path / "a").exists()


def test_a_benchmark_of_a_compressed_folder(command: Command, tiny_folder: Path, tmp_path: Path) -> None:
    assert command("export", str(tiny_folder), f"to={tmp_path / 'a'}").code == 0
    answer = command("bench", "checkpoint", f"folder={tmp_path / 'a'}", "repeats=3", "context=20", "format=json")
    dense, packed = row(answer)["rows"]
    assert (dense["model"], packed["model"]) == ("dense", "compressed") and packed["ms_per_token"] > 0
    for words in ([], [f"folder={tiny_folder}"], [f"folder={tmp_path}"]):
        answer = command("bench", "checkpoint", *words)
        assert answer.code == 2 and answer.err.splitlines()[-1].startswith("sparsebench: ")


def test_a_stranger_loads_the_plain_folder(command: Command, tiny_folder: Path, tmp_path: Path) -> None:
    """There and back, and then by transformers in a process that never saw this project."""
    assert command("export", str(tiny_folder), f"to={tmp_path / 'packed'}").code == 0
    assert command("export", str(tmp_path / "packed"), f"to={tmp_path / 'plain'}").code == 0
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A, AutoTokenizer as T\n"
        "one, other = (A.from_pretrained(folder).state_dict() for folder in sys.argv[1:])\n"
        "T.from_pretrained(sys.argv[2])\n"
        "assert all((one[k] == other[k]).all() for k in one) and 'sparsebench' not in sys.modules"
    )
    words = [sys.executable, "-c", code, str(tiny_folder), str(tmp_path / "plain")]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(words, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
