"""Sessions for the tiny models: facts of one token for the recall model, tinyworld's language for the ladder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

from sparsebench.corpora import recall, tinyworld
from sparsebench.errors import UserError
from sparsebench.models.base import LoadedModel
from sparsebench.tasks.scbench.session import Session, Turn
from sparsebench.tasks.tinyworld import encode

TINYWORLD = {"kv": "retrieval_multi_query", "vt": "variable_tracking"}
_HOPS = 1


def is_same(written: list[int], gold: list[int]) -> float:
    """1 if the generated ids begin with the right answer's."""
    return float(written[: len(gold)] == gold)


def recall_sessions(
    model: LoadedModel, seeds: range, turns: int, items: int, copies: int, scattered: bool
) -> list[Session]:
    """Contexts of ``items`` pair tokens, each fact ``copies`` times; every turn asks for another key. UserError when
    they do not fit the model, or it does not speak that language."""
    if model.tokenizer.get_vocab().get("k00=v00") != 0:
        raise UserError(f"task.form=recall: {model.name} does not speak the pair language; give model=pair_recall")
    longest = items + 2 * turns + 1
    if longest > model.context:
        raise UserError(f"task.items={items}: {longest} tokens; {model.name} has a context of {model.context}")
    if -(-items // copies) < turns:
        raise UserError(f"task.turns={turns}: there are only {-(-items // copies)} facts (task.items, task.copies)")
    found = []
    for seed in seeds:
        rng = Random(f"scbench/recall/{seed}")
        try:
            context = recall.draw(rng, items, copies, scattered)
        except ValueError as error:
            raise UserError(f"task.items={items}: {error}") from None
        asked = []
        for key, value in rng.sample(context.facts, turns):
            gold = [recall.ANSWER + value]
            asked.append(Turn("kv", [recall.QUERY + key], gold, 1, partial(is_same, gold=gold)))
        found.append(Session(f"kv/{seed}", context.ids, asked))
    return found


def tinyworld_sessions(model: LoadedModel, name: str, seeds: range, turns: int, length: int) -> list[Session]:
    """The counterparts in tinyworld: facts about places for ``kv``, chains of names for ``vt``. UserError for the
    others, and when the documents do not fit."""
    if name not in TINYWORLD:
        raise UserError(f"task.form=tinyworld: {name} has no such form, only {' and '.join(TINYWORLD)} have")
    keys = min(len(tinyworld.PLACES), max(turns, length // 16))
    options = tinyworld.Options(queries=turns, keys=keys, hops=_HOPS)
    make: Callable[[int], Session] = partial(_session, model, name, length, options)
    return [make(seed) for seed in seeds]


def _session(model: LoadedModel, name: str, length: int, options: tinyworld.Options, seed: int) -> Session:
    try:
        document = tinyworld.document(TINYWORLD[name], length, seed, options)
    except ValueError as error:
        raise UserError(f"task.length={length}: {error}") from None
    ids, spans = encode(model, document)
    if len(ids) > model.context:
        raise UserError(f"task.length={length}: {len(ids)} tokens; {model.name} has a context of {model.context}")
    turns = []
    begin = context = spans[document.question - 1][1]
    for start, end in document.answers:
        first, last = spans[start][0], spans[end - 1][1]
        gold = ids[first:last]
        after = spans[end][1]  # every answer is followed by a full stop
        score = partial(is_same, gold=gold)
        turns.append(Turn(name, ids[begin:first], ids[first:after], len(gold), score))
        begin = after
    return Session(f"{name}/{seed}", ids[:context], turns)
