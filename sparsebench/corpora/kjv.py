"""The King James text (public domain): 31,102 verses of real English, split by chapter.

A chapter is one document; its verses are joined by newlines and carry no references. Chapters
are dealt to train / validation / test (90 / 5 / 5 %) by a fixed hash of their name, so that the
split never depends on an order, a seed or a library.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from sparsebench.corpora.base import Corpus
from sparsebench.declare import corpus, option

SPLITS = ("train", "validation", "test")
_REFERENCE = re.compile(r"^(?P<chapter>\d?[A-Za-z]+\d+):\d+ (?P<text>.*)$")


def split_of(chapter: str) -> str:
    """The split a chapter (for example ``Ge1``) belongs to."""
    bucket = int(hashlib.sha256(chapter.encode()).hexdigest(), 16) % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "test"


@lru_cache(maxsize=1)
def chapters() -> dict[str, str]:
    """Chapter name -> its text, in the order of the book."""
    packed = resources.files("sparsebench").joinpath("data/kjv.txt.gz").read_bytes()
    verses: dict[str, list[str]] = {}
    for line in gzip.decompress(packed).decode("utf-8").splitlines():
        match = _REFERENCE.match(line)
        if match is None:
            raise ValueError(f"kjv: a line without a reference: {line[:60]!r}")
        verses.setdefault(match["chapter"], []).append(match["text"])
    return {name: "\n".join(lines) for name, lines in verses.items()}


def documents(split: str) -> list[str]:
    """The chapters of one split (``train``, ``validation`` or ``test``)."""
    if split not in SPLITS:
        raise ValueError(f"kjv: split must be one of {', '.join(SPLITS)}, not {split!r}")
    return [text for name, text in chapters().items() if split_of(name) == split]


@corpus(name="kjv", version=1)
@dataclass(frozen=True)
class Kjv(Corpus):
    """The King James text, public domain, shipped with the package."""

    seqlen: int | None = option(256, "tokens of a calibration sequence; the model's context if not given", low=2)

    def documents(self, split: str) -> list[str]:
        return documents(split)
