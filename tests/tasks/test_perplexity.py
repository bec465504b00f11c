"""Perplexity: the protocol of the pruning papers, its error bars, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import sparsebench
from sparsebench.corpora import kjv
from sparsebench.corpora.base import Corpus
from sparsebench.corpora.hub import Hub
from sparsebench.corpora.kjv import Kjv
from sparsebench.errors import UserError
from sparsebench.models.base import LoadedModel
from sparsebench.tasks.base import Evaluation, Outcome
from sparsebench.tasks.perplexity import Perplexity

TOKENIZER = Path(sparsebench.__file__).parent / "models" / "weights" / "tokenizer"
SHORT = "\n\n".join(kjv.documents("test")[:3])
HOW = Evaluation(batch_size=2)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LoadedModel(LlamaForCausalLM(config).eval(), AutoTokenizer.from_pretrained(TOKENIZER), "tiny", 128)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(SHORT, encoding="utf-8")
    return path


def no_corpus(name: str) -> Any:
    raise AssertionError(f"corpus {name} was asked for")


def score(
    loaded: LoadedModel, task: Perplexity, how: Evaluation = HOW, corpora: Callable[[str], Any] = no_corpus
) -> Outcome:
    return task.evaluate(loaded, how, task.prepare(loaded, corpora))


def eval_ppl_wikitext(model: nn.Module, ids: torch.Tensor, seqlen: int) -> float:
    """locuslab/wanda, lib/eval.py: one window at a time, cross entropy over shifted positions."""
    nsamples = ids.numel() // seqlen
    nlls = []
    with torch.no_grad():
        for i in range(nsamples):
            inputs = ids[:, i * seqlen : (i + 1) * seqlen]
            logits = model(inputs).logits
            shift_logits, shift_labels = logits[:, :-1, :].contiguous(), inputs[:, 1:]
            loss = nn.CrossEntropyLoss()(shift_logits.reshape(-1, shift_logits.size(-1)), shift_labels.reshape(-1))
            nlls.append(loss.float() * seqlen)
    return float(torch.exp(torch.stack(nlls).sum() / (nsamples * seqlen)))


@pytest.mark.parametrize("context", [2, 33, 100, 128])
def test_equals_the_papers_code(loaded: LoadedModel, text: Path, context: int) -> None:
    windows = 200 if context == 2 else None
    ids = loaded.tokenizer(SHORT, return_tensors="pt")["input_ids"]
    ids = ids[:, : 200 * 2] if context == 2 else ids
    found = score(loaded, Perplexity(file=str(text), context=context, windows=windows))
    assert found.scores["perplexity"].value == pytest.approx(eval_ppl_wikitext(loaded.model, ids, context), rel=1e-5)
    assert list(found.scores) == ["perplexity", "nll", "bits_per_byte"]
    assert found.scores["perplexity"].n == len(found.samples) == ids.numel() // context
    assert found.notes == {"context": context}


def test_the_context_defaults_to_the_model_s(loaded: LoadedModel, text: Path) -> None:
    assert Perplexity(file=str(text)).prepare(loaded, no_corpus)["windows"].shape[1] == 128


def test_errors_samples_and_units(loaded: LoadedModel, text: Path) -> None:
    found = score(loaded, Perplexity(file=str(text), context=64))
    losses = [row["nll"] for row in found.samples]
    assert [row["sample"] for row in found.samples] == [f"window/{i}" for i in range(len(losses))]
    n = len(losses)
    mean = sum(losses) / n
    spread = sqrt(sum((loss - mean) ** 2 for loss in losses) / (n - 1) / n)
    nll, perplexity, bits = (found.scores[name] for name in ("nll", "perplexity", "bits_per_byte"))
    assert (nll.value, nll.stderr) == pytest.approx((mean, spread))
    assert (perplexity.value, perplexity.stderr) == pytest.approx((exp(mean), exp(mean) * spread))  # d exp = exp
    tokens_a_byte = len(loaded.tokenizer(SHORT)["input_ids"]) / len(SHORT.encode())
    assert (bits.value, bits.stderr) == pytest.approx((mean / log(2) * tokens_a_byte, spread / log(2) * tokens_a_byte))


def test_one_window_has_no_error(loaded: LoadedModel, text: Path) -> None:
    found = score(loaded, Perplexity(file=str(text), context=64, windows=1))
    assert [(s.stderr, s.n) for s in found.scores.values()] == [(None, 1)] * 3


def test_windows_takes_the_first_ones_and_batches_change_nothing(loaded: LoadedModel, text: Path) -> None:
    whole = score(loaded, Perplexity(file=str(text), context=32))
    first = score(loaded, Perplexity(file=str(text), context=32, windows=5), Evaluation(batch_size=1))
    assert [row["nll"] for row in first.samples] == pytest.approx([row["nll"] for row in whole.samples[:5]], rel=1e-5)
    done: list[tuple[int, int]] = []
    score(loaded, Perplexity(file=str(text), context=128, windows=5), Evaluation(1, lambda *at: done.append(at)))
    assert done == [(4, 5), (5, 5)]


def test_uniform_and_broken_models(loaded: LoadedModel, text: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(loaded.model.config).eval()
    flat = LoadedModel(model, loaded.tokenizer, "flat", 128)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    assert score(flat, Perplexity(file=str(text))).scores["perplexity"].value == pytest.approx(1024, rel=1e-4)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    value = score(flat, Perplexity(file=str(text))).scores["perplexity"].value
    assert value != value or value == float("inf")  # never a finite number: the run fails


@pytest.mark.parametrize(("prefill", "step"), [(None, 0), (1, 0), (16, 7), (31, 1), (63, 0)])
def test_continuation_scores_the_rest_of_each_window(
    loaded: LoadedModel, text: Path, prefill: int | None, step: int
) -> None:
    task = Perplexity(file=str(text), context=64, windows=6, protocol="continuation", prefill=prefill, step=step)
    found = score(loaded, task)
    start = prefill or 32
    for row, window in zip(found.samples, task.prepare(loaded, no_corpus)["windows"], strict=True):
        with torch.no_grad():
            scores = loaded.model(input_ids=window[None]).logits[0].log_softmax(-1)
        wanted = [-float(scores[place - 1, window[place]]) for place in range(start, 64)]
        assert row["nll"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)


def test_corpora_are_joined_by_blank_lines(loaded: LoadedModel) -> None:
    class Lines(Corpus):
        def documents(self, split: str) -> list[str]:
            return [f"{split} one", "", "two"]

    asked: list[str] = []

    def corpora(name: str) -> Any:
        asked.append(name)
        return Lines

    assert Perplexity(corpus="lines", split="validation").text(corpora) == "validation one\n\n\n\ntwo"
    assert asked == ["lines"]
    assert Perplexity().text(lambda name: {"kjv": Kjv}[name]) == Kjv().text("test")


def test_hub_options_reach_the_hub_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "documents", lambda self, split: [f"{self.dataset}/{self.subset}/{self.column}/{split}"])
    task = Perplexity(corpus="hub", dataset="some/thing", subset="en", split="train")
    assert task.text(lambda name: {"hub": Hub}[name]) == "some/thing/en/text/train"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read \(No such file or directory\)"),
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"Jesus wept \xe9", r"not UTF-8 text \(byte 11\)"),
        (b"Jesus wept.", r"has 4 tokens, fewer than one window of 128 \(task.context=\)"),
    ],
)
def test_bad_files(loaded: LoadedModel, tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^task\.file={path}: {message}$") as caught:
        Perplexity(file=str(path)).prepare(loaded, no_corpus)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 129}, r"^task\.context=129: tiny has a context of 128 tokens$"),
        (
            {"protocol": "continuation", "prefill": 64, "context": 64},
            r"^task\.prefill=64: must be below the window of 64",
        ),
        ({"prefill": 8}, r"^task\.prefill=8: goes with task\.protocol=continuation, not windows$"),
        ({"step": 1}, r"^task\.step=1: goes with task\.protocol=continuation, not windows$"),
        ({"file": None, "corpus": "file"}, r"^task\.corpus=file: name the text with task\.file=<path>$"),
        ({"file": None, "subset": "en"}, r"^task\.subset: goes with task\.corpus=hub, not kjv$"),
    ],
)
def test_refusals(loaded: LoadedModel, text: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Perplexity(**{"file": str(text), **options}).prepare(loaded, no_corpus)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "context=1: must be a whole number >= 2"),
        ({"windows": 0}, "windows=0: must be a whole number >= 1"),
        ({"protocol": "sliding"}, "protocol=sliding: not a choice"),
        ({"split": "tset"}, "split=tset: not a choice; did you mean 'test'"),
        ({"step": -1}, "step=-1: must be a whole number >= 0"),
    ],
)
def test_options_check_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Perplexity(**options)
