"""``make docs``: the reference page, generated from the declarations, so that it cannot lag behind them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

from sparsebench.bench.command import names as benchmarks
from sparsebench.config import RUN_OPTIONS, Workspace
from sparsebench.declare import Option, Taxonomy, options_of
from sparsebench.results.record import COLUMNS
from sparsebench.results.tracking import TrackingOptions
from sparsebench.sweep.launch import ClusterOptions

_KINDS = {
    "method": "Methods",
    "task": "Tasks",
    "model": "Model kinds",
    "corpus": "Corpora (calibration and perplexity)",
}
_SETTINGS = (
    ("Where a sweep runs", "cluster.", ClusterOptions),
    ("Where records are mirrored", "tracking.", TrackingOptions),
)
_PREFIX = {"method": "method.{name}.", "task": "task.", "model": "model.", "corpus": "calibration."}


def reference() -> str:
    """The page: options of a run, every declaration with its options, the columns of a record."""
    lines = [
        "# Reference",
        "",
        "Made by `make docs` from the declarations in the code; a test checks that it is current.",
        "",
        "## Options of every run",
        "",
        *_options(RUN_OPTIONS, ""),
    ]
    for title, prefix, options in _SETTINGS:
        lines += ["", f"## {title}", "", *_options(options_of(options), prefix)]
    lines += ["", "## Benchmarks", "", "`python -m sparsebench bench <name> [option=value ...] [format=table|json]`"]
    for name in benchmarks():
        module = importlib.import_module(f"sparsebench.bench.{name}")
        lines += ["", f"### bench {name}", "", (module.__doc__ or "").strip().splitlines()[0], ""]
        lines += [*_options(options_of(module.Options), "")]
    catalogue = Workspace().catalogue
    for kind, title in _KINDS.items():
        lines += ["", f"## {title}"]
        for name, declaration in sorted(catalogue.found[kind].items()):
            lines += ["", f"### {name}", "", declaration.summary, ""]
            lines += [f"- {line}" for line in _facts(declaration.facts | {"version": declaration.version})]
            if declaration.options:
                lines += ["", *_options(declaration.options, _PREFIX[kind].format(name=name))]
    lines += ["", "## Columns of a record", "", "| column | meaning |", "|---|---|"]
    lines += [f"| `{column}` | {_cell(meaning)} |" for column, meaning in COLUMNS.items()]
    return "\n".join(lines) + "\n"


def _facts(facts: dict[str, Any]) -> Iterator[str]:
    for key, value in facts.items():
        if isinstance(value, Taxonomy):
            words = ((k, "/".join(v) if isinstance(v, tuple) else v) for k, v in vars(value).items())
            yield f"taxonomy ({value.label}): " + ", ".join(f"{k} {v}" for k, v in words)
        elif value not in (None, "", ()):
            yield f"{key}: {', '.join(map(str, value)) if isinstance(value, tuple) else value}"


def _options(options: dict[str, Option], prefix: str) -> Iterator[str]:
    yield "| option | default | valid | meaning |"
    yield "|---|---|---|---|"
    for name, spec in options.items():
        default = "" if spec.default is None else f"`{spec.default}`"
        yield f"| `{prefix}{name}` | {_cell(default)} | {_cell(spec.range)} | {_cell(spec.meaning)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
