"""The layout of a prompt, the question before and after the text.

Methods that look at the last queries of a prompt then see the question. The chat template, where there is one, counts
as part of the prompt's length (the released code reserves 64 tokens for it, and accepts prompts that fill 90%).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """The parts of a prompt. ``form``: how the answer is to be written; ``rules``: what else the task demands."""

    task: str
    question: str
    context: str
    form: str
    rules: str = ""

    def text(self, filler: str = "") -> str:
        """The prompt; ``filler`` is a line of its own before the context."""
        context = f"{filler}\n{self.context}" if filler else self.context
        question = f"<question>\n{self.question}\n</question>"
        parts = [
            f"{self.task} The question is stated both before and after the text.",
            question,
            f"<text>\n{context}\n</text>",
            question,
            "First explain in a few words, inside <explanation></explanation>, how the text answers the question. Then "
            f"give the final answer inside <answer></answer>, written like this:\n<answer>\n{self.form}\n</answer>",
            self.rules,
        ]
        return "\n\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Sample:
    """One prompt (``ids``: what the model is fed), the right answer as it should be written, and how a generated text
    is scored: 0 to 1, or None where the released code leaves it out."""

    text: str
    ids: list[int]
    gold: str
    score: Callable[[str], float | None]
