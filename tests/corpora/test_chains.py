"""Chains of thought: every document is right by its own words, and the windows are whole documents in a row."""

from __future__ import annotations

from random import Random

import pytest
import torch

from sparsebench.corpora import chains
from sparsebench.errors import UserError
from sparsebench.models import reasoner
from sparsebench.models.embedded import Ladder


def drawn(kind: str) -> list[chains.Chain]:
    return [chains.draw(kind, Random(f"test/{k}")) for k in range(200)]


@pytest.mark.parametrize("kind", chains.KINDS)
def test_every_kind_keeps_to_the_language(kind: str) -> None:
    words = set(chains.vocabulary())
    assert len(words) == len(chains.vocabulary())
    for one in drawn(kind):
        assert set(one.words) <= words and len(one.words) <= chains.LONGEST
        assert one.question[-1] == chains.THINK and one.words[-1] == chains.END
        assert chains.STEPS[kind][0] <= one.steps <= chains.STEPS[kind][1]


def test_sums_add_up() -> None:
    for one in drawn("arithmetic"):
        numbers = [int(word[1]) for word in one.question[1:-1]]
        written = [int(one.thought[at + 1]) for at, word in enumerate(one.thought) if word == "="]
        assert written == [sum(numbers[:k]) for k in range(2, one.steps + 1)] and one.answer == (str(sum(numbers)),)


def test_rules_are_followed_to_their_end() -> None:
    verdicts = set()
    for one in drawn("rules"):
        *rules, fact, asked, _ = one.question
        known = dict(rule.split(">") for rule in rules)
        walked = [fact.removesuffix("!")]
        while walked[-1] in known:
            walked.append(known[walked[-1]])
        goal = asked.removesuffix("?")
        verdict = {goal: "true", f"not-{goal}": "false"}.get(walked[-1], "uncertain")
        seen = "missing" if verdict == "uncertain" else "found"
        assert one.answer == (verdict,) and one.thought == (*walked, seen, ".") and len(walked) == one.steps + 1
        verdicts.add(verdict)
    assert verdicts == {"true", "false", "uncertain"}


def test_the_free_spell_is_the_one_that_nobody_saw() -> None:
    for one in drawn("temporal"):
        woke, *seen, closed = one.question[:6]
        options = dict(word.split(":") for word in one.question[6:-1])
        spells = [tuple(map(int, spell.split("-"))) for spell in seen]
        day = set(range(int(woke.partition("-")[2]), int(closed.partition("-")[2])))
        idle = day - {hour for begin, end in spells for hour in range(begin, end)}
        free = [letter for letter, hour in options.items() if int(hour) in idle]
        assert free == [one.answer[1]] and len(options) == 4 and int(options[free[0]]) == min(idle)


def test_facts_need_both_names() -> None:
    everyone = chains.people()
    assert len({one[:2] for one in everyone}) == chains.FACTS == 144
    for at in (0, 1):
        towns = {name: {one[2] for one in everyone if one[at] == name} for name in {one[at] for one in everyone}}
        assert all(len(found) > 2 for found in towns.values())
    assert len({(town, river) for *_, town, river in everyone}) == len({town for *_, town, _ in everyone})


def test_rows_and_windows() -> None:
    words, written = chains.row(Random(0), 60)
    first = words.index(chains.END)
    assert len(words) == len(written) == 60 and written[: first + 1].count(True) == first - words.index(chains.THINK)
    tokenizer = reasoner.tokenizer()
    windows = chains.Chains(nsamples=3, seqlen=40).windows(tokenizer, 128, seed=0)
    assert windows.shape == (3, 40) and windows.dtype == torch.int64
    assert not torch.equal(windows, chains.Chains(nsamples=3, seqlen=40).windows(tokenizer, 128, seed=1))
    text = chains.Chains(count=4).documents("test")
    assert [tokenizer.decode(tokenizer(one)["input_ids"]) for one in text] == text
    with pytest.raises(UserError, match="only for model=tiny_reasoner"):
        chains.Chains().windows(Ladder(rung="tiny_100k").load().tokenizer, 1024, seed=0)
    with pytest.raises(UserError, match=r"calibration\.seqlen=32"):
        chains.Chains().windows(tokenizer, 16, seed=0)
