"""The Sparse Frontier tasks: exact lengths with any tokenizer, what each prompt holds, scores, and bad input."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import Command
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import sparsebench
from sparsebench.errors import UserError
from sparsebench.models.base import LoadedModel
from sparsebench.models.embedded import Ladder
from sparsebench.tasks.base import Evaluation
from sparsebench.tasks.page import NOISE, Page
from sparsebench.tasks.sparse_frontier import story_text
from sparsebench.tasks.sparse_frontier.prompt import Prompt, Sample
from sparsebench.tasks.sparse_frontier.qa import load
from sparsebench.tasks.sparse_frontier.ruler import vocabulary
from sparsebench.tasks.sparse_frontier.task import SparseFrontier

LADDER = Path(sparsebench.__file__).parent / "models" / "weights" / "tokenizer"
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
# sizes at which every task fits short prompts
SMALL: dict[str, dict[str, Any]] = {
    "niah": {"num_queries": 2, "key_groups": 1, "key_chars": 4},
    "vt": {"num_chains": 2, "num_hops": 2},
    "cwe": {"num_common_words": 3, "common_word_frequency": 6, "rare_word_frequency": 2},
    "qa_squad": {},
    "qa_quality": {},
    "story_retrieval": {"num_queries": 3, "conversation_extensions": 0},
    "story_multihop": {"conversation_extensions": 0},
    "story_filtering": {"chapters_in_question": 2, "conversation_extensions": 0},
}


def whitespace() -> PreTrainedTokenizerFast:
    """One id a word, all of them unknown: enough to count."""
    made = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def byte() -> PreTrainedTokenizerFast:
    """One id a byte, behind a beginning of text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<s>", *letters])}, []))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("."), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>")


def chat() -> PreTrainedTokenizerFast:
    made = whitespace()
    made.chat_template = TEMPLATE
    return made


def ladder() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(LADDER)


