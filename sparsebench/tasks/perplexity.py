"""Perplexity on held-out text, by the protocol of the pruning papers (Wanda, SparseGPT, GPTQ).

The split's documents are joined by blank lines and tokenised once; floor(tokens / context)
windows that do not overlap are scored; each window's loss is the mean cross entropy over its
context - 1 shifted positions; the perplexity is exp of the plain mean of the windows' losses.
``protocol=continuation`` prefills the first part of each window and scores the rest through the
cache. Standard errors are over windows (of the perplexity: by the delta method).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, inf, log
from typing import Any

import torch
from torch import Tensor

from sparsebench.declare import Declared, option, task
from sparsebench.errors import UserError
from sparsebench.models.base import LoadedModel
from sparsebench.tasks.base import Evaluation, Outcome, Score
from sparsebench.tasks.scoring import score_logits, score_tokens

_MAX_LOSS = 700.0  # exp beyond this overflows a double


@task(
    name="perplexity",
    version=1,
    metric="perplexity",
    better="lower",
    gives=("prefill", "decode if protocol=continuation"),
)
@dataclass(frozen=True)
class Perplexity(Declared):
    """Perplexity of held-out text: kjv, tinyworld, wikitext2, a local file or a hub data set."""

    corpus: str = option("kjv", "the text: a corpus by name (see list corpora)")
    split: str = option("test", "which split of the corpus", choices=("train", "validation", "test"))
    file: str | None = option(None, "a local UTF-8 text file instead of a corpus", unit="file")
    dataset: str | None = option(None, "corpus=hub: name of the data set")
    subset: str | None = option(None, "corpus=hub: its configuration")
    column: str | None = option(None, "corpus=hub: its text column")
    context: int | None = option(None, "tokens of a window; the model's context if not given", low=2, high=1_048_576)
    windows: int | None = option(None, "score only the first so many windows", low=1)
    protocol: str = option(
        "windows",
        "one forward per window, or a prefill and the rest through the cache",
        choices=("windows", "continuation"),
    )
    prefill: int | None = option(
        None, "protocol=continuation: tokens of the prefill; half the context if not given", low=1
    )
    step: int = option(0, "protocol=continuation: tokens per decode step, 0 for the rest at once", low=0)

    def text(self, corpora: Any) -> str:
        """The text to score; ``corpora(name)`` gives a declared corpus class."""
        if self.file is not None:
            from sparsebench.corpora.files import read_text

            return read_text("task.file", self.file)
        hub = {k: v for k, v in (("dataset", self.dataset), ("subset", self.subset), ("column", self.column)) if v}
        if hub and self.corpus != "hub":
            raise UserError(f"task.{next(iter(hub))}: goes with task.corpus=hub, not {self.corpus}")
        if self.corpus == "file":
            raise UserError("task.corpus=file: name the text with task.file=<path>")
        return str(corpora(self.corpus)(**hub).text(self.split))

    def prepare(self, model: LoadedModel, corpora: Any) -> dict[str, Any]:
        """Cuts the windows: (windows, context) int64. UserError when options and model do not fit."""
        context = self.context or model.context
        if context > model.context:
            raise UserError(f"task.context={context}: {model.name} has a context of {model.context} tokens")
        if self.protocol == "windows" and (self.prefill is not None or self.step):
            wrong = f"prefill={self.prefill}" if self.prefill is not None else f"step={self.step}"
            raise UserError(f"task.{wrong}: goes with task.protocol=continuation, not windows")
        prefill = (self.prefill or context // 2) if self.protocol == "continuation" else 0
        if prefill >= context:
            raise UserError(f"task.prefill={prefill}: must be below the window of {context} tokens")
        text = self.text(corpora)
        ids = torch.tensor(model.tokenizer(text, verbose=False)["input_ids"])
        count = len(ids) // context
        if count == 0:
            source = f"task.file={self.file}" if self.file else f"task.corpus={self.corpus}"
            raise UserError(f"{source}: has {len(ids)} tokens, fewer than one window of {context} (task.context=)")
        windows = ids[: count * context].view(count, context)[: self.windows]
        return {"windows": windows, "prefill": prefill, "bytes_per_token": len(text.encode()) / len(ids)}

    def prompts(self, prepared: dict[str, Any]) -> list[int]:
        """Lengths of the prompts, in tokens."""
        return [prepared["prefill"] or prepared["windows"].shape[1] - 1]

    @property
    def streams(self) -> bool:
        """Whether a model can be evaluated whose blocks are in memory one at a time."""
        return self.protocol == "windows"

    def _scored(self, model: LoadedModel, prepared: dict[str, Any], rows: int) -> Iterator[Tensor]:
        """The losses of the tokens of each window: (rows, scored)."""
        windows = prepared["windows"]
        if self.streams:
            for logits, chunk in zip(model.logits(windows[:, :-1], rows), windows.split(rows), strict=True):
                yield score_logits(logits, chunk[:, 1:].to(logits.device))[0]
        else:
            for chunk in windows.split(rows):
                yield score_tokens(model, chunk, prefill=prepared["prefill"], step=self.step)[0]

    def evaluate(self, model: LoadedModel, how: Evaluation, prepared: dict[str, Any]) -> Outcome:
        losses: list[float] = []
        rows = max(1, how.batch_size * 512 // prepared["windows"].shape[1])
        for nll in self._scored(model, prepared, rows):
            losses += nll.double().mean(dim=1).tolist()
            how.progress(len(losses), len(prepared["windows"]))
        nll_score = Score.mean(losses)
        value = exp(nll_score.value) if nll_score.value < _MAX_LOSS else inf
        error = None if nll_score.stderr is None else value * nll_score.stderr
        bits = 1 / log(2) / prepared["bytes_per_token"]
        per_byte = None if nll_score.stderr is None else nll_score.stderr * bits
        scores = {
            "perplexity": Score(value, error, nll_score.n),
            "nll": nll_score,
            "bits_per_byte": Score(nll_score.value * bits, per_byte, nll_score.n),
        }
        samples = [{"sample": f"window/{index}", "nll": loss} for index, loss in enumerate(losses)]
        return Outcome(scores, samples, {"context": prepared["windows"].shape[1]})
