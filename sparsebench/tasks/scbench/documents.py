"""SCBench's tasks about code and prose, in Python and English: functions by what they do, summaries, and two mixes.

The data set takes them from real repositories and papers; these stand in, with texts of which the right answer is
known. A function is drawn from slots (what it skips, what it makes of the rest, what it returns), so that a sentence
says exactly which one is meant without its name. A report has three sentences that matter among many that do not: those
are its summary.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from sparsebench.tasks.scbench.generators import Asked, Draft, kv

_SKIPPED = {
    "value % {a} == {b}": "whose remainder by {a} is {b}",
    "value > {c}": "above {c}",
    "value < {b}": "below {b}",
    "abs(value - {c}) <= {b}": "at most {b} away from {c}",
    "str(value).endswith('{b}')": "that end in the digit {b}",
    "value in seen": "that came before",
}
_MADE = {
    "value * {d} + {e}": "multiplies the others by {d} and adds {e}",
    "(value - {e}) ** 2": "squares what the others are beyond {e}",
    "min(value, {d} * {e})": "limits the others to {d} times {e}",
    "value // {d} - {e}": "divides the others by {d} and takes away {e}",
    "max({e}, value - {d})": "lowers the others by {d}, but not under {e}",
}
_RETURNED = {
    "sum(found)": "returns the sum",
    "sorted(found)[:{f}]": "returns the {f} smallest",
    "sorted(found)[-{f}:]": "returns the {f} largest",
    "found[::{f}]": "returns one in {f}",
    "len(set(found))": "counts how many are different",
    "max(found, default={f})": "returns the largest, or {f} if there is none",
}
_VERBS = "collect gather reduce scan fold sift measure rank trim weigh pick settle".split()
_NOUNS = "orders prices steps marks signals readings parcels rows shares tolls ages scores".split()
_BODY = """def {name}(values):
    found, seen = [], set()
    for value in values:
        if {skipped}:
            continue
        seen.add(value)
        found.append({made})
    return {returned}"""


def _functions(rng: Random, n: int) -> list[tuple[str, str]]:
    """``n`` functions, no two of which do the same or have one name: (source, what it does)."""
    found: dict[str, tuple[str, str]] = {}
    while len(found) < n:
        skipped, made, returned = (rng.choice(list(slot)) for slot in (_SKIPPED, _MADE, _RETURNED))
        drawn = {"a": rng.randint(3, 9), "c": rng.randint(20, 99), "d": rng.randint(2, 9), "e": rng.randint(2, 99)}
        drawn |= {"b": rng.randrange(drawn["a"]), "f": rng.randint(2, 9)}
        says = f"leaves out values {_SKIPPED[skipped]}, {_MADE[made]} and {_RETURNED[returned]}".format(**drawn)
        parts = {"skipped": skipped, "made": made, "returned": returned}
        body = {key: text.format(**drawn) for key, text in parts.items()}
        name = f"{rng.choice(_VERBS)}_{rng.choice(_NOUNS)}_{len(found)}"
        found.setdefault(says, (_BODY.format(name=name, **body), says))
    return list(found.values())


def _asked_functions(rng: Random, functions: list[tuple[str, str]], turns: int) -> list[Asked]:
    every = [source for source, _ in functions]
    chosen = rng.sample(functions, turns)
    return [
        Asked("repoqa", f"The function that {says} is", [source, *(one for one in every if one != source)], source)
        for source, says in chosen
    ]


_CODE = "Read this code and write down functions of it, exactly as they stand there."


def repoqa(rng: Random, n: int, turns: int) -> Draft:
    """``n`` functions; each turn says what one does, and asks for its source. Labels: that source, then all others."""
    functions = _functions(rng, n)
    return Draft(_CODE, "\n\n".join(source for source, _ in functions), _asked_functions(rng, functions, turns))


def repoqa_and_kv(rng: Random, n: int, turns: int) -> Draft:
    """``n`` functions with a pair of UUIDs after each; the turns ask for a function and a value in turn."""
    functions, pairs = _functions(rng, n), kv(rng, n, turns)
    lines = pairs.context.strip("{}").split(", ")
    context = "\n\n".join(f"{source}\n\n{{{line}}}" for (source, _), line in zip(functions, lines, strict=True))
    values = [replace(one, max_new=80) for one in pairs.asked]
    instruction = f"{_CODE} Between the functions stand JSON objects: give values of their keys."
    return Draft(instruction, context, _in_turn(_asked_functions(rng, functions, turns), values, turns))


_NAMES = "Anna Boaz Clara David Edith Felix Greta Hugo Irene Jonas Karla Louis".split()
_TOWNS = "Arlen Brook Corran Dunmore Elsby Farrow Gilden Harwick Inver Jarrow Kelby Lorne".split()
_WORKS = "a mill, a bridge, a school, a harbour, a market hall, a library, a well, a tower".split(", ")
_ENDS = "burned down, was sold, was moved, was doubled, stood empty, was given to the town".split(", ")
_TALK = (
    "{name} of {town} said that the summer had been long.",
    "Nobody in {town} remembered who had painted the door.",
    "{name} walked home by the river and spoke of other things.",
    "The letters that {name} wrote that week were about horses.",
    "It rained in {town}, as it often does in that part of the year.",
)


def _report(rng: Random, number: int, sentences: int) -> tuple[str, str]:
    """A report of three facts and so many sentences beside: (text, summary)."""
    name, town, year = rng.choice(_NAMES), rng.choice(_TOWNS), rng.randint(1700, 1890)
    facts = [
        f"In {year} {name} built {rng.choice(_WORKS)} in {town} for {rng.randint(200, 9999)} crowns.",
        f"In {year + rng.randint(1, 9)} it {rng.choice(_ENDS)}.",
        f"In {year + rng.randint(10, 60)} {rng.randint(20, 900)} people of {town} asked to have it back.",
    ]
    lines = [rng.choice(_TALK).format(name=rng.choice(_NAMES), town=rng.choice(_TOWNS)) for _ in range(sentences)]
    for depth, fact in zip(sorted(rng.randrange(sentences + 1) for _ in facts)[::-1], facts[::-1], strict=True):
        lines.insert(depth, fact)
    return f"Report {number}. " + " ".join(lines), " ".join(facts)


_PROSE = "Read these reports. Some sentences say what happened in which year, others are talk."


def summary(rng: Random, n: int, turns: int) -> Draft:
    """A report for each turn, with ``n`` sentences of talk in all; turn i asks for the summary of report i."""
    sizes = [n // turns + (place < n % turns) for place in range(turns)]
    reports = [_report(rng, number, size) for number, size in enumerate(sizes, 1)]
    asked = [
        Asked("summary", f"Summary of report {number}, what happened in which year:", [short], short)
        for number, (_, short) in enumerate(reports, 1)
    ]
    return Draft(_PROSE, "\n\n".join(text for text, _ in reports), asked)


def summary_with_needles(rng: Random, n: int, turns: int) -> Draft:
    """Reports as for ``summary`` with pass keys hidden in them; the turns ask for a summary and a pass key in turn."""
    reports = summary(rng, n, turns)
    texts = reports.context.split("\n\n")
    needles = []
    for name in rng.sample(_NAMES, turns):
        key = str(rng.randint(10_000, 99_999))
        sentences = texts[place := rng.randrange(len(texts))].split(". ")
        sentences.insert(rng.randint(1, len(sentences) - 1), f"The pass key of {name} is {key}")
        texts[place] = ". ".join(sentences)
        needles.append(Asked("needle", f"The pass key of {name} is", [key], key))
    asked = _in_turn([replace(one, max_new=800) for one in reports.asked], needles, turns)
    return Draft(f"{_PROSE} They also hold pass keys.", "\n\n".join(texts), asked)


def _in_turn(first: list[Asked], second: list[Asked], turns: int) -> list[Asked]:
    """Questions of two kinds, alternating."""
    return [(first, second)[place % 2][place // 2] for place in range(turns)]
