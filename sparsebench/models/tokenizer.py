"""The ladder's tokenizer: one byte-level BPE of 1,024 entries for both corpora, digits split.

``python -m sparsebench.models.tokenizer <folder>`` trains it again: the kjv training chapters plus
each tinyworld word often enough to become a single token. The result is deterministic.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from sparsebench.corpora import kjv, tinyworld

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 1024
_WORD_REPEATS = 800
# an optional space and letters | an optional space and ONE digit | punctuation | white space
_PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def _training_text() -> Iterator[str]:
    yield from kjv.documents("train")
    words = [word for word in tinyworld.vocabulary() if word.startswith(" ")]
    rng = Random("tokenizer")
    for _ in range(_WORD_REPEATS):
        yield "".join(rng.sample(words, len(words)))


def train(context: int) -> PreTrainedTokenizerFast:
    """The trained tokenizer; ``context`` is the models' number of positions."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[tinyworld.BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    end = tinyworld.BEGIN
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end, model_max_length=context
    )


def main(folder: str) -> None:
    from sparsebench.models.ladder import CONTEXT

    tokenizer = train(CONTEXT)
    split = [word for word in tinyworld.vocabulary() if len(tokenizer.encode(word, add_special_tokens=False)) != 1]
    if split:
        raise SystemExit(f"tokenizer: not single tokens: {split}")
    tokenizer.save_pretrained(Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
