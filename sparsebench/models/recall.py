"""Trains the pair-token recall model in seconds: ``python -m sparsebench.models.recall [folder]``.

A Llama of 2 layers, width 64, 4 heads on 2 key/value heads. Sequences are N facts of one token each with different
keys, then 16 questions with their answers; only answers are trained on. N starts at 16 and rises by 16 whenever a
batch is more than 97% right, up to 48. The answers stand in the sequence, where the recipe that this follows has
questions alone: the model then is a plain next-token predictor that also knows dialogues.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsebench.corpora import recall
from sparsebench.models.embedded import HOME
from sparsebench.models.words import word_tokenizer
from sparsebench.trainer import Batch, Hook, TrainConfig, Trainer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 128
QUESTIONS = 16
FIRST, STEP, LAST = 16, 16, 48  # facts of a context
STEPS, ROWS = 350, 64


def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(recall.vocabulary(), CONTEXT)


def build() -> LlamaForCausalLM:
    """The untrained model. Its vocabulary is a multiple of 8, as are all matrix sides (n:m up to 8)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=-(-(recall.SIZE + 1) // 8) * 8,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


class Dialogues(Hook):
    """The training data (a source) and how they grow (a hook)."""

    def __init__(self) -> None:
        self.items = FIRST

    def batch(self, rng: Random, rows: int, length: int) -> Batch:
        """``rows`` dialogues over ``items`` facts, whatever ``length`` says; answers weigh 1, all else 0."""
        ids = torch.tensor([recall.dialogue(rng, self.items, QUESTIONS) for _ in range(rows)])
        return Batch(ids, (ids[:, 1:] >= recall.ANSWER).float())

    def loss(self, trainer: Trainer, batch: Batch, logits: Tensor) -> Tensor | None:
        """Adds nothing; raises the number of facts once they are known."""
        right = logits.argmax(-1) == batch.ids[:, 1:]
        if float(right[batch.weights > 0].float().mean()) > 0.97:
            self.items = min(LAST, self.items + STEP)
        return None


@torch.no_grad()
def accuracy(model: torch.nn.Module, items: int = LAST, rows: int = 64) -> float:
    """Share of right answers on ``rows`` dialogues that training has not seen."""
    ids = torch.tensor([recall.dialogue(Random(f"held out/{row}"), items, QUESTIONS) for row in range(rows)])
    right = model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1) == ids[:, 1:]
    return float(right[ids[:, 1:] >= recall.ANSWER].float().mean())


def train(steps: int = STEPS) -> LlamaForCausalLM:
    """The trained model, the same every time on one machine."""
    model, data = build(), Dialogues()
    rate, length = 3e-3, LAST + 2 * QUESTIONS
    config = TrainConfig(
        steps=steps,
        batch_tokens=ROWS * length,
        lengths=((1.0, length),),
        lr=rate,
        warmup=100 / steps,
        decay=0.2,
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    sources: Mapping[str, tuple[Dialogues, float]] = {"recall": (data, 1.0)}
    Trainer(model, sources, config, None, hooks=[data], optimisers=[optimiser]).fit()
    return model


def main(folder: Path = HOME / "pair_recall") -> None:
    """Trains, says how well, and writes a bfloat16 Hugging Face folder."""
    model = train()
    print(f"float32: {accuracy(model):.4f}")
    model.bfloat16().save_pretrained(folder)
    print(f"bfloat16: {accuracy(model.float()):.4f} -> {folder}")
    tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
