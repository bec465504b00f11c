"""Corpora from the Hugging Face hub: C4 and WikiText-2 as the pruning papers use them, or any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsebench.corpora.base import Corpus
from sparsebench.declare import corpus, option
from sparsebench.errors import UserError


def load(dataset: str, split: str, *, subset: str | None = None, files: str | None = None) -> Any:
    """A split of a hub data set. UserError when it cannot be had (no network, no such name)."""
    from datasets import load_dataset

    try:
        return load_dataset(dataset, subset, data_files={split: files} if files else None, split=split)
    except Exception as error:  # the library raises many kinds: connection, file system, missing configuration
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"corpus {dataset}: the data set cannot be loaded ({type(error).__name__}: {reason}); it needs the hub "
            "or a local cache; offline, kjv, tinyworld and file work"
        ) from None


@corpus(name="hub", version=1)
@dataclass(frozen=True)
class Hub(Corpus):
    """Any hub data set with a text column."""

    dataset: str | None = option(None, "name of the data set on the hub, or a local folder")
    subset: str | None = option(None, "its configuration, where it has several")
    column: str = option("text", "the column that holds the text")

    def documents(self, split: str) -> list[str]:
        if self.dataset is None:
            raise UserError("corpus hub: name the data set (calibration.dataset=... or task.dataset=...)")
        rows = load(self.dataset, split, subset=self.subset)
        if self.column not in rows.column_names:
            raise UserError(f"column={self.column}: the data set has the columns {', '.join(rows.column_names)}")
        return [text for text in rows[self.column] if text.strip()]


@corpus(name="c4", version=1)
@dataclass(frozen=True)
class C4(Corpus):
    """C4 English, first shard of the train split: the calibration data of the pruning papers."""

    def documents(self, split: str) -> list[str]:
        shard = "en/c4-train.00000-of-01024.json.gz" if split == "train" else "en/c4-validation.00000-of-00008.json.gz"
        rows = load("allenai/c4", "train" if split == "train" else "validation", files=shard)
        return list(rows["text"])


@corpus(name="wikitext2", version=1)
@dataclass(frozen=True)
class WikiText2(Corpus):
    """WikiText-2 raw: the evaluation text of the pruning papers (lines joined by blank lines)."""

    def documents(self, split: str) -> list[str]:
        return list(load("Salesforce/wikitext", split, subset="wikitext-2-raw-v1")["text"])
