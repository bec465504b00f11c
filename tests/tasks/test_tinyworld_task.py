"""The tinyworld task: exact on models that know or miss the answers, with any tokenizer, through the cache."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import sqrt
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import sparsebench
from sparsebench.corpora import tinyworld
from sparsebench.errors import UserError
from sparsebench.models.base import LoadedModel
from sparsebench.tasks.base import Evaluation, Outcome
from sparsebench.tasks.tinyworld import Encoded, TinyworldTask, encode

TOKENIZER = Path(sparsebench.__file__).parent / "models" / "weights" / "tokenizer"
TASKS = tuple(tinyworld.TASKS)
HOW = Evaluation(batch_size=2)
Miss = Callable[[Encoded, int], bool]


def byte_level(superwords: bool = False, begin: bool = True) -> PreTrainedTokenizerFast:
    """A small byte-level BPE of another vocabulary: words in several pieces, or pieces across words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not superwords)
    made.decoder = decoders.ByteLevel()
    texts = [tinyworld.document(task, 128, seed).text for task in TASKS for seed in range(3)]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>" if begin else None)


def characters() -> PreTrainedTokenizerFast:
    """One id a character, spaces as SentencePiece writes them, and one put before the text."""
    letters = sorted({letter for word in tinyworld.vocabulary() for letter in word} | {"▁"})
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<s>", *letters])}, []))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


@pytest.fixture(scope="module")
def ladder() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module")
def llama(ladder: PreTrainedTokenizerBase) -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return LoadedModel(LlamaForCausalLM(config).eval(), ladder, "tiny", 256)


class Oracle(nn.Module):
    """Knows the documents: gives the next gold id all the probability, or the id after it where ``miss`` says so."""

    def __init__(self, prepared: dict[str, list[Encoded]], size: int, miss: Miss) -> None:
        super().__init__()
        self.documents = [document for documents in prepared.values() for document in documents]
        self.embed, self.size, self.miss = nn.Embedding(1, 1), size, miss
        self.fed: list[tuple[int, ...]] = []

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, input_ids: Tensor, use_cache: bool, past_key_values: Any = None) -> SimpleNamespace:
        self.fed.append(tuple(input_ids.shape))
        before = past_key_values if use_cache and past_key_values else [[] for _ in input_ids]
        seen = [[*old, *row] for old, row in zip(before, input_ids.tolist(), strict=True)]
        logits = torch.zeros(*input_ids.shape, self.size)
        for row, ids in enumerate(seen):
            for place in range(input_ids.shape[1]):
                prefix = ids[: len(ids) - input_ids.shape[1] + place + 1]
                for document in self.documents:
                    if len(prefix) < len(document.ids) and document.ids[: len(prefix)] == prefix:
                        gold = document.ids[len(prefix)]
                        logits[row, place, (gold + self.miss(document, len(prefix))) % self.size] = 9.0
        return SimpleNamespace(logits=logits, past_key_values=seen)


def ask(
    tokenizer: PreTrainedTokenizerBase, miss: Miss, how: Evaluation = HOW, **options: Any
) -> tuple[Outcome, Oracle]:
    task = TinyworldTask(**{"length": 64, "samples": 3, **options})
    loaded = LoadedModel(SimpleNamespace(), tokenizer, "oracle", 4096)  # type: ignore[arg-type]
    prepared = task.prepare(loaded, None)
    oracle = Oracle(prepared, len(tokenizer), miss)
    loaded.model = oracle  # type: ignore[assignment]
    return task.evaluate(loaded, how, prepared), oracle


@pytest.mark.parametrize("protocol", ["windows", "continuation"])
@pytest.mark.parametrize("make", [None, byte_level, characters])
def test_an_oracle_scores_one_and_a_wrong_model_zero(
    ladder: PreTrainedTokenizerBase, make: Callable[[], PreTrainedTokenizerBase] | None, protocol: str
) -> None:
    tokenizer = make() if make else ladder
    # 64 words are about 400 characters, so the oracle's long lists are for few documents
    options = {"protocol": protocol, "samples": 3 if make is None else 1}
    right, _ = ask(tokenizer, lambda document, place: False, **options)
    wrong, _ = ask(tokenizer, lambda document, place: True, **options)
    assert list(right.scores) == ["accuracy", *(f"accuracy/{task}" for task in TASKS)]
    assert {score.value for score in right.scores.values()} == {1.0}
    assert {score.value for score in wrong.scores.values()} == {0.0}


