"""SCBench: what the sessions hold, how a cache lives over their turns, scores, and bad input."""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import pytest
import torch
from commands import Command
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import sparsebench
from sparsebench.corpora import recall, tinyworld
from sparsebench.models.base import LoadedModel
from sparsebench.models.pair_recall import PairRecall
from sparsebench.models.plug import Call, Handler, Work, plugged
from sparsebench.tasks.base import Evaluation
from sparsebench.tasks.decoding import greedy
from sparsebench.tasks.page import NOISE
from sparsebench.tasks.scbench import documents, generators, scorers
from sparsebench.tasks.scbench.records import middle_cut
from sparsebench.tasks.scbench.session import Life, Session, Turn, live
from sparsebench.tasks.scbench.synthetic import GENERATORS
from sparsebench.tasks.scbench.task import SCBench

LADDER = Path(sparsebench.__file__).parent / "models" / "weights" / "tokenizer"


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=100_000, initializer_range=0.3, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    return LoadedModel(LlamaForCausalLM(config).eval(), AutoTokenizer.from_pretrained(LADDER), "tiny", 100_000)


@pytest.fixture(scope="module")
def pairs() -> LoadedModel:
    return PairRecall().load()


# ------------------------------------------------------------------ scores


@pytest.mark.parametrize(
    ("kind", "text", "labels", "score"),
    [
        ("kv", "it is abc-1.", ["abc-1"], 1.0),
        ("kv", "it is ABC-1.", ["abc-1"], 0.0),
        ("vt", "abcde, FGHIJ", ["ABCDE", "FGHIJ", "KLMNO"], 0.67),
        ("mf", "the answer is 42.0", ["42"], 1.0),
        ("mf", "4 or 42", ["42"], 0.0),
        ("mf", "none", ["42"], 0.0),
        ("many_shot", " (a) it is", ["(A)"], 1.0),
        ("choice", "B. because", ["B"], 1.0),
        ("choice", "because B", ["B"], 0.0),
        ("qa", "in New York", ["Paris", "New York"], 1.0),
        ("needle", "It is 12345.", ["12345"], 1.0),
        ("summary", "The cat sat, the dog lay", ["the cat sat", "nothing"], 2 * 3 / (6 + 3)),
        ("summary", "", ["the cat sat"], 0.0),
    ],
)
def test_scores(kind: str, text: str, labels: list[str], score: float) -> None:
    assert scorers.SCORERS[kind](text, labels) == score


CODE = "def f(x):\n    if x > 3:\n        return x * 2 + 1\n    return [x, 0, x]"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (CODE, 1.0),
        (f"Here it is:\n```python\n{CODE}\n```\nIt doubles.", 1.0),  # only the function counts
        (CODE.replace("f(x)", "g(x)"), 1.0),  # near enough
        (CODE.replace("x", "y"), 0.0),  # the right idea in other words
        (CODE.replace("3", "5"), 0.0),  # another candidate's
        ("It doubles.", 0.0),
    ],
)
def test_a_function_must_be_the_one_that_is_meant(text: str, score: float) -> None:
    assert scorers.function(text, [CODE, CODE.replace("3", "5"), "def h():\n    return 0"]) == score


def test_similarity_is_bleu() -> None:
    assert scorers.similarity("a b c d e", "a b c d e") == 1.0
    assert scorers.similarity("a b c d x", "a b c d e") == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert scorers.similarity("a b c d", "a b c d e") == pytest.approx(2.718281828 ** (1 - 5 / 4))
    assert scorers.similarity("a b c", "a b c") == 0.0  # no 4-gram


# ------------------------------------------------------------------ sessions in English


def test_a_pair_is_80_characters() -> None:
    draft = generators.kv(Random(0), 2500, 5)
    assert len(draft.context) == 200_000 - 2 + 2  # no separator after the last pair, and two braces
    found = json.loads(draft.context)
    asked = [(re.findall(r'"(.*?)"', one.question)[0], one.labels[0]) for one in draft.asked]
    assert len(set(asked)) == 5 and all(found[key] == value for key, value in asked)


