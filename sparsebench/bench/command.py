"""The verb ``bench``."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

import sparsebench.bench
from sparsebench.bench.base import Report, bound
from sparsebench.config import parse_values
from sparsebench.declare import options_of
from sparsebench.errors import UserError, closest

_NOT_BENCHMARKS = ("base", "command", "naive", "peaks", "synthetic")


def names() -> list[str]:
    """The benchmarks there are: the modules of this package that hold ``Options`` and ``run``."""
    found = (module.name for module in pkgutil.iter_modules(sparsebench.bench.__path__))
    return sorted(name for name in found if name not in _NOT_BENCHMARKS)


def run(words: Sequence[str], given: dict[str, str]) -> str:
    """``bench <name> [option=value ...] [format=table|json]``: the report as text. UserError on bad input."""
    known = names()
    if not words:
        return "\n".join(f"bench {name:<10} {_summary(name)}" for name in known) + "\n"
    if len(words) > 1 or words[0] not in known:
        raise UserError(f"bench {' '.join(words)}: unknown benchmark{closest(words[0], known)}")
    format = given.pop("format", "table")
    if format not in ("table", "json"):
        raise UserError(f"format={format}: valid: table, json")
    if given.get("threads", "1") != "1":
        bound()
    module = importlib.import_module(f"sparsebench.bench.{words[0]}")
    report = module.run(_options(module, words[0], given), _say)
    return _json(report) if format == "json" else _table(report)


def _summary(name: str) -> str:
    doc = importlib.import_module(f"sparsebench.bench.{name}").__doc__ or ""
    return doc.strip().splitlines()[0]


def _options(module: Any, name: str, given: dict[str, str]) -> Any:
    valid = options_of(module.Options)
    found = {}
    for key, values in parse_values([f"{key}={value}" for key, value in given.items()]).items():
        if key not in valid:
            raise UserError(f"{key}: unknown option of bench {name}{closest(key, valid)}")
        if len(values) != 1:
            raise UserError(f"{key}: takes one value; a list is written {key}=[1,2]")
        found[key] = valid[key].check(key, values[0])
        if found[key] == () and valid[key].default:
            raise UserError(f"{key}=[]: needs at least one value")
    return module.Options(**found)


def _say(text: str) -> None:
    print(f"sparsebench: {text}", file=sys.stderr)


def _json(report: Report) -> str:
    return json.dumps({"rows": report.rows, "facts": report.facts, "notes": report.notes}, indent=2) + "\n"


def _table(report: Report) -> str:
    lines = ["  ".join(f"{key}: {value}" for key, value in report.facts.items())] if report.facts else []
    keys = list(dict.fromkeys(key for row in report.rows for key in row))
    cells = [keys, *([_cell(row.get(key)) for key in keys] for row in report.rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(keys))]
    lines += ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*lines, *report.notes]) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
