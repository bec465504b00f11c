"""The tiny reasoner: what is shipped, and how it is trained."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import torch

from sparsebench.corpora import chains
from sparsebench.models import reasoner
from sparsebench.models.embedded import HOME
from sparsebench.models.tiny_reasoner import TinyReasoner


def test_the_shipped_model() -> None:
    loaded = TinyReasoner().load()
    assert loaded.model.dtype == torch.float32 and loaded.context == 128
    assert loaded.tokenizer.get_vocab() == reasoner.tokenizer().get_vocab()
    assert loaded.tokenizer.eos_token_id == 0
    assert (HOME / "tiny_reasoner" / "model.safetensors").stat().st_size < 800_000
    log = [json.loads(line) for line in (HOME / "tiny_reasoner" / "training.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == reasoner.STEPS and all(log[-1][kind] >= 0.9 for kind in chains.KINDS)


def test_rows_weigh_what_is_to_be_written() -> None:
    batch = reasoner.Rows().batch(Random(0), 3, 40)
    assert batch.ids.shape == (3, 40) and batch.weights.shape == (3, 39)
    words = [[chains.vocabulary()[token] for token in row] for row in batch.ids.tolist()]
    for row, weights in zip(words, batch.weights.tolist(), strict=True):
        assert weights[row.index(chains.THINK)] == 1 and weights[row.index(chains.THINK) - 1] == 0


def test_training_writes_a_model_that_loads(tmp_path: Path) -> None:
    reasoner.main(tmp_path / "made", steps=1)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "training.jsonl",
    ]  # fmt: skip
