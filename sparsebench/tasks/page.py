"""A text of an exact number of tokens, with any tokenizer.

Every count is of the whole text as the model is fed it. What is left is filled with sentences that say nothing, cut in
the middle of a word if need be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from sparsebench.errors import UserError

if TYPE_CHECKING:  # imports torch
    from transformers import PreTrainedTokenizerBase

NOISE = "The rain is soft. The road is long. The night is still. A bird flies by. And so it goes on."
_TRIES = 12
_SMALLEST_FILL = 4  # tokens: a line break and a letter or two; fewer may be impossible to fill


class Fillable(Protocol):
    """A prompt that can take noise."""

    def text(self, filler: str = "") -> str:
        """The prompt, with ``filler`` where it may stand."""
        ...


@dataclass
class Page:
    """``length`` tokens of a tokenizer, to be filled to at least the share ``min_fill``. ``chat``: whether a text is
    put into the tokenizer's chat template, if it has one; ``opening``: what the answer is made to begin with, unless
    the template already does that."""

    tokenizer: PreTrainedTokenizerBase
    length: int
    min_fill: float = 0.9
    chat: bool = True
    opening: str = ""

    def __post_init__(self) -> None:
        self._counts: dict[str, int] = {}

    def ids(self, text: str) -> list[int]:
        """What the model is fed: the text as a user's turn in the chat template, else behind the tokenizer's beginning
        of text."""
        if self.chat and self.tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            wrapped = str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
            return self.plain(self._opened(wrapped))
        first = [] if self.tokenizer.bos_token_id is None else [int(self.tokenizer.bos_token_id)]
        return [*first, *self.plain(self._opened(text))]

    def _opened(self, text: str) -> str:
        return text if text.rstrip().endswith(self.opening.strip()) else text + self.opening

    def plain(self, text: str) -> list[int]:
        """The ids of a piece of text alone."""
        found: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(found)

    def count(self, text: str) -> int:
        """Tokens of a piece of text alone; kept, as pieces come back in many samples."""
        if text not in self._counts:
            self._counts[text] = len(self.plain(text))
        return self._counts[text]

    def room(self, prompt: Fillable) -> int:
        """Tokens that are left beside this prompt; negative if it does not fit."""
        return self.length - len(self.ids(prompt.text()))

    def _fits(self, prompt: Fillable) -> bool:
        """Whether it fits and what is left can be filled."""
        room = self.room(prompt)
        return room == 0 or room >= _SMALLEST_FILL

    def most(self, build: Callable[[int], Fillable], least: int, limit: int = 10**6) -> int:
        """The largest n in ``least`` .. ``limit`` such that ``build(n)`` fits, for prompts that grow with n. UserError
        when not even ``build(least)`` fits."""
        room = self.room(build(least))
        if room < 0:
            raise UserError(
                f"task.length={self.length}: too short for this task, whose smallest prompt has {self.length - room} "
                "tokens here; give a longer one or an easier task"
            )
        low, step = least, 1
        while low + step <= limit and self._fits(build(low + step)):
            low, step = low + step, step * 2
        high = min(low + step, limit + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(build(middle)) else (low, middle)
        return low

    def exact(self, prompt: Fillable) -> tuple[str, list[int]]:
        """The prompt filled up to ``length`` tokens by sentences that say nothing, cut where it comes out exactly.
        UserError when no cut comes to at least ``min_fill`` of the length."""
        text = prompt.text()
        ids = self.ids(text)
        missing, seen = self.length - len(ids), {0}
        for _ in range(_TRIES):
            if len(ids) == self.length:
                break
            missing = next(n for n in count(max(1, missing)) if n not in seen)
            seen.add(missing)
            more = prompt.text(self._filler(missing))
            found = self.ids(more)
            missing += self.length - len(found)
            if len(ids) < len(found) <= self.length:
                text, ids = more, found
        if len(ids) < self.min_fill * self.length:
            raise UserError(f"task.length={self.length}: this tokenizer's prompts come to {len(ids)} tokens at most")
        return text, ids

    def _filler(self, tokens: int) -> str:
        """About so many tokens of noise, cut in the middle of a word if need be."""
        text = " ".join([NOISE] * (tokens // max(1, self.count(NOISE)) + 1))
        low, high = 1, len(text)
        while low < high:  # the shortest cut that has them
            middle = (low + high) // 2
            low, high = (low, middle) if len(self.plain(text[:middle])) >= tokens else (middle + 1, high)
        return text[:low]
