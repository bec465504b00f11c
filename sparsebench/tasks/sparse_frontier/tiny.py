"""The tasks in tinyworld's language, for models that know no other: the counterpart of each where there is one.

The counterparts keep what a task asks of attention, not its words. Answers are scored by likelihood with the gold
answers before them in the context, as in ``task=tinyworld``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsebench.corpora import tinyworld
from sparsebench.errors import UserError
from sparsebench.tasks.tinyworld import Encoded, encode

if TYPE_CHECKING:  # imports torch
    from sparsebench.models.base import LoadedModel


@dataclass(frozen=True)
class Sizes:
    """What the documents may vary: their tokens, questions of one, copy steps, words of the list."""

    length: int
    queries: int
    hops: int
    items: int


_Counterpart = tuple[str, Callable[[Sizes], tinyworld.Options]]  # a tinyworld task and its options
COUNTERPARTS: dict[str, _Counterpart] = {
    # one fact is asked, among other facts of the same form in running text
    "qa_squad": ("retrieval_multi_key", lambda sizes: tinyworld.Options()),
    # the haystack is needles, as many as fit and as there are names for; several are asked
    "niah": (
        "retrieval_multi_query",
        lambda sizes: tinyworld.Options(
            queries=sizes.queries, keys=max(1, (sizes.length - 6 * sizes.queries) // 5 - 1)
        ),
    ),
    # the value of a chain's last name, not all names of a value
    "vt": ("variable_tracking", lambda sizes: tinyworld.Options(hops=sizes.hops)),
    # the one most frequent word, not ten
    "cwe": ("common_words", lambda sizes: tinyworld.Options(items=sizes.items)),
    # as many facts as questions, lying far apart in running text
    "story_retrieval": ("retrieval_multi_query", lambda sizes: tinyworld.Options(queries=sizes.queries)),
    # from the place to the person to the object, not from one purchase to the one before
    "story_multihop": ("two_hop", lambda sizes: tinyworld.Options()),
}
NONE = {
    "story_filtering": "nothing in that language is told by leaving it out",
    "qa_quality": "that language has no multiple choice",
    "qa_toefl": "that language has no multiple choice",
}


def documents(model: LoadedModel, name: str, seeds: range, sizes: Sizes) -> list[Encoded]:
    """The counterpart's documents for these seeds. UserError when the task has none, or they do not fit."""
    if name not in COUNTERPARTS:
        raise UserError(f"task.form=tinyworld: {name} has no such form ({NONE[name]}); give task.form=natural")
    task, options = COUNTERPARTS[name]
    _check(name, sizes)
    length, found = sizes.length, []
    for seed in seeds:
        try:
            document = tinyworld.document(task, length, seed, options(sizes))
        except ValueError as error:
            raise UserError(f"task.length={length}: {error}") from None
        ids, spans = encode(model, document)
        if len(ids) > model.context:
            raise UserError(f"task.length={length}: {len(ids)} tokens; {model.name} has a context of {model.context}")
        answers = [(spans[start][0], spans[end - 1][1]) for start, end in document.answers]
        found.append(Encoded(f"{name}/{seed}", ids, spans[document.question - 1][1], answers))
    return found


def _check(name: str, sizes: Sizes) -> None:
    """UserError when that language has not enough names, which no length would mend."""
    places, people = len(tinyworld.PLACES), len(tinyworld.PEOPLE)
    if name in ("niah", "story_retrieval") and sizes.queries > places:
        raise UserError(f"task.num_queries={sizes.queries}: at most {places} with task.form=tinyworld, one a place")
    if name == "vt" and sizes.hops >= people:
        raise UserError(f"task.num_hops={sizes.hops}: at most {people - 1} with task.form=tinyworld, one a name")
