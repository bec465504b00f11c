"""The tiny ladder: Llama-architecture models trained on kjv and tinyworld, shipped with the package.

``python -m sparsebench.models.ladder [rung ...] [folder=build/ladder] [autocast=true]`` trains the rungs
(all of them by default), resuming where an earlier call stopped, and ``ship`` copies the finished ones
into the package as bfloat16 Hugging Face folders. ``autocast=false`` computes in float32, which is faster
on a processor without bfloat16 arithmetic. ``sparsebench/models/weights/README.md`` holds
the recipe, the curves and the final losses.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebench.corpora import kjv, tinyworld
from sparsebench.models.embedded import HOME
from sparsebench.models.growing import widen
from sparsebench.trainer import Batch, TrainConfig, Trainer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

CONTEXT = 1024
LENGTHS = ((0.10, 64), (0.22, 128), (0.45, 256), (0.80, 512), (1.0, 1024))
# with fewer steps the short documents, on which induction heads form, get the same number of them
FEW_STEPS = ((0.25, 64), (0.40, 128), (0.60, 256), (0.85, 512), (1.0, 1024))
GROWN = ((0.45, 256), (0.80, 512), (1.0, 1024))  # a grown model has its induction heads already


@dataclass(frozen=True)
class Rung:
    """Shape and training of one model. Every matrix side is a multiple of 8 (n:m up to 8).

    ``grown_from`` names the shipped rung of half the width whose function this one starts with."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    steps: int
    lr: float
    muon_lr: float
    lengths: tuple[tuple[float, int], ...] = LENGTHS
    grown_from: str = ""


RUNGS = {
    "tiny_100k": Rung(48, 2, 4, 128, steps=2500, lr=6e-3, muon_lr=2e-2),
    "tiny_400k": Rung(96, 3, 4, 256, steps=2000, lr=5e-3, muon_lr=2e-2, lengths=FEW_STEPS),
    "tiny_1m": Rung(128, 5, 4, 352, steps=5000, lr=4e-3, muon_lr=1.5e-2),
    "tiny_4m": Rung(256, 5, 8, 704, steps=240, lr=8e-4, muon_lr=4e-3, lengths=GROWN, grown_from="tiny_1m"),
}


def build(rung: Rung, vocabulary: int) -> LlamaForCausalLM:
    """An untrained model of this shape: RoPE, RMSNorm, SwiGLU, two key/value heads, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=rung.hidden,
        intermediate_size=rung.intermediate,
        num_hidden_layers=rung.layers,
        num_attention_heads=rung.heads,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def encode_kjv(tokenizer: PreTrainedTokenizerBase, split: str) -> Tensor:
    """The split's chapters as one stream of ids, each behind ``<|end|>``: (tokens,) int64."""
    ids = tokenizer(kjv.documents(split), add_special_tokens=False)["input_ids"]
    return torch.tensor([token for chapter in ids for token in (0, *chapter)])


