"""A user's own text file as a corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsebench.corpora.base import Corpus
from sparsebench.declare import corpus, option
from sparsebench.errors import UserError


def read_text(option_name: str, path: str) -> str:
    """The file's text. UserError naming the option when it is missing, empty or not UTF-8."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{option_name}={path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{option_name}={path}: cannot be read ({error.strerror})") from None
    except RuntimeError as error:  # what pathlib raises for the home folder of a user that does not exist
        raise UserError(f"{option_name}={path}: cannot be read ({error})") from None
    if not text.strip():
        raise UserError(f"{option_name}={path}: the file is empty")
    return text


@corpus(name="file", version=1)
@dataclass(frozen=True)
class File(Corpus):
    """A UTF-8 text file; blank lines separate its documents."""

    file: str | None = option(None, "path of the text file", unit="file")

    def documents(self, split: str) -> list[str]:
        if self.file is None:
            raise UserError("calibration.file: must name a text file when calibration=file")
        parts = [part.strip() for part in read_text("calibration.file", self.file).split("\n\n")]
        return [part for part in parts if part]
