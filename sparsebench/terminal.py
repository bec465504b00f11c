"""What the terminal shows: progress on stderr, lists, one run's summary."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from sparsebench.catalogue import Declaration
from sparsebench.config import RUN_OPTIONS, Workspace
from sparsebench.declare import TARGETS, Option
from sparsebench.errors import UserError, closest
from sparsebench.paths import data_folder

_GROUP = {"methods": "method", "models": "model", "tasks": "task", "corpora": "calibration"}
LISTS = (*_GROUP, "sweeps")

Row = dict[str, str]
_PHASES = ("prefill", "decode")


class Reporter:
    """Progress with an estimate, on stderr; silent when that is not a terminal."""

    def __init__(self, runs: int) -> None:
        self.runs, self.done, self.live = runs, 0, sys.stderr.isatty()

    def __enter__(self) -> Reporter:
        if self.live:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = ("{task.description}", BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self.bars = Progress(
                *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
            )
            self.bars.start()
            self.all = self.bars.add_task("runs", total=self.runs)
            self.step = self.bars.add_task("", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.bars.stop()

    def start(self, label: str) -> None:
        """Another run begins."""
        if self.live:
            self.bars.update(self.all, completed=self.done, description=f"run {self.done + 1}/{self.runs} {label}")
        self.done += 1

    def progress(self, what: str, done: int, total: int) -> None:
        if self.live:
            self.bars.update(self.step, description=f"  {what}", completed=done, total=total)

    def say(self, text: str) -> None:
        print(f"sparsebench: {text}", file=sys.stderr)


def _latency(record: dict[str, Any]) -> str:
    if record.get("ms_decode") is None:
        return str(record["latency"])
    pairs = (f"{phase} {record[f'ms_{phase}']:.3g} ms, {record[f'speedup_{phase}']:.2f}x dense" for phase in _PHASES)
    return f"{'; '.join(pairs)} ({record['latency']}, kernels: {record['kernel']})"


def summary(record: dict[str, Any], store: Path) -> str:
    """One run in words: what was achieved, what it costs, where the record is."""
    lines = []
    if record.get("achieved") is not None:
        scope, model = record["achieved"], record["achieved_model"]
        stack = [f"{t} {v:.4f}" for t in TARGETS if (v := record.get(f"achieved_{t}")) is not None]
        own = ", ".join(stack) if stack else f"{scope:.4f}"
        scopes = "the methods' scopes" if stack else "the method's scope"
        lines.append(f"sparsity   {own} of {scopes}, {model:.4f} of the whole model")
    if record.get("bits_average") is not None:
        average, layers = record["bits_average"], record["bits_of_layers"]
        lines.append(f"bits       {average:.3f} a parameter of the whole model (layers: {layers})")
    if record.get("flops_prefill"):
        prefill = record["flops_prefill"] / record["flops_prefill_dense"]
        decode = record["flops_decode"] / record["flops_decode_dense"]
        length = record["cost_length"]
        behind = record.get("cost_length_decode", length)
        after = "decoding" if behind == length else f"decoding after {behind}"
        lines.append(f"FLOPs      {prefill:.3f} of dense in a prefill of {length} tokens, {decode:.3f} in {after}")
    if record.get("bytes_weights"):
        size = record["bytes_weights"] / record["bytes_weights_dense"]
        lines += [
            f"bytes      {size:.3f} of dense ({record['bytes_format']}, indices counted)",
            f"latency    {_latency(record)}",
        ]
    if record.get("warnings"):
        lines.append(f"warning    {record['warnings']}")
    lines.append(
        f"record     {record['run_id']} in {store} (attempt {record['attempt']}, {record.get('seconds', 0):.1f} s)"
    )
    return "\n".join(lines)


def listing(workspace: Workspace, names: Sequence[str]) -> list[Row]:
    """The rows of ``list``: every method, model, task, corpus and sweep, or the kinds that were named."""
    for name in names:
        if name not in LISTS:
            raise UserError(f"list {name}: unknown list{closest(name, LISTS)}")
    rows: list[Row] = []
    for name in names or LISTS:
        rows += _sweeps() if name == "sweeps" else _choices(workspace, name)
    return rows


def _choices(workspace: Workspace, name: str) -> list[Row]:
    group = _GROUP[name]
    rows = []
    for choice, file in workspace.choices(group).items():
        declaration, given = _declared(workspace, group, choice, file)
        row = {"list": name, "name": choice, "summary": declaration.summary}
        if group == "method":
            row |= {"target": declaration.target, "phase": declaration.phase, "paper": declaration.paper}
        elif given:
            row["summary"] += f" [{', '.join(f'{key}={value}' for key, value in given.items())}]"
        rows.append(row)
    return rows


def _declared(workspace: Workspace, group: str, choice: str, file: Path | None) -> tuple[Declaration, dict[str, Any]]:
    """The declaration behind a choice, and what its YAML sets."""
    import yaml

    given = dict((yaml.safe_load(file.read_text(encoding="utf-8")) if file else None) or {})
    kind = {"calibration": "corpus"}.get(group, group)
    return workspace.catalogue.get(kind, given.pop("kind", choice)), given


def _sweeps() -> list[Row]:
    import yaml

    rows = []
    for file in sorted(data_folder("sweeps").glob("*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        rows.append({"list": "sweeps", "name": file.stem, "summary": str(content.get("summary", ""))})
    return rows


def listing_text(rows: Sequence[Row], format: str) -> str:
    """The rows as aligned text or as JSON."""
    if format == "json":
        return json.dumps(rows, indent=1) + "\n"
    if not rows:
        return "nothing to list\n"
    lines = []
    for kind in dict.fromkeys(row["list"] for row in rows):
        group = [row for row in rows if row["list"] == kind]
        columns = [key for key in ("name", "target", "phase", "summary", "paper") if key in group[0]]
        widths = [max(len(row[key]) for row in group) for key in columns]
        lines.append(kind)
        for row in group:
            cells = (row[key].ljust(width) for key, width in zip(columns, widths, strict=True))
            lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def shown(workspace: Workspace, name: str, format: str) -> str:
    """Everything about one name: summary, facts, and every option with meaning, default and range."""
    if name == "run":
        return _options_text("run", "options of every run, written without a prefix", {}, RUN_OPTIONS, {}, "", format)
    for group in _GROUP.values():
        files = workspace.choices(group)
        if name in files:
            declaration, given = _declared(workspace, group, name, files[name])
            facts = {"kind": declaration.kind, "version": declaration.version, **declaration.facts}
            prefix = f"method.{name}." if group == "method" else f"{group}."
            return _options_text(name, declaration.summary, facts, declaration.options, given, prefix, format)
    known = ["run", *(choice for group in _GROUP.values() for choice in workspace.choices(group))]
    raise UserError(f"show {name}: unknown name{closest(name, known)}")


def _options_text(
    name: str,
    text: str,
    facts: dict[str, Any],
    options: dict[str, Option],
    given: dict[str, Any],
    prefix: str,
    format: str,
) -> str:
    rows = [
        {
            "option": f"{prefix}{key}",
            "default": given.get(key, spec.default),
            "range": spec.range,
            "meaning": spec.meaning,
        }
        for key, spec in options.items()
    ]
    plain = {key: vars(value) if hasattr(value, "__dict__") else value for key, value in facts.items()}
    if format == "json":
        return json.dumps({"name": name, "summary": text, **plain, "options": rows}, indent=1) + "\n"
    lines = [f"{name}: {text}"]
    for key, value in plain.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {'/'.join(v) if isinstance(v, tuple) else v}" for k, v in value.items())
        elif isinstance(value, (tuple, list)):
            value = ", ".join(map(str, value))
        if value not in (None, ""):
            lines.append(f"  {key:<12} {value}")
    if rows:
        lines.append("options")
        widths = [max(len(str(row[key])) for row in rows) for key in ("option", "default")]
        for row in rows:
            head = f"  {row['option']!s:<{widths[0]}}  {_short(row['default']):<{min(widths[1], 24)}}"
            lines.append(f"{head}  {row['meaning']}  [{row['range']}]")
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    text = "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 24 else text[:21] + "..."
