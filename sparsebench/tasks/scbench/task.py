"""The declared task: SCBench's synthetic tasks over a shared context, turn by turn.

``score`` is the mean over sessions of the mean over their turns, ``score/turn1`` ... each turn's own, ``score/later``
that of all turns but the first: a method that drops what question 1 does not need does well on turn 1 and badly after.
Mixed tasks also have a score by kind. Notes: ``kv_kept_first`` and ``kv_kept_last`` (entries stored / tokens seen after
the first prompt and at the end), ``tokens_read`` and ``tokens_reused`` of a session (what sharing the context saved).

Forms: ``recall`` for model=pair_recall, ``tinyworld`` for the ladder (kv, vt), ``natural`` for real models
(all), where ``file`` takes sessions of the data set's own form instead (also qa and choice, not repoqa and the mixes,
whose candidates and kinds such a file does not name). Deviations from the paper: contexts have exactly the asked
length, so nothing is cut out of their middle unless ``file`` brings longer ones; prompts have no chat template, as
follow-ups must continue them; code and prose are made up (``documents``), so they measure what a cache keeps, not how
well a model codes or writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import fmean
from typing import Any

from sparsebench.declare import Declared, option, task
from sparsebench.errors import UserError
from sparsebench.models.base import LoadedModel
from sparsebench.tasks.base import Evaluation, Outcome, Score
from sparsebench.tasks.page import Page
from sparsebench.tasks.scbench import records, tiny
from sparsebench.tasks.scbench.generators import Draft
from sparsebench.tasks.scbench.session import Life, Lived, Session, live
from sparsebench.tasks.scbench.synthetic import GENERATORS, MIXED


@task(name="scbench", version=1, metric="score", better="higher", gives=("prefill", "decode"))
@dataclass(frozen=True)
class SCBench(Declared):
    """Several questions over one shared context, whose KV cache is built once and reused."""

    name: str = option(
        "kv",
        "which task; qa and choice need a file",
        choices=("kv", "prefix_suffix", "vt", "mf", "many_shot", "repoqa", "summary", "summary_with_needles",
                 "repoqa_and_kv", "mix", "qa", "choice"),
    )  # fmt: skip
    form: str = option("tinyworld", "the language of the sessions", choices=("natural", "tinyworld", "recall"))
    mode: str = option(
        "multi_turn",
        "context and question 1 read together, or each question on a copy of the context's cache",
        choices=("multi_turn", "multi_request"),
    )
    golden_context: bool = option(
        True, "multi_turn: right answers stand in the context of later turns, not the model's"
    )
    ask_again: bool = option(
        True,
        "one-token answers: put question 1 again, so that the kept cache answers it, not the prefill",
        only="mode=multi_turn",
    )
    turns: int = option(5, "questions of a session", low=1, high=8)
    samples: int = option(64, "sessions", low=1, high=100_000)
    seed: int = option(0, "first session; never the run's seed", low=0, high=100_000_000)
    length: int = option(512, "tokens of the context", low=64, high=1_048_576, only="form=natural|tinyworld")
    items: int = option(48, "facts of the context, each one token", low=1, high=1024, only="form=recall")
    copies: int = option(1, "how often each fact stands in the context", low=1, high=64, only="form=recall")
    copies_lie: str = option(
        "adjacent", "where the copies of a fact stand", choices=("adjacent", "scattered"), only="form=recall"
    )
    file: str | None = option(None, "sessions in the data set's form, a JSONL file", unit="file", only="form=natural")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.golden_context and self.mode != "multi_turn":
            raise UserError(f"task.golden_context=false: goes with task.mode=multi_turn, not {self.mode}")

    def prepare(self, model: LoadedModel, corpora: Any) -> list[Session]:
        """The sessions. UserError when they do not fit the model, or task, form and file do not go together."""
        if self.file is not None and (self.form != "natural" or self.name in (*MIXED, "repoqa")):
            generated = ", ".join((*MIXED, "repoqa"))
            raise UserError(
                f"task.file={self.file}: goes with task.form=natural and a task.name other than {generated}"
            )
        seeds = range(self.seed, self.seed + self.samples)
        if self.form == "recall":
            if self.name != "kv":
                raise UserError(f"task.name={self.name}: task.form=recall has only kv")
            scattered = self.copies_lie == "scattered"
            return tiny.recall_sessions(model, seeds, self.turns, self.items, self.copies, scattered)
        if self.form == "tinyworld":
            return tiny.tinyworld_sessions(model, self.name, seeds, self.turns, self.length)
        if self.length >= model.context:
            raise UserError(f"task.length={self.length}: {model.name} has a context of {model.context} tokens")
        found = list(self._from_file(model) if self.file is not None else self._generated(model, seeds))
        most = max(map(records.tokens_needed, found))
        if most > model.context:
            raise UserError(
                f"task.length={self.length}: sessions come to {most} tokens with their questions and answers; "
                f"{model.name} has a context of {model.context}"
            )
        return found

    def prompts(self, prepared: list[Session]) -> list[int]:
        """Lengths of what is read before a method compresses, in tokens."""
        asked = self.mode == "multi_turn"
        return sorted({len(one.context) + (len(one.turns[0].question) if asked else 0) for one in prepared})

    def _from_file(self, model: LoadedModel) -> Iterator[Session]:
        page = Page(model.tokenizer, self.length, chat=False)
        drafts = records.read(self.name, str(self.file), self.turns, self.samples)
        for index, draft in enumerate(drafts):
            ids = records.middle_cut(page.ids(draft.context), self.length)
            yield records.session(model, f"{self.name}/{index}", ids, draft.asked)

    def _generated(self, model: LoadedModel, seeds: range) -> Iterator[Session]:
        if self.name not in GENERATORS:
            raise UserError(f"task.name={self.name}: is not generated; give its data with task.file=")
        generate, least = GENERATORS[self.name]
        page = Page(model.tokenizer, self.length, chat=False)

        def draft(seed: int, n: int) -> Draft:
            return generate(Random(f"scbench/{self.name}/{seed}"), n, self.turns)

        for seed in seeds:
            build = partial(draft, seed)
            chosen = build(page.most(build, least(self.turns)))
            yield records.session(model, f"{self.name}/{seed}", page.exact(chosen)[1], chosen.asked)

    def evaluate(self, model: LoadedModel, how: Evaluation, prepared: list[Session]) -> Outcome:
        one_token = all(turn.max_new == 1 for one in prepared for turn in one.turns)
        life = Life(self.mode, self.golden_context, again=self.ask_again and one_token)
        alone = self.mode == "multi_turn" and not self.golden_context
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, one in enumerate(prepared):
            groups.setdefault((index,) if alone else one.shape, []).append(index)
        lived: dict[int, list[float]] = {}
        lives: list[tuple[Lived, int]] = []
        for group in groups.values():
            rows = max(1, how.batch_size * 512 // len(prepared[group[0]].context))
            for start in range(0, len(group), rows):
                batch = group[start : start + rows]
                found = live(model, [prepared[index] for index in batch], life)
                lived |= dict(zip(batch, found.scores, strict=True))
                lives.append((found, len(batch)))
                how.progress(len(lived), len(prepared))
        return _outcome(prepared, [lived[index] for index in range(len(prepared))], lives)


def _outcome(sessions: list[Session], lived: list[list[float]], lives: list[tuple[Lived, int]]) -> Outcome:
    """Scores over sessions, one row a turn, and what was kept and reused, by session."""
    scores = {"score": Score.mean([fmean(row) for row in lived])}
    for place in range(max(map(len, lived))):
        scores[f"score/turn{place + 1}"] = Score.mean([row[place] for row in lived if len(row) > place])
    later = [fmean(row[1:]) for row in lived if len(row) > 1]
    if later:
        scores["score/later"] = Score.mean(later)
    samples: list[dict[str, Any]] = []
    kinds: dict[str, list[float]] = {}
    for one, row in zip(sessions, lived, strict=True):
        for index, (turn, score) in enumerate(zip(one.turns, row, strict=True), 1):
            samples.append({"sample": f"{one.name}/{index}", "turn": index, "kind": turn.kind, "score": score})
            kinds.setdefault(turn.kind, []).append(score)
    if len(kinds) > 1:
        scores |= {f"score/{kind}": Score.mean(values) for kind, values in kinds.items()}
    total = sum(rows for _, rows in lives)

    def mean(name: str) -> float:
        return float(sum(getattr(one, name) * rows for one, rows in lives) / total)

    notes: dict[str, Any] = {"length": max(len(one.context) for one in sessions)}
    notes |= {"kv_kept_first": mean("kept_first"), "kv_kept_last": mean("kept_last")}
    notes |= {"tokens_read": mean("read"), "tokens_reused": mean("reused")}
    return Outcome(scores, samples, notes)
