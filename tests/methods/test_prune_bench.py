"""``bench prune`` runs, compares what it claims to compare, and notices when two ways do not agree."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
from commands import Command
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from sparsebench.bench import naive, peaks, prune
from sparsebench.bench.naive import Level
from sparsebench.models.loading import How, load_folder
from sparsebench.models.restoring import Original

SMALL = prune.Options(part="speed", width=64, mlp=64, blocks=2, windows=2, tokens=8, repeats=3, levels=(0.5, 0.75))
WIDE = peaks.Wide(64, 96, "bfloat16", windows=2, tokens=8, method="wanda", threads=1, seed=0)


def silent(text: str) -> None:
    pass


def test_speed_table() -> None:
    report = prune.run(SMALL, silent)
    assert [row["case"] for row in report.rows] == [
        "magnitude 0.5", "magnitude 2:4", "magnitude 0.5+0.75", "wanda 0.5", "wanda 2:4", "wanda 0.5+0.75",
        "sparsegpt 0.5", "sparsegpt 2:4", "sparsegpt 0.5+0.75", "wanda 0.5+0.75 sequential=none",
        "sparsegpt 0.5+0.75 sequential=none",
    ]  # fmt: skip
    assert all(row["vs_naive"] > 0 and row["peak_mb"] is None for row in report.rows)
    assert all(row["identical"] for row in report.rows if "sparsegpt" not in row["case"])


@pytest.fixture
def subject() -> prune.Subject:
    torch.manual_seed(0)
    model = LlamaForCausalLM(peaks.shape(64, 128, 2, 16)).eval()
    return prune.Subject(model, Original(model), peaks.random_windows(4, 16, 0))


def test_masks_that_differ_are_no_result(subject: prune.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    case = prune.Case("magnitude", (Level(0.5),))
    assert prune.differing(case, subject) == 0
    right = naive.magnitude
    monkeypatch.setattr(naive, "magnitude", lambda weight, level: right(weight, Level(0.51)))
    with pytest.raises(RuntimeError, match=r"magnitude 0\.5: \d+ of \d+ mask entries differ"):
        prune.differing(case, subject)


def test_the_plain_form_prunes_and_updates(subject: prune.Subject) -> None:
    model = subject.model
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    naive.prune(model, "sparsegpt", Level(0.5, (2, 4)), subject.windows)
    after = model.model.layers[0].mlp.up_proj.weight.detach()
    assert ((after != 0).view(-1, 4).sum(1) == 2).all()
    kept = after != 0
    assert not torch.equal(after[kept], before[kept])
    assert all(isinstance(one, nn.Linear) for _, one in naive._linears(model.model.layers[0]))


def test_memory_rows() -> None:
    [whole, disk] = peaks.measure(WIDE, (2,), ("whole", "disk"), silent)
    assert [whole["case"], disk["case"]] == ["wanda L=2 in memory", "wanda L=2 streamed, activations=disk"]
    assert whole["identical"] is None and disk["identical"] is True
    assert all(row["peak_mb"] >= row["start_mb"] > 50 for row in (whole, disk))


def test_a_model_is_written_as_it_is_described(tmp_path: Path) -> None:
    size = peaks.write(tmp_path / "model", WIDE, 3)
    loaded = load_folder(tmp_path / "model", How("x", "x", device="cpu"))
    assert loaded.model.dtype == torch.bfloat16 and len(loaded.model.model.layers) == 3
    assert size == sum(one.nbytes for one in loaded.model.parameters())


def test_one_bit_is_a_difference(tmp_path: Path) -> None:
    peaks.write(tmp_path / "one", WIDE, 1)
    other = copytree(tmp_path / "one", tmp_path / "other")
    assert peaks.equal(tmp_path / "one", other)
    tensors: dict[str, Tensor] = load_file(other / "model-0.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].view(torch.int16)[5, 7] ^= 1
    save_file(tensors, other / "model-0.safetensors")
    assert not peaks.equal(tmp_path / "one", other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("hidden=100", "hidden=100: must be a multiple of 64"),
        ("width=65", "width=65: must be a multiple of 64"),
        ("ways=[whole,mapped]", "ways=mapped"),
        ("method=perp", "method=perp"),
        ("levels=[1]", "levels=1"),
    ],
)
def test_mistakes_are_one_line(words: str, message: str, command: Command) -> None:
    answer = command("bench", "prune", *words.split())
    assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1, answer.err


def test_as_json(command: Command) -> None:
    words = "part=speed methods=[magnitude] width=64 mlp=64 blocks=1 windows=1 tokens=4 repeats=3 format=json".split()
    found = json.loads(command("bench", "prune", *words).out)
    assert len(found["rows"]) == 3 and {"case", "vs_naive", "identical", "verdict"} <= found["rows"][0].keys()
