"""The harness bridge: exact likelihoods through the cache, our own tasks offline, clear refusals."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

import sparsebench
from sparsebench.corpora import tinyworld
from sparsebench.errors import UserError
from sparsebench.models.base import LoadedModel
from sparsebench.tasks import lm_eval as bridge_task
from sparsebench.tasks.base import Evaluation, Outcome
from sparsebench.tasks.harness import documents
from sparsebench.tasks.harness.bridge import CachedLM
from sparsebench.tasks.lm_eval import LmEval
from sparsebench.tasks.lm_eval_score import LmEvalScore

TOKENIZER = Path(sparsebench.__file__).parent / "models" / "weights" / "tokenizer"
CONTEXT = 128
BOOLEANS = """
task: my_booleans
custom_dataset: !function docs.dataset
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: [" true", " not so"]
doc_to_target: label
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 2}
"""
GENERATED = """
task: my_echo
custom_dataset: !function docs.dataset
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""
ROLLING = """
task: my_text
custom_dataset: !function docs.dataset
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list: [{metric: word_perplexity}]
metadata: {version: 1}
"""
SCORED = """
task: my_overlap
custom_dataset: !function docs.sized
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
process_results: !function docs.overlap
generation_kwargs: {until: [], max_gen_toks: 4, do_sample: false, temperature: 1}
metric_list:
  - {metric: overlap, aggregation: mean, higher_is_better: true}
  - {metric: "96", aggregation: !function docs.kept, higher_is_better: true}
  - {metric: length, aggregation: mean, higher_is_better: false}
  - {metric: corpus, aggregation: !function docs.pairs, higher_is_better: true}
metadata: {version: 3}
"""
DOCS = """
from datasets import Dataset
def sized(max_seq_lengths=(), tokenizer="", **_):
    rows = [{"question": f"David saw the lamp {i}", "answer": "x", "size": size, "tokenizer": tokenizer}
            for size in max_seq_lengths or [0] for i in range(6)]
    return {"test": Dataset.from_list(rows)}
def overlap(doc, results):
    share = len(doc["question"]) % 3 / 2
    own = {str(doc["size"]): share} if doc["size"] else {}
    return {"overlap": share, "length": len(results[0]), "corpus": (share, 2), **own}
def kept(values):
    return sum(values) / len(values)
def pairs(values):
    return sum(a * b for a, b in values) / 12
def dataset(**_):
    rows = [{"question": f"David saw the {word}, ask {i}:", "label": i % 2, "answer": "x"}
            for i, word in enumerate(["lamp", "old sword", "ring", "bread and salt", "bow"])]
    return {"test": Dataset.from_list(rows)}
"""


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    return LoadedModel(LlamaForCausalLM(config).eval(), tokenizer, "random", CONTEXT)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def own(tmp_path: Path) -> str:
    for name, text in {
        "b.yaml": BOOLEANS,
        "g.yaml": GENERATED,
        "r.yaml": ROLLING,
        "s.yaml": SCORED,
        "docs.py": DOCS,
    }.items():
        (tmp_path / name).write_text(text)
    hub = BOOLEANS.replace("my_booleans", "my_hub")
    (tmp_path / "h.yaml").write_text(hub.replace("custom_dataset: !function docs.dataset", "dataset_path: no/thing"))
    (tmp_path / "group.yaml").write_text(
        "group: my_group\ntask: [my_booleans, tinyworld_copy]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return str(tmp_path)


def _run(task: LmEval, loaded: LoadedModel, batch_size: int = 4) -> Outcome:
    return task.evaluate(loaded, Evaluation(batch_size), task.prepare(loaded, None))


def _requests(pairs: list[tuple[Any, ...]]) -> list[Any]:
    return [SimpleNamespace(args=pair, task_name="test") for pair in pairs]


def _pairs(seed: int, count: int) -> list[tuple[str, str]]:
    """Contexts of several lengths, many of them equal, some shared by several continuations."""
    rng = random.Random(seed)
    words = [word for word in tinyworld.vocabulary() if word.startswith(" ")]
    pairs = [("", " David saw"), ("", " the")]
    while len(pairs) < count:
        context = "".join(rng.choices(words, k=rng.choice([1, 2, 9, 9, 30])))
        pairs += [(context, "".join(rng.choices(words, k=rng.choice([1, 1, 2, 5])))) for _ in range(rng.choice([1, 4]))]
    return pairs


@torch.no_grad()
def _full_forward(loaded: LoadedModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    tokens = torch.tensor([context + continuation])
    logits = loaded.model(tokens[:, :-1]).logits[0, -len(continuation) :].float()
    target = tokens[0, -len(continuation) :]
    chosen = logits.log_softmax(-1).gather(1, target[:, None]).sum()
    return float(chosen), bool((logits.argmax(-1) == target).all())


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("add_bos", [None, True])
def test_likelihoods_equal_one_full_forward(loaded: LoadedModel, batch_size: int, add_bos: bool | None) -> None:
    seen: list[tuple[int, int]] = []
    how = Evaluation(batch_size, lambda done, total: seen.append((done, total)))
    lm = CachedLM(loaded, how, add_bos)
    pairs = _pairs(0, 40)
    answers = lm.loglikelihood(_requests(pairs))
    for (context, continuation), (value, greedy) in zip(pairs, answers, strict=True):
        before = lm.tok_encode(context) if context else [0]
        assert (before[0] == 0) == (bool(add_bos) or not context)
        after = loaded.tokenizer.encode(continuation, add_special_tokens=False)
        expected, best = _full_forward(loaded, before, after)
        assert value == pytest.approx(expected, abs=1e-4) and greedy == best
    assert seen[-1] == (len(pairs), len(pairs))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_likelihoods_agree_with_the_harness_own_model(loaded: LoadedModel) -> None:
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4, max_length=CONTEXT)
    pairs = _pairs(5, 20)
    expected = theirs.loglikelihood(_requests(pairs), disable_tqdm=True)
    answers = CachedLM(loaded, Evaluation(4)).loglikelihood(_requests(pairs))
    assert [value for value, _ in answers] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]


