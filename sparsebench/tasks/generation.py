"""Accuracy of greedily generated answers on the tinyworld tasks.

Each answer's prompt is the document up to it, with the gold answers before it; the model's own ``generate``
continues it for as many tokens as the answer has, greedily. An answer is right when all of its tokens are. Unlike
task ``tinyworld``, which scores the gold tokens in one forward, every token is fed back, so that methods of decoding
act, and a wrong token leads to others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparsebench.declare import Declared, option, task
from sparsebench.models.base import LoadedModel
from sparsebench.models.loading import quiet
from sparsebench.tasks.base import Evaluation, Outcome, Score
from sparsebench.tasks.tinyworld import TinyworldTask


@dataclass(frozen=True)
class Question:
    """One answer to generate: its stable name, its task, the ids in front of it and its own."""

    name: str
    task: str
    prompt: list[int]
    answer: list[int]


@task(name="generation", version=1, metric="accuracy", better="higher", gives=("prefill", "decode"))
@dataclass(frozen=True)
class Generation(Declared):
    """Exact-answer accuracy of greedy decoding on tinyworld tasks."""

    tasks: tuple[str, ...] = option(("copy", "arithmetic"), "which of the eight tinyworld tasks")
    length: int = option(256, "tokens of a document (of the ladder's tokenizer)", low=64, high=8192)
    samples: int = option(64, "documents per task", low=1, high=100_000)
    seed: int = option(0, "first document; never the run's seed", low=0, high=100_000_000)
    items: int = option(16, "words of the list", low=2, high=32, only="tasks=copy|common_words")

    def prepare(self, model: LoadedModel, corpora: Any) -> list[Question]:
        """The questions, task by task. UserError for an unknown task or documents that do not fit."""
        documents = TinyworldTask(self.tasks, self.length, self.samples, self.seed, items=self.items)
        return [
            Question(f"{document.name}/{index}", name, document.ids[:start], document.ids[start:end])
            for name, found in documents.prepare(model, corpora).items()
            for document in found
            for index, (start, end) in enumerate(document.answers)
        ]

    def prompts(self, prepared: list[Question]) -> list[int]:
        """Lengths of the prompts, in tokens."""
        return sorted({len(question.prompt) for question in prepared})

    def evaluate(self, model: LoadedModel, how: Evaluation, prepared: list[Question]) -> Outcome:
        right: dict[str, bool] = {}
        groups: dict[tuple[int, int], list[Question]] = {}
        for question in prepared:
            groups.setdefault((len(question.prompt), len(question.answer)), []).append(question)
        rows = max(1, how.batch_size * 512 // self.length)
        with quiet():
            for group in groups.values():
                for first in range(0, len(group), rows):
                    right |= _answer(model, group[first : first + rows])
                    how.progress(len(right), len(prepared))
        samples = [{"sample": q.name, "task": q.task, "correct": float(right[q.name])} for q in prepared]
        return Outcome(_scores(samples), samples, {"length": self.length})


@torch.no_grad()
def _answer(model: LoadedModel, batch: list[Question]) -> dict[str, bool]:
    """Whether each question's answer is generated. Their prompts are equally long, as are their answers."""
    ids = torch.tensor([question.prompt for question in batch], device=model.device)
    new = len(batch[0].answer)
    generator: Any = model.model
    pad = getattr(generator.generation_config, "pad_token_id", None)
    found = generator.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        num_beams=1,
        pad_token_id=0 if pad is None else pad,
    )
    return {q.name: row == q.answer for q, row in zip(batch, found[:, ids.shape[1] :].tolist(), strict=True)}


def _scores(samples: list[dict[str, Any]]) -> dict[str, Score]:
    """``accuracy``: the mean over tasks; and each task's own."""
    values: dict[str, list[float]] = {}
    for row in samples:
        values.setdefault(row["task"], []).append(row["correct"])
    each = {f"accuracy/{name}": Score.mean(one) for name, one in values.items()}
    return {"accuracy": Score.average([*each.values()]), **each}
