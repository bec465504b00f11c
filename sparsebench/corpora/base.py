"""What a corpus is: documents in splits, from which calibration windows and evaluation text are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from sparsebench.declare import Declared, option
from sparsebench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_MAX_MISSES = 100_000  # draws in a row that found no document long enough


@dataclass(frozen=True)
class Corpus(Declared):
    """Base of declared corpora (``@corpus``). A subclass gives ``documents``; drawing is shared."""

    nsamples: int = option(128, "calibration sequences", low=1, high=100_000)
    seqlen: int | None = option(None, "tokens of a calibration sequence; the model's context if not given", low=2)

    def documents(self, split: str) -> list[str]:
        """The texts of a split: train, validation or test."""
        raise UserError(f"corpus {type(self).__name__}: has no documents")

    def text(self, split: str) -> str:
        """The split as one text, as perplexity reads it: documents joined by blank lines."""
        return "\n\n".join(self.documents(split))

    def windows(self, tokenizer: PreTrainedTokenizerBase, context: int, seed: int) -> Tensor:
        """Calibration sequences: (nsamples, seqlen) int64, drawn from the train split.

        The rule of the pruning papers (locuslab/wanda): Python's ``random`` seeded by ``seed``; draw
        a document uniformly until it has MORE than ``seqlen`` tokens, then a start uniformly in
        [0, tokens - seqlen - 1] inclusive. UserError when no document is long enough.
        """
        import torch

        length = self.seqlen or context
        if length > context:
            raise UserError(f"calibration.seqlen={length}: the model's context is {context} tokens")
        documents = self.documents("train")
        if not documents:
            raise UserError("calibration: the corpus has no training documents")
        rng, encoded = Random(seed), {}
        sequences: list[list[int]] = []
        misses = 0
        while len(sequences) < self.nsamples:
            index = rng.randint(0, len(documents) - 1)
            if index not in encoded:
                encoded[index] = tokenizer(documents[index], verbose=False)["input_ids"]
            ids = encoded[index]
            misses += 1
            if len(ids) > length:
                misses = 0
                start = rng.randint(0, len(ids) - length - 1)
                sequences.append(ids[start : start + length])
            elif misses > _MAX_MISSES or (len(encoded) == len(documents) and max(map(len, encoded.values())) <= length):
                longest = max(map(len, encoded.values()))
                raise UserError(f"calibration.seqlen={length}: no document is longer; the longest has {longest} tokens")
        return torch.tensor(sequences)