def test_greedy_continuation_is_recognised(loaded: LoadedModel) -> None:
    lm = CachedLM(loaded, Evaluation())
    context = loaded.tokenizer.encode(" David saw the lamp")
    new = loaded.model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    greedy = new[0, len(context) :].tolist()
    other = [*greedy[:2], (greedy[2] + 1) % 1024]
    answers = lm._loglikelihood_tokens([(None, context, greedy), (None, context, other), (None, context, greedy[:1])])
    assert [best for _, best in answers] == [True, False, True]


def test_long_contexts_are_cut_from_the_left(loaded: LoadedModel) -> None:
    lm = CachedLM(loaded, Evaluation())
    context, continuation = [random.Random(1).randrange(1024) for _ in range(3 * CONTEXT)], [5, 6]
    (answer,) = lm._loglikelihood_tokens([(None, context, continuation)])
    expected = _full_forward(loaded, context[-(CONTEXT - 1) :], continuation)
    assert answer[0] == pytest.approx(expected[0], abs=1e-4)
    with pytest.raises(UserError, match="context only 128"):
        lm._loglikelihood_tokens([(None, context, [1] * (CONTEXT + 1))])


def test_everything_scored_goes_through_the_cache_and_no_row_is_padded(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    forward = loaded.model.forward

    def watched(input_ids: torch.Tensor, cache: Any = None, **kwargs: Any) -> Any:
        assert "attention_mask" not in kwargs
        calls.append((input_ids.shape[1], 0 if cache is None else cache.get_seq_length()))
        return forward(input_ids=input_ids, cache=cache, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", watched)
    context = list(range(10, 20))
    CachedLM(loaded, Evaluation())._loglikelihood_tokens([(None, context, [7]), (None, context, [7, 8, 9])])
    assert calls == [(9, 0), (1, 9), (3, 9)]


class _ForeignLayer(DynamicLayer):
    """A method's own layer with state by row that inherits the selection: rows must not be taken from it."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise AssertionError("rows were repeated")


def test_a_foreign_cache_layer_is_run_one_context_at_a_time(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = loaded.model.forward

    def with_own_cache(input_ids: torch.Tensor, cache: Any = None, **kwargs: Any) -> Any:
        rows.append(input_ids.shape[0])
        if cache is None and kwargs["use_cache"]:
            cache = DynamicCache()
            cache.layers = [_ForeignLayer() for _ in range(2)]
        return forward(input_ids=input_ids, cache=cache, **kwargs)

    pairs = _pairs(3, 20)[2:]
    expected = CachedLM(loaded, Evaluation(8)).loglikelihood(_requests(pairs))
    monkeypatch.setattr(loaded.model, "forward", with_own_cache)
    answers = CachedLM(loaded, Evaluation(8)).loglikelihood(_requests(pairs))
    assert [a for a, _ in answers] == pytest.approx([a for a, _ in expected], abs=1e-4)
    assert set(rows) == {1}


def test_rolling_scores_each_token_once(loaded: LoadedModel) -> None:
    text = "".join(tinyworld.document("copy", 300, 0).tokens[1:])
    tokens = loaded.tokenizer.encode(text)
    (value,) = CachedLM(loaded, Evaluation()).loglikelihood_rolling(_requests([(text,)]))
    starts = [0, CONTEXT]  # then the last window, filled up with context from the left
    expected = sum(
        _full_forward(loaded, [tokens[start - 1] if start else 0], tokens[start : start + CONTEXT])[0]
        for start in starts
    )
    last = len(tokens) - 2 * CONTEXT
    expected += _full_forward(loaded, tokens[-CONTEXT - 1 : -last], tokens[-last:])[0]
    assert value == pytest.approx(expected, abs=1e-3)


def test_generation_is_greedy_and_stops(loaded: LoadedModel) -> None:
    prompts = [" David saw", " Moses sold the", " the lamp"]
    lm = CachedLM(loaded, Evaluation(2))
    free = lm.generate_until(_requests([(text, {"until": [], "max_gen_toks": 6}) for text in prompts]))
    for text, found in zip(prompts, free, strict=True):
        ids = torch.tensor([loaded.tokenizer.encode(text)])
        alone = loaded.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert found == loaded.tokenizer.decode(alone, skip_special_tokens=True)
    stop = free[0][3:5]
    (stopped,) = lm.generate_until(_requests([(prompts[0], {"until": [stop], "max_gen_toks": 6})]))
    assert stopped == free[0].split(stop)[0]
    with pytest.raises(UserError, match="greedy"):
        lm.generate_until(_requests([("x", {"do_sample": True, "temperature": 1.0})]))
    with pytest.raises(UserError, match="context has 128"):
        lm.generate_until(_requests([("x", {"max_gen_toks": 500})]))


@pytest.mark.parametrize("name", list(tinyworld.TASKS))
def test_documents_are_multiple_choice_with_one_right_answer(name: str) -> None:
    found = documents.documents(name, 128, 20)
    assert found == documents.documents(name, 128, 20)
    queries = tinyworld.DEFAULTS[name].queries
    assert len(found) == 20 * queries
    for entry in found:
        document = tinyworld.document(name, 128, entry["seed"])
        assert len(set(entry["choices"])) == 4
        assert entry["choices"][entry["gold"]] == document.answer_text(entry["question"])
        assert document.text.startswith(entry["context"]) and not entry["context"].endswith(" ")
    assert len({entry["gold"] for entry in found}) == 4


def test_choices_have_as_many_tokens_as_the_answer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    for name in tinyworld.TASKS:
        for entry in documents.documents(name, 128, 5):
            assert len({len(tokenizer.encode(choice)) for choice in entry["choices"]}) == 1


def test_tinyworld_through_the_harness(loaded: LoadedModel, no_network: None, capfd: Any) -> None:
    state = random.getstate()
    outcome = _run(LmEval(tinyworld_length=96, tinyworld_samples=3, add_bos=True), loaded)
    assert random.getstate() == state
    assert capfd.readouterr() == ("", "")
    names = [f"tinyworld_{name}" for name in tinyworld.TASKS]
    assert next(iter(outcome.scores)) == "acc"
    assert set(outcome.scores) == {"acc", *(f"acc/{name}" for name in names)}
    per_task = [outcome.scores[f"acc/{name}"] for name in names]
    mean, errors = outcome.scores["acc"], [score.stderr or 0.0 for score in per_task]
    assert mean.value == pytest.approx(sum(score.value for score in per_task) / 8)
    assert mean.stderr == pytest.approx(sum(error**2 for error in errors) ** 0.5 / 8)
    assert mean.n == len(outcome.samples) == 3 * (7 + 4)
    assert len({row["sample"] for row in outcome.samples}) == len(outcome.samples)
    for name in names:
        rows = [row for row in outcome.samples if row["task"] == name]
        assert {row["correct"] for row in rows} <= {0.0, 1.0}
        assert sum(row["correct"] for row in rows) / len(rows) == pytest.approx(outcome.scores[f"acc/{name}"].value)
    assert outcome.samples[0]["sample"].endswith("/0")
    assert outcome.notes["lm_eval_version"] and "tinyworld_copy:1" in outcome.notes["lm_eval_tasks"]


def test_batch_size_does_not_change_the_outcome(loaded: LoadedModel) -> None:
    task = LmEval(
        tasks=("tinyworld_two_hop", "tinyworld_arithmetic"), tinyworld_length=96, tinyworld_samples=10, limit=6
    )
    one, many = _run(task, loaded, 1), _run(task, loaded, 16)
    assert one.samples == many.samples and len(one.samples) == 12


def test_prepared_tasks_can_be_evaluated_again(loaded: LoadedModel, own: str) -> None:
    task = LmEval(tasks=("my_booleans",), include_path=own, num_fewshot=2)
    prepared = task.prepare(loaded, None)
    first, again = (task.evaluate(loaded, Evaluation(), prepared) for _ in range(2))
    assert first == again and len(first.samples) == 5


def test_own_tasks(loaded: LoadedModel, own: str, no_network: None) -> None:
    task = LmEval(tasks=("my_booleans", "my_echo", "my_text"), include_path=own)
    outcome = _run(task, loaded)
    assert {"acc", "acc/my_booleans", "acc_norm/my_booleans", "exact_match/my_echo"} < set(outcome.scores)
    assert outcome.scores["acc"].n == 10
    assert outcome.scores["word_perplexity/my_text"].value > 1
    row = next(row for row in outcome.samples if row["sample"] == "my_booleans/4")
    assert {row["correct"], row["acc_norm"]} <= {0.0, 1.0}
    assert "my_booleans:2" in outcome.notes["lm_eval_tasks"]


def test_a_group_is_one_task_with_its_documents_pooled(loaded: LoadedModel, own: str) -> None:
    task = LmEval(tasks=("my_group", "my_booleans"), include_path=own, tinyworld_length=96, tinyworld_samples=3)
    outcome = _run(task, loaded)
    assert set(outcome.scores) == {"acc", "acc/my_group", "acc/my_booleans", "acc_norm/my_booleans"}
    assert outcome.scores["acc/my_group"].n == 8
    correct = [row["correct"] for row in outcome.samples]
    assert len(correct) == 8 and outcome.scores["acc/my_group"].value == pytest.approx(sum(correct) / 8)


def test_refusals(loaded: LoadedModel, own: str, no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad, message in [
        ({"tasks": ()}, r"task.tasks=\[\]: name at least one"),
        ({"include_path": own + "/none"}, "task.include_path=.*: no such folder"),
        ({"limit": 0}, "limit=0"),
        ({"tinyworld_length": 63}, "tinyworld_length=63"),
    ]:
        with pytest.raises(UserError, match=message):
            LmEval(**bad)
    with pytest.raises(UserError, match=r"task.tinyworld_length=256: the model's context has 128 tokens"):
        LmEval().prepare(loaded, None)
    with pytest.raises(UserError, match=r"task.tasks=my_text: none reports an accuracy"):
        LmEval(tasks=("my_text",), include_path=own).prepare(loaded, None)
    monkeypatch.setattr("datasets.load_dataset", _unreachable)
    task = LmEval(tasks=("my_hub",), include_path=own, limit=2)
    with pytest.raises(
        UserError, match=r"^task.tasks=my_hub: its data set needs a network or a local cache: no route$"
    ):
        task.prepare(loaded, None)


def _unreachable(*_: Any, **__: Any) -> None:
    raise ConnectionError("no route\nand more lines")


def test_an_unknown_task_names_the_closest(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    monkeypatch.setattr(bridge_task, "_manager", bridge_task._manager.__wrapped__)  # no stand-in may stay cached
    real = lm_eval.tasks.TaskManager
    # the harness's own index takes many seconds to read: our tasks stand for it here
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_defaults, **kw: real(include_defaults=False, **kw))
    with pytest.raises(UserError, match=r"task.tasks=tinyworld_cpoy: unknown harness task; did you mean"):
        LmEval(tasks=("tinyworld_cpoy",), limit=3).prepare(loaded, None)
    with pytest.raises(UserError, match=r"task.tasks=zzz: unknown harness task; 'lm-eval ls tasks' lists"):
        LmEval(tasks=("zzz",), limit=3).prepare(loaded, None)
    LmEval(tasks=("tinyworld",), tinyworld_length=64).prepare(loaded, None)


def test_other_metrics_than_accuracies(loaded: LoadedModel, own: str, no_network: None) -> None:
    task = LmEvalScore(tasks=("my_overlap", "my_echo", "my_booleans"), metrics=("overlap", "exact_match", "acc_norm"),
                       include_path=own)  # fmt: skip
    outcome = _run(task, loaded)
    names = ["score", "overlap/my_overlap", "exact_match/my_echo", "acc_norm/my_booleans"]
    assert list(outcome.scores) == names
    score = outcome.scores["score"]
    assert score.value == pytest.approx(sum(outcome.scores[name].value for name in names[1:]) / 3)
    assert score.stderr is not None and score.n == len(outcome.samples) == 6 + 5 + 5
    rows = [row["score"] for row in outcome.samples if row["task"] == "my_overlap"]
    assert sum(rows) / 6 == pytest.approx(outcome.scores["overlap/my_overlap"].value)


def test_a_metric_over_all_documents_has_no_outcomes(loaded: LoadedModel, own: str) -> None:
    outcome = _run(LmEvalScore(tasks=("my_overlap",), metrics=("corpus",), include_path=own), loaded)
    score = outcome.scores["score"]
    assert score.stderr is None and score.value == outcome.scores["corpus/my_overlap"].value
    assert len(outcome.samples) == 6 and all("score" not in row for row in outcome.samples)


def test_tasks_that_make_their_prompts_are_told_length_and_tokenizer(loaded: LoadedModel, own: str) -> None:
    task = LmEvalScore(tasks=("my_overlap",), length=96, include_path=own)
    prepared = task.prepare(loaded, None)
    document = prepared["my_overlap"]["my_overlap"].dataset["test"][0]
    assert (document["size"], document["tokenizer"]) == (96, str(loaded.tokenizer.name_or_path))
    outcome = task.evaluate(loaded, Evaluation(), prepared)
    assert list(outcome.scores) == ["score", "96/my_overlap"]


def test_metrics_that_cannot_be_scored_are_refused(loaded: LoadedModel, own: str, no_network: None) -> None:
    for bad, message in [
        ({"metrics": ()}, r"task.metrics=\[\]: name at least one metric"),
        (
            {"tasks": ("my_echo",), "metrics": ("f1", "rouge")},
            r"task.metrics=\[f1,rouge\]: my_echo reports exact_match",
        ),
        ({"tasks": ("my_overlap",), "metrics": ("length",)}, "length of my_overlap is not better when it is higher"),
        ({"tasks": ("my_text",), "metrics": ("word_perplexity",)}, "word_perplexity of my_text is not better"),
        (
            {"tasks": ("my_overlap",), "metrics": ("rouge",), "length": 100},
            "task.length=100: my_overlap is scored at a length of 96",
        ),
        ({"tasks": ("my_overlap",), "length": 129}, "task.length=129: the model's context has 128"),
    ]:
        with pytest.raises(UserError, match=message):
            LmEvalScore(**{"include_path": own, **bad}).prepare(loaded, None)
