"""Trains the tiny reasoner in minutes: ``python -m sparsebench.models.reasoner [folder] [steps]``.

A Llama of 3 layers, width 96, MLP 256, 4 heads on 2 key/value heads. Rows are documents of ``corpora/chains.py`` one
after another, cut at 32 tokens; only thoughts and answers are trained on. The folder also gets ``training.jsonl``: the
loss, and how many held-out questions of each kind the model answers right, every 250 steps.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch

from sparsebench.corpora import chains
from sparsebench.models.base import LoadedModel
from sparsebench.models.embedded import HOME
from sparsebench.models.words import word_tokenizer
from sparsebench.tasks.decoding import greedy
from sparsebench.trainer import Batch, TrainConfig, Trainer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 128
LENGTH, ROWS, STEPS = 32, 40, 1500


def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(chains.vocabulary(), CONTEXT, eos_token=chains.END)


def build() -> LlamaForCausalLM:
    """The untrained model. Its vocabulary is a multiple of 8, as are all matrix sides (n:m up to 8)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=-(-(len(chains.vocabulary()) + 1) // 8) * 8,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


class Rows:
    """The training data: rows of documents; thoughts and answers weigh 1, questions 0."""

    def __init__(self) -> None:
        self.ids = {word: index for index, word in enumerate(chains.vocabulary())}

    def batch(self, rng: Random, rows: int, length: int) -> Batch:
        drawn = [chains.row(rng, length) for _ in range(rows)]
        ids = torch.tensor([[self.ids[word] for word in words] for words, _ in drawn])
        return Batch(ids, torch.tensor([written[1:] for _, written in drawn]).float())


def accuracies(model: LlamaForCausalLM, samples: int = 48) -> dict[str, float]:
    """Share of right answers on questions that training has not drawn (of ``facts``: that it has), by kind."""
    loaded = LoadedModel(model, tokenizer(), "reasoner", CONTEXT)
    found = {}
    for kind in chains.KINDS:
        asked = [chains.draw(kind, Random(f"chains/held out/{kind}/{index}")) for index in range(samples)]
        prompts = [loaded.tokenizer(" ".join(one.question))["input_ids"] for one in asked]
        written = greedy(loaded, prompts, chains.LONGEST)
        answers = [str(loaded.tokenizer.decode(ids)).rpartition(chains.ANSWER)[2].split() for ids in written]
        right = [answer == [*one.answer] for one, answer in zip(asked, answers, strict=True)]
        found[kind] = sum(right) / samples
    return found


def train(folder: Path, steps: int = STEPS) -> LlamaForCausalLM:
    """The trained model, the same every time on one machine; ``folder`` gets checkpoints and the log."""
    model = build()
    config = TrainConfig(
        steps=steps,
        batch_tokens=ROWS * LENGTH,
        lengths=((1.0, LENGTH),),
        lr=5e-3,
        muon_lr=2e-2,
        weight_decay=0.05,
        warmup=40 / steps,
        decay=1 / 3,
        log_every=50,
        evaluate_every=250,
    )
    sources: Mapping[str, tuple[Rows, float]] = {"chains": (Rows(), 1.0)}
    Trainer(model, sources, config, folder, evaluate=lambda _: accuracies(model)).fit()
    return model


def main(folder: Path = HOME / "tiny_reasoner", steps: int = STEPS) -> None:
    """Trains, says how well, and writes a bfloat16 Hugging Face folder with the log."""
    with tempfile.TemporaryDirectory() as scratch:
        model = train(Path(scratch), steps)
        print("float32:", json.dumps(accuracies(model)))
        model.bfloat16().save_pretrained(folder)
        shutil.copy(Path(scratch) / "log.jsonl", folder / "training.jsonl")
    print("bfloat16:", json.dumps(accuracies(model.float())), "->", folder)
    tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    folder, steps = [*sys.argv[1:], *(str(HOME / "tiny_reasoner"), str(STEPS))[len(sys.argv) - 1 :]]
    main(Path(folder), int(steps))
