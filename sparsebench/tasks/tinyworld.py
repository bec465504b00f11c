"""Accuracy on the tinyworld tasks: retrieval, tracking, counting, two hops, copying, arithmetic.

A document's answers are scored with the gold tokens before them in the context (as in SCBench's
golden context): an answer is right when every one of its tokens is the model's most likely one,
which is what greedy decoding from the same prompt would produce. Documents are drawn by
``task.seed``, so every method sees the same ones.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsebench.corpora import tinyworld
from sparsebench.declare import Declared, option, task
from sparsebench.errors import UserError, closest
from sparsebench.models.base import LoadedModel
from sparsebench.tasks.base import Evaluation, Outcome, Score
from sparsebench.tasks.scoring import score_tokens


@dataclass(frozen=True)
class Encoded:
    """One document as ids (tokens,), the first token of its question, and its answers' token ranges."""

    name: str
    ids: list[int]
    question: int
    answers: list[tuple[int, int]]


@task(
    name="tinyworld",
    version=1,
    metric="accuracy",
    better="higher",
    gives=("prefill", "decode if protocol=continuation"),
)
@dataclass(frozen=True)
class TinyworldTask(Declared):
    """Exact-answer accuracy on the procedural tinyworld tasks at any length."""

    tasks: tuple[str, ...] = option(
        (
            "retrieval_single",
            "retrieval_multi_key",
            "retrieval_multi_query",
            "variable_tracking",
            "common_words",
            "two_hop",
            "copy",
            "arithmetic",
        ),
        "which of the eight tasks",
    )
    length: int = option(256, "tokens of a document (of the ladder's tokenizer)", low=64, high=8192)
    samples: int = option(64, "documents per task", low=1, high=100_000)
    seed: int = option(0, "first document; never the run's seed", low=0, high=100_000_000)
    hops: int = option(2, "copy steps from the variable to its value", low=1, high=8, only="tasks=variable_tracking")
    keys: int = option(
        0,
        "needles in a document, 0 to grow with the length",
        low=0,
        high=32,
        only="tasks=retrieval_multi_key|retrieval_multi_query|two_hop",
    )
    items: int = option(8, "words of the list", low=2, high=32, only="tasks=copy|common_words")
    protocol: str = option(
        "windows",
        "one forward per document, or context first and the question through the cache",
        choices=("windows", "continuation"),
    )

    def prepare(self, model: LoadedModel, corpora: Any) -> dict[str, list[Encoded]]:
        """The encoded documents by task. UserError for an unknown task or documents that do not fit."""
        if not self.tasks:
            raise UserError(f"task.tasks: name at least one of {', '.join(tinyworld.TASKS)}")
        for name in self.tasks:
            if name not in tinyworld.TASKS:
                raise UserError(f"task.tasks={name}: unknown tinyworld task{closest(name, tinyworld.TASKS)}")
        if "common_words" in self.tasks and self.items < 4:
            raise UserError(f"task.items={self.items}: common_words has a most common word from 4 words on")
        return {name: [self._encode(model, name, self.seed + i) for i in range(self.samples)] for name in self.tasks}

    def prompts(self, prepared: dict[str, list[Encoded]]) -> list[int]:
        """Lengths of the prompts, in tokens: the context without the question where that comes through the cache."""
        documents = [document for group in prepared.values() for document in group]
        cached = self.protocol == "continuation"
        return sorted({document.question if cached else len(document.ids) for document in documents})

    def _encode(self, model: LoadedModel, name: str, seed: int) -> Encoded:
        queries = tinyworld.DEFAULTS[name].queries
        options = tinyworld.Options(queries=queries, keys=self.keys, hops=self.hops, items=self.items)
        try:
            document = tinyworld.document(name, self.length, seed, options)
        except ValueError as error:
            raise UserError(f"task.length={self.length}: {error}") from None
        ids, spans = encode(model, document)
        if len(ids) > model.context:
            raise UserError(
                f"task.length={self.length}: {len(ids)} tokens; {model.name} has a context of {model.context}"
            )
        answers = [(spans[start][0], spans[end - 1][1]) for start, end in document.answers]
        return Encoded(f"{name}/{seed}", ids, spans[document.question - 1][1], answers)

    def evaluate(self, model: LoadedModel, how: Evaluation, prepared: dict[str, list[Encoded]]) -> Outcome:
        samples: list[dict[str, Any]] = []
        scores: dict[str, Score] = {}
        done, total = 0, sum(map(len, prepared.values()))
        for name, documents in prepared.items():
            values = []
            for batch in self._batches(documents, max(1, how.batch_size * 512 // self.length)):
                for document, hits in zip(batch, self._hits(model, batch), strict=True):
                    right = [float(hits[start:end].all()) for start, end in document.answers]
                    rows = [{"sample": f"{document.name}/{q}", "task": name, "correct": r} for q, r in enumerate(right)]
                    samples += rows
                    values.append(sum(right) / len(right))
                done += len(batch)
                how.progress(done, total)
            scores[f"accuracy/{name}"] = Score.mean(values)
        return Outcome({"accuracy": Score.average([*scores.values()]), **scores}, samples, {"length": self.length})

    def _batches(self, documents: list[Encoded], rows: int) -> list[list[Encoded]]:
        """Groups that can run together: equally long, so that no method takes padding for a prompt's last tokens, and
        through the cache with their questions at the same place."""
        cached = self.protocol == "continuation"
        groups: dict[tuple[int, int], list[Encoded]] = {}
        for document in documents:
            groups.setdefault((len(document.ids), document.question if cached else 0), []).append(document)
        return [group[i : i + rows] for group in groups.values() for i in range(0, len(group), rows)]

    def _hits(self, model: LoadedModel, batch: list[Encoded]) -> Tensor:
        """(rows, tokens) bool: token t is the most likely one, in documents of one length. FloatingPointError when the
        model's outputs are not numbers."""
        ids = torch.tensor([document.ids for document in batch])
        prefill = batch[0].question if self.protocol == "continuation" else 0
        nll, hits = score_tokens(model, ids, prefill=prefill)
        if nll.isnan().any():  # their largest is meaningless, yet would count as a finite accuracy
            raise FloatingPointError("tinyworld: the model's logits are not numbers (NaN)")
        return torch.nn.functional.pad(hits, (ids.shape[1] - hits.shape[1], 0))


def encode(model: LoadedModel, document: tinyworld.Document) -> tuple[list[int], list[tuple[int, int]]]:
    """The document's ids and, for each of its tokens, the half-open range of ids that cover it.

    Works with any fast tokenizer by character offsets; an id that covers parts of two tokens belongs
    to both. The first id is the tokenizer's beginning of text, if it has one.
    """
    tokenizer = model.tokenizer
    encoded = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ends = [end for _, end in encoded["offset_mapping"]]  # starts may leave out a leading space; ends never do
    spans, begin = [(0, len(first))], 0
    for token in document.tokens[1:]:
        end = begin + len(token)
        spans.append((len(first) + bisect_right(ends, begin), len(first) + bisect_left(ends, end) + 1))
        begin = end
    return [*first, *encoded["input_ids"]], spans