@pytest.mark.parametrize("protocol", ["windows", "continuation"])
def test_only_answers_count_and_every_token_of_them(ladder: PreTrainedTokenizerBase, protocol: str) -> None:
    def answered(document: Encoded, place: int) -> bool:
        return any(start <= place < end for start, end in document.answers)

    def last(document: Encoded, place: int) -> bool:
        return any(place == end - 1 for _, end in document.answers)

    assert ask(ladder, lambda d, p: not answered(d, p), protocol=protocol)[0].scores["accuracy"].value == 1.0
    assert ask(ladder, last, protocol=protocol)[0].scores["accuracy"].value == 0.0


def test_scores_errors_and_samples(ladder: PreTrainedTokenizerBase) -> None:
    def miss(document: Encoded, place: int) -> bool:
        """Copy: documents 1 and 3; retrieval: the first of the four answers, but in document 0 all."""
        if document.name.startswith("copy"):
            return document.name in ("copy/1", "copy/3")
        start, end = document.answers[0]
        return document.name.endswith("/0") or start <= place < end

    found, _ = ask(ladder, miss, tasks=["retrieval_multi_query", "copy"], samples=4)
    samples = {row["sample"]: row["correct"] for row in found.samples}
    assert len(samples) == len(found.samples) == 4 * 4 + 4
    assert samples["retrieval_multi_query/0/3"] == 0.0 and samples["retrieval_multi_query/2/1"] == 1.0
    assert [samples[f"copy/{i}/0"] for i in range(4)] == [1.0, 0.0, 1.0, 0.0]
    assert {row["task"] for row in found.samples} == {"retrieval_multi_query", "copy"}

    many, copy, mean = (found.scores[n] for n in ("accuracy/retrieval_multi_query", "accuracy/copy", "accuracy"))
    # documents are the samples, since the answers of one document are not independent: 0, 3/4, 3/4, 3/4
    assert (many.value, many.n, copy.value, copy.n, mean.n) == (0.5625, 4, 0.5, 4, 8)
    error_many, error_copy = 0.375 / 2, sqrt(1 / 3) / 2
    assert (many.stderr, copy.stderr) == pytest.approx((error_many, error_copy))
    assert mean.value == pytest.approx((0.5625 + 0.5) / 2)
    assert mean.stderr == pytest.approx(sqrt(error_many**2 + error_copy**2) / 2)
    assert found.notes == {"length": 64}


def test_one_sample_has_no_error(ladder: PreTrainedTokenizerBase) -> None:
    found, _ = ask(ladder, lambda d, p: False, samples=1, tasks=["copy"])
    assert [(s.stderr, s.n) for s in found.scores.values()] == [(None, 1)] * 2


def test_the_seed_chooses_the_documents(ladder: PreTrainedTokenizerBase, llama: LoadedModel) -> None:
    prepared = TinyworldTask(tasks=("copy",), length=96, samples=3, seed=5).prepare(llama, None)["copy"]
    assert [document.name for document in prepared] == ["copy/5", "copy/6", "copy/7"]
    assert [ladder.decode(d.ids) for d in prepared] == [
        "".join(tinyworld.document("copy", 96, seed).tokens) for seed in (5, 6, 7)
    ]
    assert prepared == TinyworldTask(tasks=("copy",), length=96, samples=3, seed=5).prepare(llama, None)["copy"]


def test_options_reach_the_documents(ladder: PreTrainedTokenizerBase, llama: LoadedModel) -> None:
    def text(task: str, **options: int) -> str:
        made = TinyworldTask(tasks=(task,), length=256, samples=1, **options).prepare(llama, None)
        return str(ladder.decode(made[task][0].ids))

    assert text("variable_tracking", hops=5).count(" Let ") == 2 * 6 + 1
    assert text("retrieval_multi_key", keys=11).count(" In ") == 11 + 1
    assert len(text("copy", items=20).split("Copy:")[1].split(".")[0].split()) == 20


def test_progress_counts_documents(ladder: PreTrainedTokenizerBase) -> None:
    done: list[tuple[int, int]] = []
    how = Evaluation(1, lambda *at: done.append(at))
    ask(ladder, lambda d, p: False, how, samples=10, tasks=["copy", "two_hop"], length=64)
    assert done == [(8, 20), (10, 20), (18, 20), (20, 20)]


def test_through_the_cache_the_question_alone_is_decoded(ladder: PreTrainedTokenizerBase) -> None:
    _, oracle = ask(ladder, lambda d, p: False, protocol="continuation", tasks=["two_hop"], samples=2)
    document = tinyworld.document("two_hop", 64, 0)
    assert oracle.fed == [(2, document.question), (2, 64 - document.question - 1)]


