"""The life of a KV cache over one context and several questions (SCBench, Li et al. 2024).

The four stages, and where a method acts in them: the context is read (*generation*: sparse prefill attention), what it
left is stored (*compression*: eviction, merging, pruning), the stored cache is found again for each question
(*retrieval*: here always the exact prefix, a copy of it), and its entries are read for each new token (*loading*).

Two modes. ``multi_turn``: context and question 1 are read together, so that a method that compresses sees that
question; each later question follows the answer before it. What the model writes goes to a copy of the cache and is
forgotten; with the golden context the right answer takes its place. ``multi_request`` (the paper's SCDQ): the context
is read alone, with no question in sight, and each question is asked on its own copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sparsebench.models.base import LoadedModel
from sparsebench.models.plug import PositionLayer
from sparsebench.tasks.decoding import Stream, end_tokens


@dataclass(frozen=True)
class Turn:
    """One question. ``kind``: whose metric it has; ``question``: ids that ask it; ``gold``: ids that stand for the
    right answer in the context of later turns; ``max_new``: ids to generate; ``score``: of those ids, 0 to 1."""

    kind: str
    question: list[int]
    gold: list[int]
    max_new: int
    score: Callable[[list[int]], float]


@dataclass(frozen=True)
class Session:
    """One context (ids, with the beginning of text) and its turns."""

    name: str
    context: list[int]
    turns: list[Turn]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sessions of one shape can share a batch."""
        lengths = ((len(turn.question), len(turn.gold), turn.max_new) for turn in self.turns)
        return (len(self.context), *(length for one in lengths for length in one))


@dataclass(frozen=True)
class Life:
    """How sessions are led. ``mode``: ``multi_turn`` or ``multi_request``; ``golden``: right answers stand in the
    context, not the model's own; ``again``: question 1 is put a second time, so that its answer is read from what the
    cache kept, not computed while the context was read (for answers of one token)."""

    mode: str
    golden: bool = True
    again: bool = False


@dataclass
class Lived:
    """``scores``: (session, turn); ``read``: tokens fed for each context and its questions; ``reused``: tokens that
    each question would have had to read again without the cache; ``kept_first``, ``kept_last``: entries stored / tokens
    seen after the first prompt and at the end."""

    scores: list[list[float]]
    read: int
    reused: int
    kept_first: float
    kept_last: float


def live(loaded: LoadedModel, sessions: Sequence[Session], life: Life) -> Lived:
    """Leads sessions of one shape (one at a time where the model's own answers stay in the context)."""
    return (_turns if life.mode == "multi_turn" else _requests)(loaded, sessions, life)


def _requests(loaded: LoadedModel, sessions: Sequence[Session], life: Life) -> Lived:
    stream = Stream(loaded).feed([one.context for one in sessions])
    first = kept(stream.cache)
    read, scores = len(sessions[0].context), []
    for place in range(len(sessions[0].turns)):
        turns = [one.turns[place] for one in sessions]
        copy = stream.copy().feed([turn.question for turn in turns])
        scores.append(_scored(turns, copy.write(turns[0].max_new)))
        read += len(turns[0].question)
    reused = len(sessions[0].context) * (len(scores) - 1)
    return Lived(_by_session(scores), read, reused, first, kept(stream.cache))


def _turns(loaded: LoadedModel, sessions: Sequence[Session], life: Life) -> Lived:
    if not life.golden and len(sessions) > 1:
        raise ValueError("answers of the model's own differ in length: one session at a time")
    stream = Stream(loaded)
    before: list[list[int]] = [one.context for one in sessions]  # what goes in front of the next question
    read, reused, first, scores = 0, 0, 1.0, []
    for place in range(len(sessions[0].turns)):
        turns = [one.turns[place] for one in sessions]
        prompts = [ids + turn.question for ids, turn in zip(before, turns, strict=True)]
        reused += read
        read += len(prompts[0])
        stream.feed(prompts)
        if place == 0:
            first = kept(stream.cache)
        copy = stream.copy()
        if place == 0 and life.again:
            copy.feed([turn.question for turn in turns])
        written = copy.write(turns[0].max_new)
        scores.append(_scored(turns, written))
        before = [turn.gold for turn in turns]
        if not life.golden:
            stream = copy
            before = [_unread(loaded, written[0], turns[0].max_new)]
            read += len(written[0])
    return Lived(_by_session(scores), read, reused, first, kept(stream.cache))


def _unread(loaded: LoadedModel, written: list[int], max_new: int) -> list[int]:
    """What of the model's own answer its cache does not hold yet: the last token of one that was cut, and an end."""
    return written[max_new - 1 :] + sorted(end_tokens(loaded))[:1]


def _scored(turns: Sequence[Turn], written: list[list[int]]) -> list[float]:
    return [turn.score(ids) for turn, ids in zip(turns, written, strict=True)]


def _by_session(scores: list[list[float]]) -> list[list[float]]:
    return [list(row) for row in zip(*scores, strict=True)]


def kept(cache: Any) -> float:
    """Entries stored / tokens seen, over layers, heads and rows; 1 for a cache that drops nothing."""
    layers = [one for one in getattr(cache, "layers", ()) if isinstance(one, PositionLayer) and one.seen]
    return fmean(float(one.lengths.float().mean()) / one.seen for one in layers) if layers else 1.0