def test_beginning_and_end_name_one_string() -> None:
    draft = generators.prefix_suffix(Random(1), 60, 5)
    strings = draft.context.splitlines()
    assert len(strings) == len(set(strings)) >= 60
    for one in draft.asked:
        first, last = re.findall(r'"(.{5})"', one.question)
        assert [s for s in strings if s.startswith(first) and s.endswith(last)] == one.labels
        assert [s.startswith(first) for s in strings].count(True) >= 3
        assert [s.endswith(last) for s in strings].count(True) >= 3


def test_chains_stand_in_order_between_noise() -> None:
    draft = generators.vt(Random(2), 30, 5)
    lines = [line for line in draft.context.splitlines() if line != NOISE]
    assert len(lines) == 15 and len(draft.context.splitlines()) == 45
    for one in draft.asked:
        value = re.findall(r"\d{5}", one.question)[0]
        statements = [f"VAR {name} = " for name in one.labels]
        places = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in statements]
        assert places == sorted(places) and lines[places[0]].endswith(f"{value}.")
        assert [lines[b].split(" = ")[1] for b in places[1:]] == [f"VAR {name}." for name in one.labels[:-1]]


def test_numbers_have_the_asked_statistics() -> None:
    draft = generators.mf(Random(3), 20, 5)
    numbers = json.loads(draft.context)
    right = {"largest": max(numbers), "smallest": min(numbers), "median": median(numbers)}
    assert len(numbers) == 41 and len(draft.asked) == 3
    assert all(one.labels == [str(right[one.question.split()[1]])] for one in draft.asked)


def test_every_shot_follows_the_rule_that_is_asked() -> None:
    draft = generators.many_shot(Random(4), 50, 5)
    rule = dict(re.findall(r"Input: (\w+) .*\nLabel: (\(\w\))", draft.context))
    assert len(re.findall("Input", draft.context)) == 50
    assert all(rule[one.question.split()[1]] == one.labels[0] for one in draft.asked)


def test_a_mix_asks_in_turn() -> None:
    draft = generators.mix(Random(5), 10, 5)
    assert [one.kind for one in draft.asked] == ["kv", "mf", "kv", "mf", "kv"]
    assert len({one.question for one in draft.asked}) == 5


def test_functions_do_what_is_said_of_them() -> None:
    draft = documents.repoqa(Random(6), 40, 5)
    made: dict[str, Any] = {}
    exec(draft.context, made)  # the code is code
    assert len([one for one in made.values() if callable(one)]) == 40
    assert len({one.question for one in draft.asked}) == 5
    for one in draft.asked:
        assert one.labels[0] == one.answer and one.answer in draft.context and len(set(one.labels)) == 40
        assert one.answer.split("(")[0].removeprefix("def ") not in one.question
        assert scorers.function(one.answer, one.labels) == 1.0
        assert scorers.function(one.labels[1], one.labels) == 0.0
        made["found"] = eval(one.answer.split("(")[0].removeprefix("def "), made)(range(200))
        smallest = re.search(r"the (\d) smallest", one.question)
        assert smallest is None or len(made["found"]) <= int(smallest[1])


def test_a_summary_is_what_happened_and_when() -> None:
    draft = documents.summary(Random(7), 60, 5)
    reports = draft.context.split("\n\n")
    assert len(reports) == len(draft.asked) == 5 and draft.context.count(". ") > 60
    for report, one in zip(reports, draft.asked, strict=True):
        assert re.findall(r"In \d{4} [^.]+\.", report) == re.findall(r"In \d{4} [^.]+\.", one.answer)
        assert scorers.rouge(one.answer, one.labels) == 1.0 > scorers.rouge(report, one.labels) > 0


def test_mixes_of_code_and_prose_ask_in_turn() -> None:
    hidden = documents.summary_with_needles(Random(8), 60, 5)
    assert [(one.kind, one.max_new) for one in hidden.asked[:2]] == [("summary", 800), ("needle", None)]
    assert all(f"{one.question} {one.answer}." in hidden.context for one in hidden.asked[1::2])
    code = documents.repoqa_and_kv(Random(9), 12, 5)
    assert [(one.kind, one.max_new) for one in code.asked[:2]] == [("repoqa", None), ("kv", 80)]
    objects = [json.loads(line) for line in code.context.splitlines() if line.startswith("{")]
    assert len(objects) == 12 and {code.asked[1].labels[0]} <= {value for one in objects for value in one.values()}