@pytest.mark.parametrize("make", [None, byte_level])
def test_continuation_equals_windows(llama: LoadedModel, make: Callable[[], PreTrainedTokenizerBase] | None) -> None:
    """On a random model, which is right by chance alone, made right by asking for what it would say."""
    loaded = LoadedModel(llama.model, make(), "tiny", 4096) if make else llama
    task = TinyworldTask(length=96, samples=4)
    prepared = task.prepare(loaded, None)
    with torch.no_grad():
        for documents in prepared.values():
            for document in documents[::2]:
                for start, end in document.answers[:2]:
                    for place in range(start, end):
                        logits = llama.model(input_ids=torch.tensor([document.ids[:place]])).logits
                        document.ids[place] = int(logits[0, -1].argmax())
    windows = task.evaluate(loaded, Evaluation(), prepared)
    through = TinyworldTask(length=96, samples=4, protocol="continuation").evaluate(loaded, Evaluation(), prepared)
    assert windows.scores == through.scores
    key = itemgetter("sample")
    assert sorted(windows.samples, key=key) == sorted(through.samples, key=key)
    right = [row["correct"] for row in windows.samples]
    assert 0.3 < sum(right) / len(right) < 0.8


# ------------------------------------------------------------------ other tokenizers


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("make", [None, byte_level, characters])
def test_encode_finds_the_same_answers(
    ladder: PreTrainedTokenizerBase, task: str, make: Callable[[], PreTrainedTokenizerBase] | None
) -> None:
    tokenizer = make() if make else ladder
    loaded = LoadedModel(SimpleNamespace(), tokenizer, "none", 10_000)  # type: ignore[arg-type]
    for seed in range(5):
        document = tinyworld.document(task, 128, seed)
        ids, spans = encode(loaded, document)
        assert ids[0] == tokenizer.bos_token_id and len(spans) == len(document.tokens)
        assert spans[0] == (0, 1) and spans[-1][1] == len(ids)
        for start, end in document.answers:
            found = ids[spans[start][0] : spans[end - 1][1]]
            assert tokenizer.decode(found).strip() == "".join(document.tokens[start:end]).strip()
        prompt = ids[1 : spans[document.question - 1][1]]
        assert tokenizer.decode(prompt).strip() == "".join(document.tokens[1 : document.question]).strip()
        if make is None:
            assert spans == [(i, i + 1) for i in range(128)]
        else:
            assert len(ids) > 128


def test_an_id_across_words_belongs_to_both() -> None:
    """A tokenizer with pieces such as ' slept near': an answer always has at least one id to get right."""
    tokenizer = byte_level(superwords=True)
    loaded = LoadedModel(SimpleNamespace(), tokenizer, "none", 10_000)  # type: ignore[arg-type]
    shared = 0
    for task in TASKS:
        for seed in range(10):
            document = tinyworld.document(task, 96, seed)
            ids, spans = encode(loaded, document)
            shared += sum(before[1] > after[0] for before, after in pairwise(spans))
            for start, end in document.answers:
                covered = tokenizer.decode(ids[spans[start][0] : spans[end - 1][1]])
                assert "".join(document.tokens[start:end]) in covered
    assert shared > 100


def test_a_tokenizer_without_a_beginning() -> None:
    tokenizer = byte_level(begin=False)
    loaded = LoadedModel(SimpleNamespace(), tokenizer, "none", 10_000)  # type: ignore[arg-type]
    document = tinyworld.document("copy", 96, 0)
    ids, spans = encode(loaded, document)
    assert tokenizer.decode(ids) == document.text and spans[0] == (0, 0)
    ((start, end),) = document.answers
    assert tokenizer.decode(ids[spans[start][0] : spans[end - 1][1]]) == document.answer_text(0)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["copy", "retrieval_singel"]}, "retrieval_singel: unknown .*did you mean 'retrieval_single'"),
        ({"tasks": []}, r"^task\.tasks: name at least one of retrieval_single, "),
        ({"length": 300}, r"^task\.length=300: 300 tokens; tiny has a context of 256$"),
        ({"length": 64, "keys": 32}, r"^task\.length=64: tinyworld: .* needs 1\d\d tokens, not 64$"),
        ({"tasks": ["common_words"], "items": 3}, "task.items=3: common_words has a most common word from 4 words on"),
    ],
)
def test_refusals(llama: LoadedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        TinyworldTask(**options).prepare(llama, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [("length", 63), ("length", 8193), ("samples", 0), ("seed", -1), ("hops", 9), ("keys", 33), ("items", 1)],
)
def test_options_check_themselves(option: str, value: int) -> None:
    with pytest.raises(UserError, match=f"^{option}={value}: must be a whole number"):
        TinyworldTask(**{option: value})


def test_logits_that_are_not_numbers_are_no_accuracy(llama: LoadedModel) -> None:
    broken = LlamaForCausalLM(llama.model.config).eval()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    loaded = LoadedModel(broken, llama.tokenizer, "broken", 256)
    task = TinyworldTask(samples=1)
    with pytest.raises(FloatingPointError, match="not numbers"):
        task.evaluate(loaded, HOW, task.prepare(loaded, None))
