"""The verb ``claims [paper ...] [store=<folder>] [format=table|json|csv]``: the ledger, for people and for programs."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from sparsebench.analysis import ledger
from sparsebench.analysis.ledger import Entry, Ledger
from sparsebench.analysis.verdicts import Verdict
from sparsebench.config import Workspace
from sparsebench.errors import UserError, closest
from sparsebench.results.store import Store

FORMATS = ("table", "json", "csv")
_WIDTH = 100  # characters of a line of the table
_INDENT = " " * 4


def run(names: Sequence[str], given: dict[str, str], default_store: Path, workspace: Workspace) -> str:
    """The ledger as text. ``names``: papers, all when empty. UserError for an unknown paper, format or option.

    A store that does not exist yet is one in which nothing was run: every claim is untested.
    """
    words = dict(given)
    format = words.pop("format", "table")
    folder = Path(words.pop("store", str(default_store))).expanduser()
    if format not in FORMATS:
        raise UserError(f"format={format}: unknown format{closest(format, FORMATS)}")
    if words:
        raise UserError(f"claims: takes only store=<folder> and format=, not {' '.join(words)}")
    store = Store(folder)
    found = ledger.build(workspace, store, names)
    if format == "json":
        return json.dumps([row(entry) for entry in found.entries], indent=1, allow_nan=False) + "\n"
    if format == "csv":
        return _csv(found)
    torn = [f"{store.torn} torn lines of the store were skipped"] if store.torn else []
    return "\n".join([*_table(found), *torn]) + "\n"


def row(entry: Entry) -> dict[str, Any]:
    """All that is known of one entry, flat but for ``parts`` (its components) and ``published``; what is not
    finite becomes null."""
    verdict = entry.verdict
    if verdict is None:
        return {**dict.fromkeys(_COLUMNS), "paper": entry.paper, "sweep": entry.sweep, "why": _NO_CLAIMS}
    claim = verdict.claim
    numbers = {name: _plain(getattr(verdict, name)) for name in _NUMBERS}
    return {
        "paper": entry.paper,
        "sweep": entry.sweep,
        "id": claim.id,
        "kind": claim.kind,
        "tiny_scale": claim.tiny_scale,
        "sentence": claim.sentence,
        "place": claim.place,
        "test": inequality(verdict),
        "verdict": verdict.verdict,
        **numbers,
        "scope": verdict.scope,
        "at": ", ".join(f"{key}={value}" for key, value in verdict.at.items()),
        "why": verdict.why,
        "published": dict(claim.published),
        "parts": [{name: _plain(value) for name, value in vars(part).items()} for part in verdict.parts],
    }


_NUMBERS = "estimate low high p_for p_against p_for_adjusted p_against_adjusted mde needed df samples seeds".split()
_COLUMNS = [*"paper sweep id kind tiny_scale sentence place test verdict".split(), *_NUMBERS, *"scope at why".split()]
_NO_CLAIMS = "the sweep states no claims"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not isfinite(value) else value


def inequality(verdict: Verdict) -> str:
    """``nll(method=magnitude) > nll(method=wanda) for all sparsity``."""
    claim = verdict.claim
    margin = (
        f" (margin {claim.margin:.3g}{' of the right side' if claim.margin_relative else ''})" if claim.margin else ""
    )
    quantifier = f"at least {claim.at_least} of" if claim.at_least else claim.quantifier
    each = f" for {quantifier} {', '.join(claim.for_each)}" if claim.for_each and not claim.monotone else ""
    along = f" along {claim.for_each[0]}" if claim.monotone else ""
    right = f" {claim.right}" if claim.right is not None else ""
    return f"{claim.left} {claim.relation}{right}{margin}{each}{along}"


def _csv(found: Ledger) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(row(entry) for entry in found.entries)
    return text.getvalue()


def _table(found: Ledger) -> list[str]:
    """A heading per paper, then each claim with its verdict, numbers, sentence and reason."""
    lines = []
    for paper in found.papers:
        lines.append(f"{paper}: {_score(found, paper) if found.of(paper) else _NO_CLAIMS}")
        for verdict in found.of(paper):
            lines += _described(verdict)
        lines += [line for note in found.notes.get(paper, []) for line in _wrapped(f"note: {note}", "  ")]
        lines.append("")
    return [*lines, f"{len(found.papers)} papers: {_score(found)}"] if len(found.papers) > 1 else lines[:-1]


def _score(found: Ledger, paper: str | None = None) -> str:
    good, counted, untested = found.headline(paper)
    if not counted:
        return "no main claim is expected to hold at this scale"
    rest = f" ({untested} untested)" if untested else ""
    return f"{good} of {counted} main claims expected at this scale reproduced{rest}"


def _described(verdict: Verdict) -> list[str]:
    claim = verdict.claim
    kind = "" if claim.kind == "main" else f", {claim.kind}"
    expected = {"yes": "", "no": ", not expected at this scale, not counted", "unsure": ", not counted"}[
        claim.tiny_scale
    ]
    lines = [f"  {verdict.verdict:<15} {claim.id}{kind}{expected}"]
    lines += _wrapped(f"{claim.sentence} ({claim.place})", _INDENT)
    if verdict.estimate is not None:
        lines += _wrapped(_numbers(verdict), _INDENT)
    return lines + _wrapped(f"why: {verdict.why}", _INDENT)


def _numbers(verdict: Verdict) -> str:
    """``effect 0.23 [0.226, 0.234], 40 samples, 1 seed: this model, this calibration``."""
    parts = [f"effect {verdict.estimate:.4g}"]
    if verdict.samples:
        parts = [f"{parts[0]} [{verdict.low:.4g}, {verdict.high:.4g}]", f"{verdict.samples} samples"]
    parts.append(f"{verdict.seeds} seed{'' if verdict.seeds == 1 else 's'}")
    return f"{', '.join(parts)}: {verdict.scope}"


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)
