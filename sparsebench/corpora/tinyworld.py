"""tinyworld: a procedural English-like language whose documents hold questions with known answers.

A document is a stretch of small sentences about people, places and objects, with facts hidden in
it and one or more questions at its end. Every word is one token of the ladder's tokenizer, so a
document has exactly the length that was asked for, counting the leading ``<|end|>``. A document
depends on (task, length, seed) and the options only: the random numbers come from Python's
``random.Random`` seeded with a string, which is the same on every platform.

Tasks: ``retrieval_single`` (one needle), ``retrieval_multi_key`` (one of many needles is asked),
``retrieval_multi_query`` (several are asked), ``variable_tracking`` (h copy steps from a variable
to its value), ``common_words`` (the most frequent word of a list), ``two_hop`` (place -> person ->
object), ``copy`` (a word list, after a pause), ``arithmetic`` (sums of two-digit numbers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from sparsebench.corpora.base import Corpus
from sparsebench.declare import corpus, option
from sparsebench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

MIN_LENGTH, MAX_LENGTH = 64, 8192
TRAIN_SEEDS = range(10**9, 2**40)  # evaluation uses seeds below 10**9, so the two never meet
BEGIN = "<|end|>"

PEOPLE = (
    "David Moses Saul Jacob Aaron Joseph Samuel Isaac Mary Paul Peter John James Adam Ruth Esther "
    "Sarah Noah Daniel Job Joshua Eli Amos Joel Simon Mark Luke Anna Leah Esau Boaz Silas"
).split()
PLACES = (
    "Egypt Babylon Zion Jordan Bethel Gilead Hebron Tyre Sidon Moab Edom Gath Gaza Jericho Shiloh "
    "Samaria Damascus Lebanon Sinai Carmel Sheba Haran Goshen Bashan Rome Corinth Athens Crete "
    "Cana Elam Persia Ammon"
).split()
OBJECTS = (
    "lamp sword ring bread bow cup crown robe staff net spear harp horn seal stone rope jar key "
    "coat shoe belt shield tent cart boat axe knife book coin corn wool salt"
).split()
ROLES = "king priest child servant judge farmer guard baker".split()
ADJECTIVES = "old young wise poor rich great good small".split()
SCENES = "river market field house road city hill sea gate well garden valley".split()
ACTS = "sang slept walked spoke ate stood wept rested".split()
DEEDS = "saw found lost made sold bought took left".split()
PREPOSITIONS = "near by from to".split()
TIMES = "today early alone then again now".split()
GLUE = "the In Let Ask Copy Again List Most Sum kept Selah".split()
DIGITS = [str(digit) for digit in range(10)]
PUNCTUATION = [".", ":", " =", " +"]


def vocabulary() -> list[str]:
    """Every token string that a document can contain, each one token of the ladder's tokenizer."""
    words = [PEOPLE, PLACES, OBJECTS, ROLES, ADJECTIVES, SCENES, ACTS, DEEDS, PREPOSITIONS, TIMES]
    spaced = [" " + word for group in words for word in group] + [" " + word for word in GLUE]
    return [BEGIN, *spaced, *(" " + d for d in DIGITS), *DIGITS, *PUNCTUATION]


@dataclass(frozen=True)
class Document:
    """One document: its token strings, where its questions begin, and its answers.

    ``tokens[0]`` is ``<|end|>``; ``text`` is the rest. ``answers`` are half-open token ranges;
    the tokens before a range are the prompt of that answer. ``question`` is the first token of
    the first question: what precedes it is context.
    """

    task: str
    tokens: tuple[str, ...]
    question: int
    answers: tuple[tuple[int, int], ...]

    @property
    def text(self) -> str:
        return "".join(self.tokens[1:])

    def answer_text(self, index: int) -> str:
        start, end = self.answers[index]
        return "".join(self.tokens[start:end])


Sentence = list[str]
Question = tuple[Sentence, Sentence]  # prompt, answer


@dataclass(frozen=True)
class Options:
    """What a task may vary. ``keys=0`` scales the number of needles with the length."""

    queries: int = 1
    keys: int = 0
    hops: int = 2
    items: int = 8


def _words(*words: str) -> Sentence:
    return [" " + word for word in words]


def _end(sentence: Sentence) -> Sentence:
    return [*sentence, "."]


def _number(value: int) -> Sentence:
    digits = list(str(value))
    return [" " + digits[0], *digits[1:]]


def _subject(rng: Random) -> Sentence:
    kind = rng.randrange(4)
    if kind < 2:
        return _words(rng.choice(PEOPLE))
    role = rng.choice(ROLES)
    return _words("the", role) if kind == 2 else _words("the", rng.choice(ADJECTIVES), role)


