"""A tokenizer of whole words, for models of a language with few of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OTHER = "<|other|>"


def word_tokenizer(vocabulary: Sequence[str], context: int, **special: str) -> PreTrainedTokenizerFast:
    """One id a word; words of any other language are one id too. ``special``: further tokens, such as ``eos_token``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate([*vocabulary, OTHER])}
    made = Tokenizer(models.WordLevel(words, unk_token=OTHER))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=OTHER, model_max_length=context, **special)
