"""What many tests need: the command line in this process, a tiny model folder, and toy plug-ins."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from shutil import copytree

import pytest
from commands import TOYS, Answer, Command

import sparsebench
from sparsebench.cli import main
from sparsebench.results.store import Store

# A library that looks for a network here finds out at once that there is none to use.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TOKENIZER = Path(sparsebench.__file__).parent / "models" / "weights" / "tokenizer"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whatever ran before it. Another seed finds the tests that need theirs."""
    seed = int(os.environ.get("SPARSEBENCH_TEST_SEED", "0"))
    random.seed(seed)
    if "numpy" in sys.modules:  # no test needs to load what it does not use
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs one command line in this process, from an empty folder, with the store ``store`` beside it."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("SPARSEBENCH_STORE", str(tmp_path / "store"))

    def run(*words: str) -> Answer:
        capsys.readouterr()
        code = main(words)
        captured = capsys.readouterr()
        assert list(here.iterdir()) == [], "a command left files in the working directory"
        return Answer(code, captured.out, captured.err, Store(tmp_path / "store"))

    return run


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``--config-dir`` whose plug-in declares the toy methods, task, corpus and model above."""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toys.py").write_text(TOYS, encoding="utf-8")
    (folder / "sparsebench.yaml").write_text("plugins: [toys.py]\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred tokens of text."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"And it came to pass in the year {year} that the people of the land were numbered." for year in range(40)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (2 blocks, width 16, context 64) with the embedded tokenizer, as a model folder. Read only."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = copytree(TOKENIZER, tmp_path_factory.mktemp("models") / "tiny")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small(tiny_folder: Path, text_file: Path) -> list[str]:
    """The words of a run that takes a moment: the tiny folder on a short text."""
    return [
        "model=hf",
        f"model.path={tiny_folder}",
        "calibration=kjv",
        f"task.file={text_file}",
        "task.context=32",
        "task.windows=4",
    ]
