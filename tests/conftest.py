"""What many tests need: the command line in this process, a tiny model folder, and toy plug-ins."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

import sparsebench
from sparsebench.cli import main
from sparsebench.results.store import Store

# A library that looks for a network here finds out at once that there is none to use.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TOKENIZER = Path(sparsebench.__file__).parent / "models" / "weights" / "tokenizer"

TOYS = '''
"""Weight methods that misbehave, one that works, and one of another phase."""

from dataclasses import dataclass

from sparsebench.declare import Declared, Taxonomy, corpus, method, model, option, task
from sparsebench.corpora.base import Corpus
from sparsebench.methods.weights.base import Pruner, ScorePruner, WeightMethod
from sparsebench.models.embedded import Ladder
from sparsebench.tasks.base import Outcome, Score

CALLS = []


@method(name="raises", version=1, paper="none", target="weights", phase="once", stage="select",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class Raises(Pruner):
    """Runs out of memory."""

    def select(self, layer):
        raise RuntimeError("out of memory:\\ntried to allocate 8 GiB")


@method(name="makes_nan", version=1, paper="none", target="weights", phase="once", stage="select",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class MakesNan(ScorePruner):
    """Leaves NaN in a weight."""

    def score(self, layer):
        return layer.weight.abs().float()

    def select(self, layer):
        mask = super().select(layer)
        layer.weight[mask] = float("nan")
        return mask


@method(name="never_acts", version=1, paper="none", target="weights", phase="once", stage="select",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class NeverActs(Pruner):
    """Promises a level and does nothing."""


@method(name="interrupted", version=1, paper="none", target="weights", phase="once", stage="select",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class Interrupted(Pruner):
    """The user presses Ctrl-C."""

    def select(self, layer):
        raise KeyboardInterrupt


@method(name="largest", version=1, paper="none", target="weights", phase="once", stage="select",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class Largest(ScorePruner):
    """Prunes the largest weights; counts how often it is asked."""

    group: str = option("row", "weights that are compared", choices=("row", "layer"))
    sign: int = option(-1, "-1: the largest go, 1: the smallest", choices=(-1, 1))

    def score(self, layer):
        CALLS.append(layer.name)
        return self.sign * layer.weight.abs().float()


@method(name="keeps_mask", version=1, paper="none", target="weights", phase="once", stage="refine",
        taxonomy=Taxonomy(object="weights", granularity=("unstructured",), when_mask_is_found="after_training"))
@dataclass(frozen=True)
class KeepsMask(WeightMethod):
    """A refiner that leaves every mask as it is."""

    stage = "refine"
    rounds: int = option(1, "rounds", low=1, high=10)


@method(name="evicts", version=1, paper="none", target="kv_cache", phase="decode",
        taxonomy=Taxonomy(object="kv_cache", granularity=("token",), when_mask_is_found="at_inference"))
@dataclass(frozen=True)
class Evicts(Declared):
    """A cache method: acts while tokens are decoded."""

    budget: int = option(64, "entries kept", low=1)


@task(name="constant", version=1, metric="number", better="higher")
@dataclass(frozen=True)
class Constant(Declared):
    """Scores every model with the same number."""

    number: float = option(1.0, "the score", low=0.0)
    spoil: bool = option(False, "score NaN instead")

    def prepare(self, model, corpora):
        return None

    def evaluate(self, model, how, prepared):
        value = float("nan") if self.spoil else self.number
        return Outcome({"number": Score(value, None, 1)}, [{"sample": "0", "number": value}])


@corpus(name="alphabet", version=1)
@dataclass(frozen=True)
class Alphabet(Corpus):
    """The letters, again and again."""

    def documents(self, split):
        return [" ".join("abcdefghijklmnopqrstuvwxyz") * 40] * 3


@model(name="smallest", version=1, calibration="alphabet")
@dataclass(frozen=True)
class Smallest(Ladder):
    """The smallest embedded model under another name."""

    rung: str = option("tiny_100k", "which model of the ladder", choices=("tiny_100k",))
'''


@dataclass
class Answer:
    """What one command gave."""

    code: int
    out: str
    err: str
    store: Store

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.store.records()


Command = Callable[..., Answer]


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
