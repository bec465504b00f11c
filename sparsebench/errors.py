"""The one error type for what a user can mend, and the closest-match hint it carries."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: shown as one line on stderr, exit code 2, nothing started, nothing stored."""


class Mistakes(UserError):
    """Several mistakes found at once: a heading and a line for each."""

    def __init__(self, heading: str, lines: list[str], most: int = 20) -> None:
        more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
        super().__init__("\n  ".join([heading, *lines[:most], *more]))


def closest(name: str, valid: Iterable[str]) -> str:
    """``"; did you mean 'wanda'?"`` or the list of valid names, to end an error message with."""
    names = sorted(valid)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else f"; valid: {', '.join(names) or 'none'}"