@pytest.mark.parametrize("name", GENERATORS)
def test_contexts_are_exact_and_repeatable(llama: LoadedModel, name: str) -> None:
    task = SCBench(name=name, form="natural", length=1500, samples=2, turns=3)
    found = task.prepare(llama, None)
    assert [len(one.context) for one in found] == [1500, 1500] and found[0].context != found[1].context
    assert [(one.context, len(one.turns)) for one in found] == [
        (one.context, len(one.turns)) for one in task.prepare(llama, None)
    ]
    later = SCBench(name=name, form="natural", length=1500, samples=1, turns=3, seed=1).prepare(llama, None)
    assert later[0].context == found[1].context
    for turn in found[0].turns:
        assert turn.score(turn.gold) == 1.0 and turn.score([5]) == 0.0
        assert llama.tokenizer.decode(turn.question).startswith("\n\n")


def test_sessions_of_the_data_sets_form(llama: LoadedModel, tmp_path: Path) -> None:
    turns = [
        {"input": "Who?", "options": ["Ann", "Bob", "Cid", "Dan"], "answer": ["Bob"]},
        {"input": "x", "answer": "y"},
    ]
    (tmp_path / "s.jsonl").write_text(json.dumps({"id": 0, "context": [7] * 99, "multi_turns": turns[:1]}) + "\n")
    options: dict[str, Any] = {"form": "natural", "file": str(tmp_path / "s.jsonl"), "length": 64}
    (one,) = SCBench(name="choice", **options).prepare(llama, None)
    assert len(one.context) == 64 and len(one.turns) == 1
    assert "B. Bob" in llama.tokenizer.decode(one.turns[0].question)
    assert one.turns[0].score(llama.tokenizer(" B")["input_ids"]) == 1.0
    assert middle_cut([1, 2, 3, 4, 5], 3) == [1, 4, 5] and middle_cut([1, 2], 3) == [1, 2]


# ------------------------------------------------------------------ the life of a cache


def keep(index: int, session: int, store: dict[tuple[int, int], list[int]], ids: list[int]) -> float:
    store[session, index] = ids
    return 0.0


def sessions(
    store: dict[tuple[int, int], list[int]], count: int = 2, order: tuple[int, ...] = (0, 1, 2)
) -> list[Session]:
    """Random sessions of one shape whose turns note what was generated."""
    rng = Random(0)
    made = []
    for session in range(count):

        def draw(length: int) -> list[int]:
            return [rng.randrange(4, 1000) for _ in range(length)]

        context = draw(30)
        turns = [Turn("kv", draw(4), draw(3), 6, partial(keep, i, session, store)) for i in range(3)]
        made.append(Session(str(session), context, [turns[i] for i in order]))
    return made


def test_multi_turn_is_the_concatenated_prompt(llama: LoadedModel) -> None:
    """With the golden context: the model's own tokens leave no trace."""
    store: dict[tuple[int, int], list[int]] = {}
    made = sessions(store)
    lived = live(llama, made, Life("multi_turn"))
    for number, one in enumerate(made):
        prompt = list(one.context)
        for index, turn in enumerate(one.turns):
            prompt += turn.question
            assert store[number, index] == greedy(llama, [prompt], 6)[0]
            prompt += turn.gold
    assert lived.read == 30 + 3 * 4 + 2 * 3
    assert lived.reused == 34 + 41 and lived.kept_first == lived.kept_last == 1.0
    assert lived.scores == [[0.0] * 3] * 2


def test_without_the_golden_context_the_models_own_answers_stand(llama: LoadedModel) -> None:
    store: dict[tuple[int, int], list[int]] = {}
    (one,) = sessions(store, count=1)
    live(llama, [one], Life("multi_turn", golden=False))
    prompt = list(one.context)
    for index, turn in enumerate(one.turns):
        prompt += turn.question
        new = greedy(llama, [prompt], 6)[0]
        assert store[0, index] == new
        prompt += [*new, 0]