class KjvSource:
    """Windows at random places of the training stream, every token weighted 1."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def stream(self) -> Tensor:
        """The training stream, made when it is first needed: a finished training needs none."""
        return encode_kjv(self._tokenizer, "train")

    def batch(self, rng: Random, rows: int, length: int) -> Batch:
        starts = [rng.randrange(len(self.stream) - length - 1) for _ in range(rows)]
        ids = torch.stack([self.stream[start : start + length + 1] for start in starts])
        return Batch(ids, torch.ones(rows, length))


OTHER_TOKENS = 0.02  # weight of a token that is not part of an answer
TASK_SHARES = {
    "retrieval_single": 5,
    "retrieval_multi_key": 5,
    "retrieval_multi_query": 20,
    "variable_tracking": 12,
    "common_words": 5,
    "two_hop": 15,
    "copy": 25,
    "arithmetic": 13,
}  # percent of the training documents


class TinyworldSource:
    """Rows packed with documents of all tasks and of every length that fits; answers weigh most."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        words = tinyworld.vocabulary()
        self.ids = {word: tokenizer.convert_tokens_to_ids(_piece(tokenizer, word)) for word in words}

    def batch(self, rng: Random, rows: int, length: int) -> Batch:
        ids = torch.zeros(rows, length + 1, dtype=torch.int64)
        weights = torch.full((rows, length), OTHER_TOKENS)
        lengths = [n for n in (64, 128, 256, 512, 1024) if n <= length]
        for row in range(rows):
            size = rng.choice(lengths)
            for start in range(0, length, size):
                document = self._document(rng, size)
                ids[row, start : start + size] = torch.tensor([self.ids[token] for token in document.tokens])
                for first, last in document.answers:
                    weights[row, start + first - 1 : start + last - 1] = 1.0
        return Batch(ids, weights)

    def _document(self, rng: Random, length: int) -> tinyworld.Document:
        """Many questions a document: dense supervision is what makes induction heads emerge early."""
        (task,) = rng.choices(list(TASK_SHARES), weights=list(TASK_SHARES.values()))
        single = task in ("retrieval_single", "common_words", "copy")
        options = tinyworld.Options(
            queries=1 if single else rng.randint(1, min(16, length // (32 if task == "variable_tracking" else 16))),
            hops=rng.randint(1, 4),
            items=rng.randint(4, length // 3 if task == "copy" else 8),
        )
        seed = rng.randrange(tinyworld.TRAIN_SEEDS.start, tinyworld.TRAIN_SEEDS.stop)
        try:
            return tinyworld.document(task, length, seed, options)
        except ValueError:  # these facts do not fit this length
            queries = min(length // 16, len(tinyworld.PLACES))
            return tinyworld.document("retrieval_multi_query", length, seed, tinyworld.Options(queries=queries))


def _piece(tokenizer: PreTrainedTokenizerBase, word: str) -> str:
    (piece,) = tokenizer.tokenize(word)
    return str(piece)


@torch.no_grad()
def held_out(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, source: TinyworldSource, windows: int = 64
) -> dict[str, float]:
    """Bits per byte on kjv validation windows of 512 tokens, exact-answer accuracy of each tinyworld task at 512."""
    stream = encode_kjv(tokenizer, "validation")[: windows * 512].reshape(-1, 512)
    nll, scores = 0.0, {}
    for chunk in stream.split(16):
        logits = model(input_ids=chunk, use_cache=False).logits[:, :-1]
        nll += float(F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum"))
    text = "".join(tokenizer.batch_decode(stream[:, 1:]))
    scores["kjv/bits_per_byte"] = round(nll / 0.6931471805599453 / len(text.encode()), 4)
    for task in tinyworld.TASKS:
        documents = [tinyworld.document(task, 512, seed) for seed in range(48)]
        ids = torch.tensor([[source.ids[token] for token in d.tokens] for d in documents])
        right = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1) == ids[:, 1:]
        hits = [bool(right[i, a - 1 : b - 1].all()) for i, d in enumerate(documents) for a, b in d.answers]
        scores[f"tinyworld/{task}"] = round(sum(hits) / len(hits), 4)
    return scores


def train(name: str, folder: Path, autocast: bool = True) -> None:
    """Trains (or resumes) one rung under ``folder/name`` and writes its Hugging Face folder there."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(HOME / "tokenizer")
    rung = RUNGS[name]
    source = TinyworldSource(tokenizer)
    model = build(rung, len(tokenizer))
    if rung.grown_from:
        widen(LlamaForCausalLM.from_pretrained(HOME / rung.grown_from), model)
    trainer = Trainer(
        model,
        {"kjv": (KjvSource(tokenizer), 0.45), "tinyworld": (source, 0.55)},
        TrainConfig(steps=rung.steps, lengths=rung.lengths, lr=rung.lr, muon_lr=rung.muon_lr, autocast=autocast),
        folder / name,
        evaluate=lambda trained: held_out(trained, tokenizer, source),
    )
    trainer.fit()
    model.bfloat16().save_pretrained(folder / name / "hf")
    tokenizer.save_pretrained(folder / name / "hf")


def ship(name: str, folder: Path) -> None:
    """Copies a finished rung into the package, its log thinned to the evaluations."""
    target = HOME / name
    shutil.copytree(folder / name / "hf", target, dirs_exist_ok=True)
    lines = (folder / name / "log.jsonl").read_text().splitlines()
    kept = [line for line in lines if "kjv/bits_per_byte" in json.loads(line)]
    (target / "training.jsonl").write_text("\n".join(kept) + "\n")


def main(arguments: list[str]) -> None:
    folder, autocast = Path("build/ladder"), "autocast=false" not in arguments
    names = [a for a in arguments if "=" not in a and a != "ship"] or list(RUNGS)
    for argument in arguments:
        if argument.startswith("folder="):
            folder = Path(argument.removeprefix("folder="))
    for name in names:
        if "ship" in arguments:
            ship(name, folder)
        else:
            train(name, folder, autocast)


if __name__ == "__main__":
    main(sys.argv[1:])
