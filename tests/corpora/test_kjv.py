"""The King James text: whole, and its split fixed for ever."""

from __future__ import annotations

import gzip
import hashlib
from importlib import resources

import pytest

from sparsebench.corpora import kjv
from sparsebench.corpora.kjv import Kjv
from sparsebench.errors import UserError

# sha256 of the chapter names of a split, one a line: changing a split would make old records lie.
NAMES = {
    "train": "761d41185729dd74c6b46b379119b43f6e4b6e8585e3bd3d4d7cf52f919f81ac",
    "validation": "efb1ee0bad5c47a5369d081e563fb1e53f4f3c7b4b75e9b10e04a2248b39d5b2",
    "test": "b43a43e766132741262fabc19525597c950fe167368d5ca49247d7f6f242d139",
}


def names(split: str) -> list[str]:
    return [name for name in kjv.chapters() if kjv.split_of(name) == split]


def test_has_every_verse_and_chapter() -> None:
    assert len(kjv.chapters()) == 1189
    assert sum(len(text.splitlines()) for text in kjv.chapters().values()) == 31_102


def test_text_is_the_file_without_references() -> None:
    packed = resources.files("sparsebench").joinpath("data/kjv.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()
    verses = [verse for text in kjv.chapters().values() for verse in text.splitlines()]
    assert verses == [line.split(" ", 1)[1] for line in lines]
    assert kjv.chapters()["Ge1"].startswith("In the beginning God created the heaven and the earth.\nAnd the earth")
    assert next(iter(kjv.chapters())) == "Ge1"
    assert verses.count("Jesus wept.") == 1


@pytest.mark.parametrize("split", kjv.SPLITS)
def test_split_is_fixed(split: str) -> None:
    assert hashlib.sha256("\n".join(names(split)).encode()).hexdigest() == NAMES[split]
    assert Kjv().documents(split) == [kjv.chapters()[name] for name in names(split)]
    assert Kjv().text(split) == "\n\n".join(Kjv().documents(split))


def test_splits_are_about_90_5_5_and_share_no_chapter() -> None:
    size = {split: sum(map(len, kjv.documents(split))) for split in kjv.SPLITS}
    total = sum(size.values())
    assert total == sum(map(len, kjv.chapters().values()))
    assert 0.89 < size["train"] / total < 0.92
    assert 0.04 < size["validation"] / total < 0.06
    assert 0.04 < size["test"] / total < 0.06
    assert sum(len(set(names(split))) for split in kjv.SPLITS) == len(set().union(*map(names, kjv.SPLITS))) == 1189
    assert not set(kjv.documents("train")) & {*kjv.documents("validation"), *kjv.documents("test")}


def test_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="split must be one of train, validation, test, not 'dev'"):
        kjv.documents("dev")
    with pytest.raises(UserError, match="nsamples=0: must be a whole number >= 1"):
        Kjv(nsamples=0)