def test_requests_do_not_see_each_other(llama: LoadedModel) -> None:
    store: dict[tuple[int, int], list[int]] = {}
    made = sessions(store)
    lived = live(llama, made, Life("multi_request"))
    first = dict(store)
    for number, one in enumerate(made):
        for index, turn in enumerate(one.turns):
            assert store[number, index] == greedy(llama, [one.context + turn.question], 6)[0]
    live(llama, sessions(store, order=(2, 0, 1)), Life("multi_request"))
    assert store == first and lived.reused == 60


class KeepsLast(Handler):
    """After a prefill, only the last 8 entries stay."""

    def after(self, call: Call, work: Work) -> None:
        if call.phase == "prefill" and call.layer is not None:
            call.layer.keep(call.key_positions >= call.key_positions.shape[-1] - 8)


@pytest.mark.parametrize(
    ("mode", "first", "last"), [("multi_turn", 8 / 34, 22 / 48), ("multi_request", 8 / 30, 8 / 30)]
)
def test_what_was_evicted_stays_away(llama: LoadedModel, mode: str, first: float, last: float) -> None:
    store: dict[tuple[int, int], list[int]] = {}
    with plugged(llama.model, KeepsLast()):
        lived = live(llama, sessions(store), Life(mode))
    assert (lived.kept_first, lived.kept_last) == pytest.approx((first, last))


# ------------------------------------------------------------------ tiny models


def test_the_pair_languages_ids(pairs: LoadedModel) -> None:
    words = recall.vocabulary()
    assert len(words) == recall.SIZE == 1104 and pairs.tokenizer.convert_tokens_to_ids(words) == list(range(1104))
    assert [words[i] for i in (16 * 7 + 3, 1024 + 7, 1088 + 3)] == ["k07=v03", "k07?", "v03"]
    for scattered in (False, True):
        context = recall.draw(Random(0), 10, copies=3, scattered=scattered)
        assert sorted(context.ids.count(16 * key + value) for key, value in context.facts) == [1, 3, 3, 3]
        assert (sum(a == b for a, b in pairwise(context.ids)) == 6) is not scattered
    assert recall.Recall(nsamples=3).windows(pairs.tokenizer, 128, seed=1).shape == (3, 80)


@pytest.mark.parametrize("mode", ["multi_turn", "multi_request"])
def test_the_recall_model_knows_what_its_cache_holds(pairs: LoadedModel, mode: str) -> None:
    task = SCBench(form="recall", mode=mode, samples=32)
    prepared = task.prepare(pairs, None)
    dense = task.evaluate(pairs, Evaluation(), prepared)
    assert dense.scores["score"].value > 0.99 and dense.scores["score/turn5"].value > 0.99
    with plugged(pairs.model, KeepsLast()):
        dropped = task.evaluate(pairs, Evaluation(), prepared)
    assert dropped.scores["score"].value < 0.5  # 8 of 48 facts, and one guess of 16
    assert dropped.notes["kv_kept_first"] < 0.2


@pytest.mark.parametrize("lie", ["adjacent", "scattered"])
def test_every_fact_twice(pairs: LoadedModel, lie: str) -> None:
    task = SCBench(form="recall", samples=16, copies=2, copies_lie=lie)
    outcome = task.evaluate(pairs, Evaluation(), task.prepare(pairs, None))
    assert outcome.scores["score"].value > 0.99


@pytest.mark.parametrize("name", ["kv", "vt"])
def test_sessions_in_tinyworld(llama: LoadedModel, name: str) -> None:
    task = SCBench(name=name, samples=2, length=256)
    for one in task.prepare(llama, None):
        whole = list(one.context)
        for turn in one.turns:
            text = llama.tokenizer.decode(turn.question)
            assert text.startswith(" Ask: ") and turn.score(turn.gold) == 1.0
            whole += turn.question + turn.gold
        assert len(whole) == 256 and llama.tokenizer.decode(turn.gold).endswith(".")
        assert llama.tokenizer.decode(whole).startswith(tinyworld.BEGIN)


