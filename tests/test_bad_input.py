"""Bad input: exit code 2, one line that names the option and what is valid, nothing started, nothing stored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest
from commands import Answer, Command

# name -> (words, what the line must say)
OPTIONS: dict[str, tuple[str, list[str]]] = {
    "verb": ("lst", ["lst", "'list'"]),
    "verb_with_option": ("reslts method=wanda", ["'results'"]),
    "flag": ("--verbos", ["--verbos", "-v"]),
    "name_without_key": ("run wanda", ["method=wanda"]),
    "config_dir_missing": ("--config-dir /no/such/folder", ["--config-dir", "no such folder"]),
    "config_dir_without_value": ("--config-dir", ["--config-dir"]),
    "method": ("method=wonda", ["method=wonda", "'wanda'"]),
    "method_nothing_like_it": ("method=zzzz", ["method=zzzz", "valid:", "magnitude"]),
    "method_in_a_stack": ("method=[wanda,magnitud]", ["'magnitude'"]),
    "method_empty": ("method=[]", ["method=[]", "name"]),
    "method_null": ("method=null", ["method", "name"]),
    "method_twice": ("method=wanda method=magnitude", ["method", "twice", "wanda", "magnitude"]),
    "model_twice": ("model=tiny_1m model=tiny_100k", ["model", "twice"]),
    "save_nowhere": ("save=/proc/nowhere/model", ["save=/proc/nowhere/model", "cannot be written"]),
    "save_empty": ('save=""', ["save=", "folder"]),
    "save_too_long": ("save=" + "x" * 300, ["save=xxx", "cannot be written"]),
    "bench_odd_shape": ("bench kernels shapes=[7x130]", ["shapes=7x130", "2:4"]),
    "bench_huge_shape": ("bench kernels shapes=[99999x99999]", ["shapes=99999x99999"]),
    "bench_no_levels": ("bench decode sparsity=[]", ["sparsity=[]"]),
    "bench_odd_width": ("bench decode intermediate=66", ["intermediate=66", "multiple of 4"]),
    "model": ("model=tiny_1mm", ["model=tiny_1mm", "'tiny_1m'"]),
    "task": ("task=perplexty", ["task=perplexty", "'perplexity'"]),
    "calibration": ("calibration=kjw", ["calibration=kjw", "'kjv'"]),
    "corpus": ("task.corpus=kjvv", ["task.corpus=kjvv", "'kjv'"]),
    "two_models": ("model=[tiny_1m,tiny_100k]", ["model=", "-m"]),
    "run_option": ("sparsty=0.5", ["sparsty", "'sparsity'"]),
    "method_option": ("method.wanda.nrm=l1", ["method.wanda.nrm", "'norm'"]),
    "task_option": ("task.contxt=64", ["task.contxt", "'context'"]),
    "model_option": ("model.outlier=true", ["model.outlier", "'outliers'"]),
    "calibration_option": ("calibration.nsample=4", ["calibration.nsample", "'nsamples'"]),
    "option_of_an_absent_method": ("method=wanda method.magnitude.group=row", ["method.magnitude.group"]),
    "option_of_an_unknown_method": ("method.wonda.norm=l1", ["method.wonda.norm", "'wanda'"]),
    "option_without_a_name": ("method.wanda=l1", ["method.wanda"]),
    "sparsity_above": ("sparsity=1.5", ["sparsity=1.5", ">= 0", "< 1"]),
    "sparsity_one": ("sparsity=1", ["sparsity=1", "< 1"]),
    "sparsity_text": ("sparsity=abc", ["sparsity=abc", ">= 0"]),
    "sparsity_nan": ("sparsity=nan", ["sparsity=nan", "finite"]),
    "sparsity_inf": ("sparsity=inf", ["sparsity=inf", "finite"]),
    "sparsity_negative": ("sparsity=-0.1", ["sparsity=-0.1", ">= 0"]),
    "sparsity_bool": ("sparsity=true", ["sparsity=", ">= 0"]),
    "sparsity_list": ("sparsity=[0.5]", ["sparsity="]),
    "sparsity_dict": ("sparsity={a:1}", ["sparsity="]),
    "sparsity_of_a_method": ("method.wanda.sparsity=2", ["method.wanda.sparsity=2"]),
    "sparsity_twice": ("sparsity=0.5 sparsity=0.6", ["sparsity", "twice"]),
    "sparsity_empty": ("sparsity=", ["sparsity"]),
    "seed": ("seed=-1", ["seed=-1", ">= 0"]),
    "seed_fraction": ("seed=0.5", ["seed=0.5", "whole"]),
    "batch_size": ("batch_size=0", ["batch_size=0", ">= 1"]),
    "threads": ("threads=0", ["threads=0", ">= 1"]),
    "force": ("force=maybe", ["force=maybe", "true or false"]),
    "format": ("format=cvs", ["format=cvs", "'csv'"]),
    "choice": ("method.wanda.norm=l3", ["method.wanda.norm=l3", "valid: l1, l2, linf"]),
    "split": ("task.split=tset", ["task.split=tset", "'test'"]),
    "context": ("task.context=1", ["task.context=1", ">= 2"]),
    "pattern": ("pattern=24", ["pattern=24", "n:m"]),
    "pattern_of_text": ("pattern=two:four", ["pattern=two:four", "n:m"]),
    "pattern_keeps_all": ("pattern=4:4", ["pattern=4:4"]),
    "pattern_keeps_none": ("pattern=0:4", ["pattern=0:4"]),
    "pattern_contradicts_sparsity": ("pattern=2:4 sparsity=0.6", ["sparsity=0.6", "2:4"]),
    "pattern_does_not_divide": ("model=tiny_100k method=magnitude pattern=3:7", ["pattern=3:7", "divide"]),
    "pattern_with_global": ("model=tiny_100k method=magnitude method.magnitude.group=global pattern=2:4", ["=global"]),
    "variant_with_pattern": ("model=tiny_100k method.wanda.use_variant=true pattern=2:4", ["method.wanda.use_variant"]),
    "scope_empty": ("model=tiny_100k method=magnitude method.magnitude.include=[nothing]", ["include"]),
    "two_selecting_methods": ("method=[wanda,magnitude]", ["wanda", "magnitude", "weights"]),
    "same_method_twice": ("method=[wanda,wanda]", ["wanda"]),
    "target": ("method.wanda._target_=os.system", ["method.wanda._target_"]),
    "target_of_a_model": ("model._target_=os.system", ["model._target_"]),
    "target_at_the_top": ("_target_=os.system", ["_target_"]),
    "hydra": ("hydra.run.dir=elsewhere", ["hydra.run.dir"]),
    "hydra_searchpath": ("hydra.searchpath=[pkg://os]", ["hydra.searchpath"]),
    "add": ("+x=1", ["+x=1", "without +"]),
    "force_add": ("++sparsity=0.5", ["++sparsity=0.5"]),
    "delete": ("~method=wanda", ["~method=wanda", "~"]),
    "package": ("method@other=wanda", ["method@other=wanda", "@"]),
    "kind": ("model.kind=hf", ["model.kind"]),
    "interpolation": ("model.rung=${oc.env:HOME}", ["model.rung"]),
    "unbalanced": ("method=[wanda", ["method=[wanda"]),
    "values_without_m": ("sparsity=0.3,0.5", ["sparsity=0.3,0.5", "-m"]),
    "models_without_m": ("model=tiny_100k,tiny_1m", ["-m"]),
    "rung": ("model=ladder model.rung=tiny_2m", ["model.rung=tiny_2m"]),
    "device": ("model=tiny_100k model.device=gpu", ["model.device=gpu", "cpu"]),
    "model_path_not_given": ("model=hf", ["model.path"]),
    "model_path_missing": ("model=hf model.path=/no/such/model", ["model.path=/no/such/model", "no such folder"]),
    "context_beyond_model": ("model=tiny_100k method=dense task.context=100000", ["task.context=100000"]),
    "length_beyond_model": (
        "model=tiny_100k method=dense task=tinyworld task.length=8192 task.samples=1 task.tasks=[copy] task.items=2",
        ["task.length=8192"],
    ),
    "tinyworld_task": ("model=tiny_100k method=dense task=tinyworld task.tasks=[cpy]", ["task.tasks=cpy", "'copy'"]),
    "file_missing": ("model=tiny_100k method=dense task.file=/no/such/text.txt", ["task.file=/no/such/text.txt"]),
    "file_is_a_folder": ("model=tiny_100k method=dense task.file=/", ["task.file=/"]),
    "calibration_file_missing": (
        "model=tiny_100k calibration=file calibration.file=/no/such/text.txt",
        ["calibration.file=/no/such/text.txt"],
    ),
    "calibration_file_not_given": ("model=tiny_100k calibration=file", ["calibration.file"]),
    "calibration_too_long": ("model=tiny_100k calibration.seqlen=100000", ["calibration.seqlen=100000"]),
    "list": ("list method", ["list method", "'methods'"]),
    "show": ("show wonda", ["show wonda", "'wanda'"]),
    "show_nothing": ("show", ["show"]),
    "list_option": ("list target=weights", ["list", "format="]),
    "results_without_a_store": ("results", ["store"]),
}  # fmt: skip


def assert_refused(answer: Answer, say: list[str], store: Path) -> None:
    assert answer.code == 2, (answer.code, answer.err)
    assert answer.out == ""
    lines = answer.err.splitlines()
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("sparsebench: ")
    assert "Traceback" not in answer.err
    for part in say:
        assert part in lines[0], lines[0]
    assert not store.exists()


@pytest.mark.parametrize("name", OPTIONS)
def test_refused(name: str, command: Command, tmp_path: Path) -> None:
    words, say = OPTIONS[name]
    assert_refused(command(*words.split()), say, tmp_path / "store")


@pytest.mark.parametrize("word", ["method=wan\nda", "sparsity=0.5\x1b[31m", "\x1e", "x\r\ny=1", "method=\u2028"])
def test_control_characters_stay_on_the_one_line(word: str, command: Command, tmp_path: Path) -> None:
    answer = command("run", word)
    assert_refused(answer, [], tmp_path / "store")
    assert answer.err.rstrip("\n").isprintable()


@pytest.mark.parametrize("words", ["-m sparsity=0.3,1.5", "-m method=wanda,wonda", "-m task=perplexity,nothing"])
def test_one_bad_point_refuses_the_whole_grid(words: str, command: Command, tmp_path: Path) -> None:
    assert_refused(command(*words.split()), [], tmp_path / "store")


@pytest.mark.parametrize("content", [b"", b" \n\n \t", b"\xff\xfe\x00bad"], ids=["empty", "blank", "not_utf8"])
@pytest.mark.parametrize("key", ["task.file", "calibration.file"])
def test_a_text_that_cannot_be_used(content: bytes, key: str, command: Command, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    words = ["method=dense"] if key == "task.file" else ["calibration=file"]
    say = [f"{key}={file}", "UTF-8" if b"\xff" in content else "empty"]
    assert_refused(command("model=tiny_100k", *words, f"{key}={file}"), say, tmp_path / "store")


def test_a_text_shorter_than_a_window(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("In the beginning.", encoding="utf-8")
    answer = command("model=tiny_100k", "method=dense", f"task.file={file}")
    assert_refused(answer, [f"task.file={file}", "fewer than one window", "task.context"], tmp_path / "store")


def damage(folder: Path, how: str) -> None:
    weights, shape = folder / "model.safetensors", folder / "config.json"
    if how == "no_config":
        shape.unlink()
    elif how == "no_weights":
        weights.unlink()
    elif how == "cut_weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "garbled_weights":
        weights.write_bytes(b"\xff" * 1000)
    elif how == "garbled_config":
        shape.write_text("{not json", encoding="utf-8")
    elif how == "other_shape":
        shape.write_text(json.dumps(json.loads(shape.read_text()) | {"hidden_size": 32}), encoding="utf-8")
    elif how == "unknown_architecture":
        shape.write_text(json.dumps({"model_type": "nothing_known"}), encoding="utf-8")
    elif how == "garbled_tokenizer":
        (folder / "tokenizer.json").write_text("[]", encoding="utf-8")


@pytest.mark.parametrize(
    "how",
    [
        *("no_config", "no_weights", "cut_weights", "garbled_weights", "garbled_config"),
        *("other_shape", "unknown_architecture", "garbled_tokenizer"),
    ],
)
def test_a_model_folder_that_cannot_be_used(how: str, command: Command, tiny_folder: Path, tmp_path: Path) -> None:
    folder = copytree(tiny_folder, tmp_path / "model")
    damage(folder, how)
    answer = command("method=dense", "model=hf", f"model.path={folder}")
    assert_refused(answer, [f"model.path={folder}"], tmp_path / "store")


def test_a_model_path_that_is_a_file(command: Command, text_file: Path, tmp_path: Path) -> None:
    answer = command("method=dense", "model=hf", f"model.path={text_file}")
    assert_refused(answer, [f"model.path={text_file}"], tmp_path / "store")


def test_a_folder_that_is_no_model(command: Command, tmp_path: Path) -> None:
    answer = command("method=dense", "model=hf", f"model.path={tmp_path}")
    assert_refused(answer, [f"model.path={tmp_path}", "config.json"], tmp_path / "store")


@pytest.mark.parametrize("how", ["a_file", "under_a_file", "read_only"])
def test_a_store_that_cannot_be_written(how: str, command: Command, small: list[str], tmp_path: Path) -> None:
    place = tmp_path / "place"
    if how == "read_only":
        if os.geteuid() == 0:
            place = Path("/proc/sparsebench")  # the one folder that refuses even root
        else:
            place.mkdir(mode=0o500)
    else:
        place.write_text("a file", encoding="utf-8")
    store = place / "store" if how == "under_a_file" else place
    assert_refused(command("method=dense", f"store={store}", *small), [f"store={store}"], tmp_path / "store")


@pytest.mark.parametrize("how", ["not_empty", "a_file"])
def test_saving_never_overwrites(how: str, command: Command, small: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    if how == "a_file":
        folder.write_text("mine", encoding="utf-8")
    else:
        folder.mkdir()
        (folder / "mine").touch()
    answer = command("method=magnitude", f"save={folder}", *small)
    assert_refused(answer, [f"save={folder}"], tmp_path / "store")
    assert folder.is_file() or [file.name for file in folder.iterdir()] == ["mine"]


def test_one_folder_cannot_hold_a_grid(command: Command, small: list[str], tmp_path: Path) -> None:
    answer = command("-m", "method=magnitude", "sparsity=0.3,0.5", f"save={tmp_path / 'saved'}", *small)
    assert_refused(answer, ["save="], tmp_path / "store")


def test_a_method_needs_what_the_task_cannot_give(command: Command, toys: Path, tmp_path: Path) -> None:
    answer = command("--config-dir", str(toys), "method=evicts", "model=tiny_100k", "task=perplexity")
    assert_refused(answer, ["method=evicts", "decode", "protocol=continuation"], tmp_path / "store")


def test_a_refiner_needs_something_to_refine(command: Command, toys: Path, tmp_path: Path) -> None:
    answer = command("--config-dir", str(toys), "method=keeps_mask")
    assert_refused(answer, ["method=keeps_mask", "refine"], tmp_path / "store")


def test_a_bad_run_late_in_a_grid_is_found_before_the_first_starts(
    command: Command, small: list[str], tmp_path: Path
) -> None:
    answer = command("-m", "method=magnitude", "pattern=2:4,3:7", *small)
    assert_refused(answer, ["pattern=3:7"], tmp_path / "store")


@pytest.mark.parametrize(
    ("content", "say"),
    [
        ("plugins: [missing.py]", "missing.py"),
        ("plugins: [bad.py]", "bad.py"),
        ("plugins: [nonsense.py]", "literals"),
        ("plugins: [twice.py]", "declared twice"),
        ("plugins: [", "not valid YAML"),
        ("methods: [a.py]", "plugins"),
        ("plugins: 3", "plugins"),
        ("plugins: [3]", "plugins"),
    ],
)
def test_a_config_dir_that_cannot_be_used(content: str, say: str, command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "sparsebench.yaml").write_text(content, encoding="utf-8")
    (folder / "bad.py").write_text("@method(\nclass", encoding="utf-8")
    (folder / "nonsense.py").write_text("@corpus(name=str(1), version=1)\nclass A: pass\n", encoding="utf-8")
    (folder / "twice.py").write_text('@corpus(name="kjv", version=1)\nclass A: pass\n', encoding="utf-8")
    assert_refused(command("--config-dir", str(folder), "method=dense"), [say], tmp_path / "store")


def test_a_yaml_with_an_unknown_option(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine" / "method").mkdir(parents=True)
    yaml = "# @package method.mine\nkind: wanda\nnrm: l1\n"
    (tmp_path / "mine" / "method" / "mine.yaml").write_text(yaml, encoding="utf-8")
    answer = command("--config-dir", str(tmp_path / "mine"), "method=mine")
    assert_refused(answer, ["method.mine.nrm", "'norm'"], tmp_path / "store")


def test_through_a_real_process(tmp_path: Path) -> None:
    """The exit code and the one line survive the module entry point, with no torch imported on the way."""
    done = subprocess.run(
        [sys.executable, "-m", "sparsebench", "method=wonda"],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sparsebench: method=wonda: unknown method; did you mean 'wanda'?\n"
    assert list(tmp_path.iterdir()) == []
