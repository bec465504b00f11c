"""Calibration windows: the sampling rule of the pruning papers, and corpora that are files or hub data sets."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import sparsebench
from sparsebench.corpora import base, hub
from sparsebench.corpora.base import Corpus
from sparsebench.corpora.files import File, read_text
from sparsebench.corpora.hub import C4, Hub, WikiText2
from sparsebench.corpora.kjv import Kjv
from sparsebench.errors import UserError

TOKENIZER = Path(sparsebench.__file__).parent / "models" / "weights" / "tokenizer"


def reference(texts: list[str], tokenizer: Any, nsamples: int, seqlen: int, seed: int) -> torch.Tensor:
    """``get_c4`` of locuslab/wanda (lib/data.py), without the data set."""
    state = random.getstate()
    random.seed(seed)
    samples = []
    for _ in range(nsamples):
        while True:
            i = random.randint(0, len(texts) - 1)
            ids = tokenizer(texts[i])["input_ids"]
            if len(ids) > seqlen:
                break
        i = random.randint(0, len(ids) - seqlen - 1)
        samples.append(ids[i : i + seqlen])
    random.setstate(state)
    return torch.tensor(samples)


def words(text: str, **_: Any) -> dict[str, list[int]]:
    """A tokenizer: one number a word."""
    return {"input_ids": [int(word) for word in text.split()]}


@dataclass(frozen=True)
class Lengths(Corpus):
    """Document d holds ``lengths[d]`` words: d*1000, d*1000 + 1 ..."""

    lengths: tuple[int, ...] = (5, 30, 9, 12, 10, 11)

    def documents(self, split: str) -> list[str]:
        return [" ".join(str(1000 * d + w) for w in range(n)) for d, n in enumerate(self.lengths)]


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("seqlen", [4, 10, 11, 29])
def test_equals_the_papers_rule(seed: int, seqlen: int) -> None:
    corpus = Lengths(nsamples=40, seqlen=seqlen)
    found = corpus.windows(words, 64, seed)
    assert found.dtype == torch.int64 and found.shape == (40, seqlen)
    assert torch.equal(found, reference(corpus.documents("train"), words, 40, seqlen, seed))
    assert torch.equal(found, corpus.windows(words, 64, seed))
    assert torch.equal(found[:7], Lengths(nsamples=7, seqlen=seqlen).windows(words, 64, seed))


def test_the_document_must_be_longer_and_its_last_token_is_never_drawn() -> None:
    found = Lengths(nsamples=400, seqlen=10).windows(words, 64, 0)
    assert set((found // 1000).flatten().tolist()) == {1, 3, 5}  # the document of exactly 10 words is too short
    starts = found[found[:, 0] < 2000, 0] - 1000
    assert starts.min() == 0 and starts.max() == 30 - 10 - 1
    assert 29 + 1000 not in found


def test_another_seed_gives_other_windows() -> None:
    corpus = Lengths(nsamples=8, seqlen=4)
    assert not torch.equal(corpus.windows(words, 64, 0), corpus.windows(words, 64, 1))


def test_without_seqlen_the_context_is_used() -> None:
    assert Lengths(nsamples=2).windows(words, 9, 0).shape == (2, 9)


def test_kjv_with_the_real_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    found = Kjv(nsamples=6).windows(tokenizer, 1024, 3)
    assert found.shape == (6, 256)
    assert torch.equal(found, reference(Kjv().documents("train"), tokenizer, 6, 256, 3))
    train = Kjv().text("train")
    assert all(tokenizer.decode(row) in train for row in found)


def test_too_long_windows_are_refused() -> None:
    with pytest.raises(UserError, match=r"^calibration.seqlen=65: the model's context is 64 tokens$"):
        Lengths(seqlen=65).windows(words, 64, 0)
    with pytest.raises(UserError, match=r"^calibration.seqlen=30: no document is longer; the longest has 30 tokens$"):
        Lengths(seqlen=30).windows(words, 64, 0)
    with pytest.raises(UserError, match="no training documents"):
        Lengths(seqlen=30, lengths=()).windows(words, 64, 0)
    with pytest.raises(UserError, match="seqlen=1: must be a whole number >= 2"):
        Lengths(seqlen=1)


def test_gives_up_after_many_misses_in_a_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_MAX_MISSES", 50)
    assert Lengths(nsamples=500, seqlen=11).windows(words, 64, 0).shape == (500, 11)  # far more misses in all
    with pytest.raises(UserError, match="no document is longer"):
        Lengths(seqlen=30, lengths=(5,) * 100_000).windows(words, 64, 0)


def test_file_corpus(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("eins\nzwei\n\ndrei äöü\n\n\n\n  \n\nvier\n", encoding="utf-8")
    corpus = File(file=str(path))
    assert corpus.documents("train") == ["eins\nzwei", "drei äöü", "vier"]
    assert corpus.text("test") == "eins\nzwei\n\ndrei äöü\n\nvier"
    with pytest.raises(UserError, match=r"^calibration\.file: must name a text file"):
        File().documents("train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "the file is empty"),
        (b" \n\t\n", "the file is empty"),
        (b"abc\xff\xfe", r"not UTF-8 text \(byte 3\)"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^some.option={path}: {message}") as caught:
        read_text("some.option", str(path))
    assert "\n" not in str(caught.value)


def test_a_folder_or_a_stranger_s_home_is_not_a_file(tmp_path: Path) -> None:
    for path in (str(tmp_path), "~no_such_user_here/text.txt"):
        with pytest.raises(UserError, match="cannot be read"):
            read_text("some.option", path)


class Rows(dict[str, list[str]]):
    """As much of a hub data set as is used."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


def test_hub_corpora_ask_for_the_papers_data(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, subset: str | None, *, data_files: Any, split: str) -> Rows:
        asked.append((name, subset, data_files, split))
        return Rows(text=["one", "", "two"], title=["1", "2", "3"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert C4().documents("train") == ["one", "", "two"]
    assert C4().documents("validation") == ["one", "", "two"]
    assert WikiText2().text("test") == "one\n\n\n\ntwo"  # "\n\n".join of every line, as in the papers
    assert Hub(dataset="some/thing", subset="en").documents("train") == ["one", "two"]
    assert asked == [
        ("allenai/c4", None, {"train": "en/c4-train.00000-of-01024.json.gz"}, "train"),
        ("allenai/c4", None, {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "validation"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test"),
        ("some/thing", "en", None, "train"),
    ]
    with pytest.raises(UserError, match="column=words: the data set has the columns text, title"):
        Hub(dataset="some/thing", column="words").documents("train")
    with pytest.raises(UserError, match="name the data set"):
        Hub().documents("train")


def test_a_data_set_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nroute  to host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    message = r"corpus some/thing: the data set cannot be loaded \(ConnectionError: no route to host\)"
    with pytest.raises(UserError, match=message) as caught:
        hub.load("some/thing", "train")
    assert "\n" not in str(caught.value)