def test_batches_do_not_change_scores(pairs: LoadedModel) -> None:
    task = SCBench(form="recall", samples=6, items=24)
    prepared = task.prepare(pairs, None)
    one = task.evaluate(pairs, Evaluation(batch_size=1), prepared)
    many = task.evaluate(pairs, Evaluation(batch_size=64), prepared)
    assert one.scores == many.scores and one.samples == many.samples
    assert len(one.samples) == 30 and one.samples[7] == {"sample": "kv/1/3", "turn": 3, "kind": "kv", "score": 1.0}


# ------------------------------------------------------------------ on the command line


def test_records_of_every_form(command: Command) -> None:
    words = ["method=dense", "threads=1", "task.samples=4"]
    assert command(*words, "model=pair_recall", "task=scbench_recall").code == 0
    assert command(*words, "model=tiny_100k", "task=scbench_kv", "task.golden_context=false").code == 0
    assert command(*words, "model=tiny_100k", "task=scbench_kv", "task.mode=multi_request").code == 0
    natural = ["task=scbench_mix", "task.length=400", "task.turns=2", "task.samples=1"]
    answer = command(*words[:2], "model=tiny_100k", *natural)
    assert answer.code == 0, answer.err
    # of the two records of scbench_kv the one in golden context, whichever shard sorts last
    found = {record["task"]: record for record in answer.records if "task.golden_context" not in record}
    assert found["scbench_recall"]["score"] > 0.99 and found["scbench_kv"]["score"] > 0.8
    assert {"score/turn1", "score/turn5", "score/later", "kv_kept_first", "tokens_reused"} <= set(found["scbench_kv"])
    assert {"score/kv", "score/mf"} <= set(found["scbench_mix"])


@pytest.mark.parametrize(
    ("words", "say"),
    [
        ("model=tiny_100k task=scbench_recall", "model=pair_recall"),
        ("model=pair_recall task=scbench_recall task.items=120", "task.items=120"),
        ("model=pair_recall task=scbench_recall task.items=70", "there are 64"),
        ("model=pair_recall task=scbench_recall task.items=4", "task.turns=5"),
        ("model=pair_recall task=scbench_recall task.name=vt", "only kv"),
        ("model=tiny_100k task=scbench_kv task.length=2048", "context of 1024"),
        ("model=tiny_100k task=scbench_mf", "task.length=16384"),
        ("model=tiny_100k task=scbench_mf task.length=1020", "with their questions"),
        ("model=tiny_100k task=scbench_mf task.form=tinyworld", "no such form"),
        ("model=tiny_100k task=scbench_kv task.form=natural task.length=100", "too short"),
        ("model=tiny_100k task=scbench_kv task.form=natural task.name=qa", "task.file="),
        ("model=tiny_100k task=scbench_kv task.file=/no/such.jsonl", "task.file=/no/such.jsonl"),
        ("model=tiny_100k task=scbench_kv task.form=natural task.file={text}", "line 1 is not a session"),
        ("model=tiny_100k task=scbench_kv task.file={text}", "goes with"),
        ("model=tiny_100k task=scbench_repoqa task.length=1000", "with their questions"),
        ("model=tiny_100k task=scbench_repoqa task.file={text}", "goes with"),
        ("model=tiny_100k task=scbench_kv task.mode=scdq", "multi_request"),
        ("model=tiny_100k task=scbench_kv task.golden_context=false task.mode=multi_request", "multi_turn"),
    ],
)
def test_bad_input_is_one_line(command: Command, tmp_path: Path, words: str, say: str) -> None:
    (tmp_path / "text.jsonl").write_text("once upon\n", encoding="utf-8")
    answer = command("method=dense", "threads=1", *words.format(text=tmp_path / "text.jsonl").split())
    assert answer.code == 2, answer.err
    assert say in answer.err and len(answer.err.strip().splitlines()) == 1
    assert answer.records == []