TOKENIZERS = {"ladder": (ladder, 2048), "whitespace": (whitespace, 700), "byte": (byte, 4000), "chat": (chat, 701)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Data of the question tasks, each in the form of its source."""
    folder = tmp_path_factory.mktemp("qa")
    about = [
        f"Town {n} lies on river {n}. " + f"It has {n} bridges and a wall of stone. " * (n % 4 + 1) for n in range(12)
    ]
    squad = {"data": [{"paragraphs": [
        {"context": text, "qas": [
            {"question": "Where does the town lie?", "answers": [{"text": f"on river {n}"}, {"text": f"river {n}"}]},
            {"question": "Who was its mayor?", "answers": [], "is_impossible": True},
            {"question": "Where does the town lie?", "answers": [{"text": "on a river"}]},
        ]} for n, text in enumerate(about)
    ]}]}  # fmt: skip
    options = ["mud", "stone", "glass", "wood"]
    asked = {"question": "What is the wall made of?", "options": options, "gold_label": 2}
    quality = [{"article": text, "questions": [asked]} for text in about]
    (folder / "squad.json").write_text(json.dumps(squad), encoding="utf-8")
    (folder / "quality.jsonl").write_text("\n".join(map(json.dumps, quality)), encoding="utf-8")
    return {"qa_squad": str(folder / "squad.json"), "qa_quality": str(folder / "quality.jsonl")}


def make(name: str, tokenizer: PreTrainedTokenizerBase, files: dict[str, str], **options: Any) -> list[Sample]:
    loaded = LoadedModel(SimpleNamespace(), tokenizer, "none", 100_000)  # type: ignore[arg-type]
    given = {"form": "natural", "samples": 2, "file": files.get(name), **SMALL[name], **options}
    return SparseFrontier(name=name, **given).prepare(loaded, None)  # type: ignore[return-value]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", SMALL)
def test_prompts_are_exact_repeatable_and_their_own_answer_is_right(
    name: str, tokenizer: str, files: dict[str, str]
) -> None:
    build, length = TOKENIZERS[tokenizer]
    samples = make(name, build(), files, length=length, max_new=2000)
    assert [len(sample.ids) for sample in samples] == [length] * 2
    for sample in samples:
        assert sample.score(f"<explanation>so</explanation><answer>\n{sample.gold}\n</answer>") == 1.0
        assert sample.score("") == (None if name in ("story_multihop", "story_filtering") else 0.0)
        assert sample.text.count("<question>") == 2
    again = make(name, build(), files, length=length, max_new=2000)
    assert [sample.text for sample in again] == [sample.text for sample in samples]
    later = make(name, build(), files, length=length, max_new=2000, seed=44)
    if not name.startswith("qa_"):  # sample i is drawn with seed + i
        assert [sample.text for sample in later[:1]] == [sample.text for sample in samples[1:]] or name == "cwe"
    assert [sample.text for sample in later] != [sample.text for sample in samples]


def test_the_template_wraps_the_prompt(files: dict[str, str]) -> None:
    tokenizer = ladder()
    tokenizer.chat_template = TEMPLATE
    (sample, *_) = make("niah", tokenizer, files, length=800)
    assert len(sample.ids) == 800
    text = tokenizer.decode(sample.ids)
    assert text.startswith("<|user|>The text below") and text.endswith("<|assistant|>")


def context(sample: Sample) -> str:
    return sample.text.split("<text>\n")[1].split("\n</text>")[0]


def test_needles_are_unique_and_asked_for(files: dict[str, str]) -> None:
    for sample in make("niah", whitespace(), files, length=900, num_queries=4, key_groups=4, key_chars=8):
        lines = re.findall(r"The value for key (\S+) is: (\S+)\.", context(sample))
        assert len(lines) > 40
        assert len({part for pair in lines for part in pair}) == 2 * len(lines)
        for number, (key, value) in enumerate(re.findall(r"answer for (\S+) is (\S+)\.", sample.gold), 1):
            assert (key, value) in lines and f"{number}. {key}" in sample.text


def test_chains_resolve_to_exactly_the_gold_names(files: dict[str, str]) -> None:
    for sample in make("vt", whitespace(), files, length=900, num_chains=5, num_hops=4):
        given = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", context(sample)))
        asked = re.findall(r"have the value (\d+)", sample.text)[0]

        def value(name: str, given: dict[str, str] = given) -> str:
            return value(given[name]) if name in given else name

        assert {name for name in given if value(name) == asked} == set(sample.gold.split())
        assert len(given) == 25 and len(sample.gold.split()) == 5
        assert context(sample).count(NOISE) > 10


def test_words_come_as_often_as_they_should(files: dict[str, str]) -> None:
    assert len(vocabulary()) > 3000
    options = {"num_common_words": 4, "common_word_frequency": 30, "rare_word_frequency": 3}
    for sample in make("cwe", whitespace(), files, length=1000, **options):
        counts = Counter(re.findall(r"^\d+\. (\w+)$", context(sample), re.MULTILINE))
        common = re.findall(r"\d+\. (\w+)", sample.gold)
        assert {counts.pop(word) for word in common} == {30}
        assert set(counts.values()) == {3} and len(counts) > 20


def chapters(sample: Sample) -> list[str]:
    return re.split(r"(?=^Chapter \d+:)", context(sample), flags=re.MULTILINE)[1:]


PURCHASE = re.compile("|".join(
    re.escape(line).replace(r"\{hero\}", "Arion").replace(r"\{item\}", r"(\w+ \w+ \w+)").replace(r"\{person\}", r"\w+")
    for line in story_text.PURCHASES
))  # fmt: skip


def bought(chapter: str) -> str | None:
    match = PURCHASE.search(chapter)
    return next(filter(None, match.groups())) if match else None


def test_every_chapter_buys_something_new_except_the_filtered_ones(files: dict[str, str]) -> None:
    for sample in make("story_filtering", whitespace(), files, length=1500):
        quiet = [str(number) for number, one in enumerate(chapters(sample), 1) if bought(one) is None]
        assert ", ".join(quiet) == sample.gold
    for sample in make("story_multihop", whitespace(), files, length=1500):
        items = [bought(one) for one in chapters(sample)]
        assert None not in items and len(set(items)) == len(items)
        after = re.findall(r"before acquiring the (\w+ \w+ \w+)", sample.text)[0]
        assert items[items.index(after) - 1] == sample.gold


def test_three_questions_are_one_of_each_kind(files: dict[str, str]) -> None:
    for sample in make("story_retrieval", whitespace(), files, length=1500, num_queries=3):
        asked = sample.text.split("<question>")[1]
        assert [asked.count(word) for word in ("Which place", "Whom", "Which item")] == [1, 1, 1]
        for number, chapter in re.findall(r"^(\d)\. .*in chapter (\d+)\?", asked, re.MULTILINE):
            answer = re.findall(rf"^{number}\. (.*)$", sample.gold, re.MULTILINE)[0]
            assert answer in chapters(sample)[int(chapter) - 1]


def test_a_question_names_its_document(files: dict[str, str]) -> None:
    for sample in make("qa_squad", whitespace(), files, length=400):
        number = re.findall(r"from Document (\d+)\.", sample.text)[0]
        document = re.split(r"Document \d+:\n", context(sample))[int(number)]
        assert sample.gold in document and "Who was its mayor?" not in sample.text
        assert context(sample).count("Document") > 4


def test_generation_is_scored_and_left_out_samples_count_zero(files: dict[str, str]) -> None:
    """A model that writes the right answer for odd samples, and for the others nothing that can be read."""
    tokenizer = ladder()
    samples = make("story_multihop", tokenizer, files, length=2048, samples=4)
    golds = [tokenizer(f"<answer>{sample.gold}</answer> and more")["input_ids"] for sample in samples]

    class Writer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place = torch.nn.Parameter(torch.zeros(1))
            self.step, self.fed = 0, []

        def forward(self, input_ids: torch.Tensor, use_cache: bool, past_key_values: Any = None) -> SimpleNamespace:
            self.step = 0 if input_ids.shape[1] > 1 else self.step + 1
            if self.step == 0:
                self.rows = [next(i for i, one in enumerate(samples) if one.ids == row) for row in input_ids.tolist()]
                self.fed.append(len(self.rows))
            logits = torch.zeros(len(self.rows), 1, len(tokenizer))
            for row, index in enumerate(self.rows):
                logits[row, 0, golds[index][self.step] if index % 2 and self.step < len(golds[index]) else 5] = 9.0
            return SimpleNamespace(logits=logits, past_key_values="cache")

    writer = Writer()
    loaded = LoadedModel(writer, tokenizer, "writer", 10_000)  # type: ignore[arg-type]
    task = SparseFrontier(name="story_multihop", form="natural", length=2048, max_new=30, samples=4)
    outcome = task.evaluate(loaded, Evaluation(batch_size=8), samples)
    assert (outcome.scores["score"].value, outcome.scores["score_answered"].value) == (0.5, 1.0)
    assert outcome.scores["score_answered"].n == 2 and writer.fed == [2, 2]
    assert [row["score"] for row in outcome.samples] == [0.0, 1.0, 0.0, 1.0]
    assert [row["answered"] for row in outcome.samples] == [False, True, False, True]
    assert outcome.samples[0]["sample"] == "story_multihop/43"


# ------------------------------------------------------------------ on the command line

BASE = ["method=dense", "model=tiny_100k", "threads=1"]


def test_one_record_a_task_in_tinyworld(command: Command) -> None:
    words = ["task=[sf_niah,sf_qa_squad]", "task.length=128", "task.samples=4"]
    assert command(*BASE, *words).code == 0
    through = command(*BASE, *words, "task.protocol=continuation")
    assert through.code == 0
    scores = {(one["task"], one.get("task.protocol")): one["score"] for one in through.records}
    assert len(scores) == 4 and min(scores.values()) > 0.7
    assert scores["sf_niah", None] == scores["sf_niah", "continuation"]


def test_a_natural_record(command: Command) -> None:
    words = ["task=sf_niah", "task.form=natural", "task.length=600", "task.samples=2", "task.max_new=60"]
    answer = command(*BASE, *words, "task.num_queries=1", "task.key_groups=1", "task.key_chars=4")
    assert answer.code == 0, answer.err
    (record,) = answer.records
    assert 0 <= record["score"] <= 1 and record["score_n"] == 2 and record["length"] == 600


def test_outcomes_are_called_like_the_score() -> None:
    ladder, task = Ladder(rung="tiny_100k").load(), SparseFrontier(name="niah", length=128, samples=3)
    outcome = task.evaluate(ladder, Evaluation(), task.prepare(ladder, None))
    values = [row["score"] for row in outcome.samples]
    assert len(values) == 3 * 4 and sum(values) / 12 == pytest.approx(outcome.scores["score"].value)


@pytest.mark.parametrize(
    ("words", "say"),
    [
        ("task=sf_niah task.form=natural task.length=16384", "task.length=16384"),
        ("task=sf_niah task.form=natural task.length=600 task.max_new=600", "context of tiny_100k"),
        ("task=sf_niah task.form=natural task.length=100 task.max_new=100", "too short"),
        ("task=sf_niah task.length=2048", "context of 1024"),
        (
            "task=sf_niah task.length=128 method=vertical_slash method.vertical_slash.approximation_size=256",
            "approximation_size=256",
        ),
        ("task=sf_niah task.length=64 task.num_queries=20", "task.length=64"),
        ("task=sf_niah task.length=512 task.num_queries=33", "task.num_queries=33: at most 32"),
        ("task=sf_vt task.length=512 task.num_hops=32", "task.num_hops=32: at most 31"),
        ("task=sf_story_filtering task.form=tinyworld task.length=256", "no such form"),
        ("task=sf_qa_quality task.length=600 task.max_new=9 task.file=/no/such.json", "task.file=/no/such.json"),
        ("task=sf_qa_squad task.form=natural task.length=600 task.max_new=9", "task.file="),
        ("task=sf_niah task.file={json}", "goes with"),
        ("task=sf_qa_squad task.form=natural task.length=600 task.max_new=9 task.file={text}", "not valid JSON"),
        ("task=sf_qa_squad task.form=natural task.length=600 task.max_new=9 task.file={json}", "not in a known form"),
        ("task=sf_qa_squad task.form=natural task.length=600 task.max_new=9 task.file={squad}", "task.samples=100"),
        ("task=sf_qa_quality task.length=600 task.max_new=9 task.file={squad}", "letters A to D"),
        ("task=sf_cwe task.common_word_frequency=3", "task.common_word_frequency=3"),
        ("task=sf_cwe task.form=natural task.length=900 task.max_new=2", "task.length=900"),
        ("task=sf_vt task.form=natural task.length=800 task.max_new=2 task.num_chains=1", "a right answer has"),
        ("task=sf_nia", "'sf_niah'"),
    ],
)
def test_bad_input_is_one_line(command: Command, files: dict[str, str], tmp_path: Path, words: str, say: str) -> None:
    (tmp_path / "other.json").write_text('[{"a": 1}]', encoding="utf-8")
    (tmp_path / "text.json").write_text("once upon", encoding="utf-8")
    places = {"json": tmp_path / "other.json", "text": tmp_path / "text.json", "squad": files["qa_squad"]}
    base = BASE if " method=" not in words else [word for word in BASE if not word.startswith("method=")]
    answer = command(*base, *words.format(**places).split())
    assert answer.code == 2, answer.err
    assert say in answer.err and len(answer.err.strip().splitlines()) == 1
    assert answer.records == []


def test_a_page_that_cannot_be_filled_enough() -> None:
    """With one token left there is no room for a line of its own."""
    prompt = Prompt("Read.", "What?", "Nothing.", "<word>")
    tokens = len(Page(byte(), 1).ids(prompt.text()))
    assert len(Page(byte(), tokens + 1).exact(prompt)[1]) == tokens
    with pytest.raises(UserError, match=f"come to {tokens} tokens at most"):
        Page(byte(), tokens + 1, min_fill=1.0).exact(prompt)


@pytest.mark.parametrize(
    ("name", "row", "golds"),
    [
        (
            "qa_quality",
            {"instructions": ["?"], "input": "t", "outputs": ["(B) Their subconscious did"]},
            "B",
        ),
        ("qa_toefl", {"instructions": ["?"], "input": "t", "outputs": ["C"]}, "C"),
        ("qa_toefl", {"instructions": ["?"], "input": "t", "outputs": ["B, D and no more"]}, "B"),
        ("qa_toefl", {"instructions": ["?"], "input": "t", "outputs": ["ACE"]}, None),
        ("qa_toefl", {"instructions": ["?"], "input": "t", "outputs": ["D, A"]}, "AD"),
        ("qa_squad", {"question": "?", "context": "t", "answers": "12 miles"}, "12 miles"),
        ("qa_squad", {"question": "?", "context": "t", "answers": ["", "the"]}, None),
        ("qa_quality", {"question": "?", "context": "t", "options": ["x", "y"], "answer": "B"}, "B"),
    ],
)
def test_answers_of_the_known_forms(name: str, row: dict[str, Any], golds: str | None, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row]), encoding="utf-8")
    if golds is None:
        with pytest.raises(UserError, match="holds no question with an answer"):
            load(name, str(file))
    else:
        assert [one.golds for one in load(name, str(file))] == [(golds,)]


@pytest.mark.parametrize(
    ("name", "change", "say"),
    [
        ("qa_quality", {"answer": "AB"}, "not in a known form"),
        ("qa_quality", {"answer": ""}, "not in a known form"),
        ("qa_quality", {"answer": "D"}, "no option 4 among 2"),
        ("qa_quality", {"answer": -1}, "no option 0 among 2"),
        ("qa_squad", {"answer": "A"}, "asks for words, but has options"),
    ],
)
def test_answers_that_are_none_of_the_options(name: str, change: dict[str, Any], say: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    row = {"question": "?", "context": "t", "options": ["x", "y"]} | change
    file.write_text(json.dumps([row]), encoding="utf-8")
    with pytest.raises(UserError, match=say):
        load(name, str(file))