def _filler_sentence(rng: Random) -> Sentence:
    """3 to 12 tokens, never of the form of a fact."""
    sentence = _subject(rng)
    if rng.randrange(2):
        sentence += _words(rng.choice(ACTS))
    else:
        adjective = [rng.choice(ADJECTIVES)] if rng.randrange(3) == 0 else []
        sentence += _words(rng.choice(DEEDS), "the", *adjective, rng.choice(OBJECTS))
    place = rng.randrange(3)
    if place == 0:
        sentence += _words(rng.choice(PREPOSITIONS), "the", rng.choice(SCENES))
    elif place == 1:
        sentence += _words(rng.choice(PREPOSITIONS), rng.choice(PLACES))
    if rng.randrange(3) == 0:
        sentence += _words(rng.choice(TIMES))
    return _end(sentence)


def _filler(rng: Random, budget: int) -> list[Sentence]:
    """Sentences of exactly ``budget`` tokens together."""
    sentences: list[Sentence] = []
    while budget > 2:
        sentence = _filler_sentence(rng)
        left = budget - len(sentence)
        if left == 0 or left > 2:
            sentences.append(sentence)
            budget = left
    if budget:
        sentences.append(_words("Selah") if budget == 1 else _end(_words("Selah")))
    return sentences


def _needle(place: str, person: str, rng: Random) -> Sentence:
    return _end(_words("In", place, person, rng.choice(ACTS)))


