"""The command that trains ReLU and SiLU models and measures activation sparsity at their checkpoints."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from sparsebench.models import emergence
from sparsebench.paths import data_folder

SMALL = ["steps=6", "batch_tokens=512", "checkpoints=3", "windows=2", "width=8", "layers=1", "stabilise_last=2"]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "emergence.csv").open(newline="") as table:
        return list(csv.DictReader(table))


def test_a_few_steps_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, f"folder={tmp_path}"]
    assert emergence.main(["relu", *words]) == 0
    found = rows(tmp_path)
    assert [row["step"] for row in found] == ["4", "6"]  # the first one is warm-up
    assert [row["tokens"] for row in found] == ["2048", "3072"]
    assert len({row["cett"] for row in found}) == 1  # one for the run
    assert all(0 < float(row["ratio"]) < 1 and row["ratio"] == row["ratio_layer_0"] for row in found)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"python -m sparsebench fit {tmp_path / 'emergence.csv'} law=decreasing_logspace D=tokens_1e9 value=ratio "
        "activation=relu width=8 layers=1"
    )
    assert (tmp_path / "relu-8x1" / "hf" / "model.safetensors").is_file()
    # once more: nothing is trained again, the same rows stand there once
    before = (tmp_path / "relu-8x1" / "checkpoint.pt").stat().st_mtime_ns
    assert emergence.main(["relu", *words]) == 0
    assert rows(tmp_path) == found and (tmp_path / "relu-8x1" / "checkpoint.pt").stat().st_mtime_ns == before
    # other training settings are another folder's business
    assert emergence.main(["relu", *words, "lr=0.1"]) == 2
    assert "other training settings" in capsys.readouterr().err.splitlines()[-1]


def test_rows_of_other_runs_stay(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    common = {"width": 8, "step": 1, "ratio": 0.25}
    emergence.write(file, [{"activation": "relu", "layers": 1, **common, "ratio_layer_0": 0.5}])
    emergence.write(file, [{"activation": "silu", "layers": 1, **common, "ratio_layer_1": 0.125}])
    emergence.write(file, [{"activation": "relu", "layers": 1, **common, "ratio": 0.75}])
    assert [(row["activation"], row["ratio"]) for row in emergence.read(file)] == [("silu", "0.25"), ("relu", "0.75")]


@pytest.mark.parametrize(("words", "says"), [
    (["gelu"], "emergence gelu: not an activation function here"),
    (["widht=8"], "widht: unknown option of emergence; did you mean 'width'?"),
    (["width=12"], "width=12: must be a multiple of 8"),
    (["steps=two"], "steps=two: must be a whole number"),
    (["checkpoints=1"], "checkpoints=1: must be above warmup_drop and at most steps"),
    (["ship", "folder=/nowhere"], "/nowhere/emergence.csv: cannot be read"),
])  # fmt: skip
def test_bad_input_is_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert emergence.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sparsebench: {says}") and error.count("\n") == 1


def test_the_page_has_what_was_measured_and_what_was_published() -> None:
    text = (Path(__file__).parents[2] / "docs" / "sparsing_law.md").read_text(encoding="utf-8")
    found = emergence.read(data_folder("reports") / emergence.MEASURED)
    for activation, name in (("relu", "ReLU"), ("silu", "SiLU")):
        ratios = [float(row["ratio"]) for row in found if row["activation"] == activation]
        assert f"| {ratios[0]:.4f} | {ratios[-1]:.4f} | {min(ratios):.4f} | {max(ratios):.4f} |" in text
        assert text.count(f"| {name} ") > 5
    assert "| ReLU 2.4B | 0.0648 | 1.53 | -3.46 | 0.000156 |" in text


def test_relu_models_are_sparser_and_the_ratio_moves_as_published() -> None:
    found = emergence.read(data_folder("reports") / emergence.MEASURED)
    relu, silu = ([float(row["ratio"]) for row in found if row["activation"] == name] for name in ("relu", "silu"))
    assert max(relu) < min(silu)
    assert relu[0] > relu[-1] and silu[0] < silu[-1]