def _number_of_keys(options: Options, length: int) -> int:
    wanted = options.keys or max(4, length // 32)
    return max(options.queries, min(wanted, len(PLACES)))


def _retrieval(rng: Random, options: Options, length: int, keys: int) -> tuple[list[Sentence], list[Question]]:
    places = rng.sample(PLACES, keys)
    people = [rng.choice(PEOPLE) for _ in places]
    facts = [_needle(place, person, rng) for place, person in zip(places, people, strict=True)]
    asked = rng.sample(range(keys), options.queries)
    return facts, [(_words("In", places[i]), _words(people[i])) for i in asked]


def _retrieval_single(rng: Random, options: Options, length: int) -> tuple[list[Sentence], list[Question]]:
    return _retrieval(rng, options, length, keys=options.queries)


def _retrieval_many(rng: Random, options: Options, length: int) -> tuple[list[Sentence], list[Question]]:
    return _retrieval(rng, options, length, keys=_number_of_keys(options, length))


def _variable_tracking(rng: Random, options: Options, length: int) -> tuple[list[Sentence], list[Question]]:
    chains = options.queries + 1
    names = rng.sample(PEOPLE, min(chains * (options.hops + 1), len(PEOPLE)))
    chains = len(names) // (options.hops + 1)
    values = rng.sample(OBJECTS, chains)
    steps: list[list[Sentence]] = []
    questions: list[Question] = []
    for chain, value in enumerate(values):
        variables = names[chain * (options.hops + 1) :][: options.hops + 1]
        sources = [value, *variables[:-1]]
        steps.append([_end([" Let", " " + v, " =", " " + s]) for v, s in zip(variables, sources, strict=True)])
        questions.append(([" Let", " " + variables[-1], " ="], _words(value)))
    facts: list[Sentence] = []
    while any(steps):  # chains interleave at random, each in its own order
        facts.append(rng.choice([chain for chain in steps if chain]).pop(0))
    if options.queries > chains:
        raise ValueError(f"tinyworld: {options.queries} queries of {options.hops} hops need more names than there are")
    return facts, questions[: options.queries]


def _common_words(rng: Random, options: Options, length: int) -> tuple[list[Sentence], list[Question]]:
    words = rng.sample(OBJECTS, options.items)
    size = max(4 * options.items // 2, (length - 8) * 3 // 4 - 3)
    common = max(3, 3 * size // 10)
    if options.items < 2 or -(-(size - common) // (options.items - 1)) >= common:
        raise ValueError(f"tinyworld: common_words with {options.items} items has no most common word (from 4 on)")
    rest = [words[1 + i % (options.items - 1)] for i in range(size - common)]
    shuffled = [words[0]] * common + rest
    rng.shuffle(shuffled)
    return [_end([" List", ":", *_words(*shuffled)])], [([" Most", ":"], _words(words[0]))]


def _two_hop(rng: Random, options: Options, length: int) -> tuple[list[Sentence], list[Question]]:
    keys = max(options.queries, min(_number_of_keys(options, length) // 2, len(PEOPLE)))
    places, people = rng.sample(PLACES, keys), rng.sample(PEOPLE, keys)
    objects = [rng.choice(OBJECTS) for _ in people]
    facts = [_needle(place, person, rng) for place, person in zip(places, people, strict=True)]
    facts += [_end(_words(p, "kept", "the", o)) for p, o in zip(people, objects, strict=True)]
    rng.shuffle(facts)
    asked = rng.sample(range(keys), options.queries)
    return facts, [(_words("In", places[i], "kept", "the"), _words(objects[i])) for i in asked]


def _copy(rng: Random, options: Options, length: int) -> tuple[list[Sentence], list[Question]]:
    words = _words(*(rng.choice(PEOPLE + PLACES + OBJECTS) for _ in range(options.items)))
    return [_end([" Copy", ":", *words])], [([" Again", ":"], words)]


def _arithmetic(rng: Random, options: Options, length: int) -> tuple[list[Sentence], list[Question]]:
    def total() -> Question:
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        return [" Sum", ":", *_number(a), " +", *_number(b), " ="], _end(_number(a + b))

    worked = [prompt + answer for prompt, answer in (total() for _ in range(2))]
    return worked, [total() for _ in range(options.queries)]


_Builder = Callable[[Random, Options, int], tuple[list[Sentence], list[Question]]]
TASKS: dict[str, _Builder] = {
    "retrieval_single": _retrieval_single,
    "retrieval_multi_key": _retrieval_many,
    "retrieval_multi_query": _retrieval_many,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
    "two_hop": _two_hop,
    "copy": _copy,
    "arithmetic": _arithmetic,
}
DEFAULTS = {task: Options(queries=4 if task == "retrieval_multi_query" else 1) for task in TASKS}


def document(task: str, length: int, seed: int, options: Options | None = None) -> Document:
    """The document of ``task`` with exactly ``length`` tokens (64 to 8192) for ``seed``.

    Raises ValueError for an unknown task, a length out of range, or facts that do not fit.
    """
    if task not in TASKS:
        raise ValueError(f"tinyworld: task must be one of {', '.join(TASKS)}, not {task!r}")
    if not MIN_LENGTH <= length <= MAX_LENGTH:
        raise ValueError(f"tinyworld: length must be from {MIN_LENGTH} to {MAX_LENGTH} tokens, not {length}")
    options = options or DEFAULTS[task]
    rng = Random(f"tinyworld/{task}/{length}/{seed}")
    facts, questions = TASKS[task](rng, options, length)
    tail: Sentence = []
    spans: list[tuple[int, int]] = []
    for prompt, answer in questions:
        tail += [" Ask", ":", *prompt]
        spans.append((len(tail), len(tail) + len(answer)))
        tail += answer
        if answer[-1] != ".":
            tail.append(".")
    budget = length - 1 - len(tail) - sum(map(len, facts))
    if budget < 0:
        raise ValueError(f"tinyworld: {task} with {options} needs {length - budget} tokens, not {length}")
    body: list[Sentence] = _filler(rng, budget)
    for place, fact in zip(sorted(rng.randrange(len(body) + 1) for _ in facts)[::-1], facts[::-1], strict=True):
        body.insert(place, fact)
    context = [BEGIN, *(token for sentence in body for token in sentence)]
    offset = len(context)
    answers = tuple((start + offset, end + offset) for start, end in spans)
    return Document(task, (*context, *tail), offset, answers)


@corpus(name="tinyworld", version=1)
@dataclass(frozen=True)
class Tinyworld(Corpus):
    """Documents of the procedural tinyworld language, all tasks in turn."""

    seqlen: int | None = option(256, "tokens of a document (64 to 8192)", low=64, high=8192)
    count: int = option(1024, "documents of a split, for perplexity", low=1, high=1_000_000)

    def documents(self, split: str) -> list[str]:
        first = TRAIN_SEEDS.start if split == "train" else 0 if split == "test" else 10**8
        return [document.text for document in self._documents(first, self.count, self.seqlen or 256)]

    @staticmethod
    def _documents(first: int, count: int, length: int) -> list[Document]:
        tasks = list(TASKS)
        return [document(tasks[i % len(tasks)], length, first + i) for i in range(count)]

    def windows(self, tokenizer: PreTrainedTokenizerBase, context: int, seed: int) -> Tensor:
        """Training documents behind the tokenizer's beginning of text: (nsamples, seqlen) int64.

        With the ladder's tokenizer they are whole; one that splits words sees only their first ``seqlen``
        tokens. UserError when ``seqlen`` is above the context.
        """
        import torch

        length = self.seqlen or min(context, MAX_LENGTH)
        if not MIN_LENGTH <= length <= context:
            raise UserError(
                f"calibration.seqlen={length}: must be from {MIN_LENGTH} to the model's context of {context} tokens"
            )
        first = TRAIN_SEEDS.start + seed * self.nsamples
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        rows = [
            [*begin, *tokenizer(one.text, add_special_tokens=False, verbose=False)["input_ids"]][:length]
            for one in self._documents(first, self.nsamples, length)
        ]
        shortest = min(map(len, rows))  # below ``length`` only where the tokenizer has no beginning of text
        return torch.tensor([row[:shortest] for row in rows])
