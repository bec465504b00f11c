"""Records as a table: on the terminal, or whole as CSV, JSON and Parquet; and the filters that choose among them."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparsebench.errors import UserError, closest
from sparsebench.results.record import COLUMNS, SCORES, STATUSES, column_order

FORMATS = ("table", "csv", "json", "parquet")
_IDS = ("run_id", "sparse_model_id")
_UNLIMITED = 10_000  # columns
_SHORT = 8  # characters of an id on the terminal
_TOLERANCE = 1e-9  # of a number in a filter
_CLOSED: dict[str, tuple[Any, ...]] = {"status": STATUSES, "flagged": (True, False)}

Record = Mapping[str, Any]


def table(records: Sequence[Record], *, format: str) -> str | bytes:
    """One row a run, in the order given. ``table``: the most useful columns, for people; ``csv``, ``json``,
    ``parquet`` (bytes): all columns in their documented order, in full precision. UserError for another format.
    """
    if format not in FORMATS:
        raise UserError(f"format={format}: unknown format{closest(format, FORMATS)}")
    if format == "table":
        return _terminal(records)
    columns = _columns(records)
    if format == "csv":
        return _csv(records, columns)
    if format == "json":
        rows = [{column: record.get(column) for column in columns} for record in records]
        return json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return _parquet(records, columns)


def select(records: Sequence[dict[str, Any]], filters: Mapping[str, str]) -> list[dict[str, Any]]:
    """The records that meet every filter, column -> value or values joined by commas (any of them).

    Numbers compare within 1e-9, ids by their beginning, an empty cell is ``none``; all else must be equal:
    ``wanda`` is not ``wanda+mustafar``. UserError for a column that neither COLUMNS nor any record has, and as
    ``check_values``.
    """
    check_values(filters)
    check_columns(records, filters)
    wanted = {column: [one.strip() for one in str(values).split(",")] for column, values in filters.items()}
    return [
        record
        for record in records
        if all(any(_matches(column, record.get(column), one) for one in ones) for column, ones in wanted.items())
    ]


def check_values(filters: Mapping[str, str]) -> None:
    """UserError for a value that a column of few known values never has: it would find nothing, whatever was run."""
    for column, known in _CLOSED.items():
        for one in map(str.strip, str(filters[column]).split(",")) if column in filters else ():
            if not any(_matches(column, value, one) for value in (*known, None)):
                valid = ", ".join(str(value).lower() for value in known)
                raise UserError(f"{column}={one}: no such value; valid: {valid}, none")


def check_columns(records: Iterable[Record], filters: Mapping[str, str]) -> None:
    """UserError for a filter on a column that neither COLUMNS nor any of the records has."""
    if set(filters) <= set(COLUMNS) - {SCORES}:
        return
    valid = set(COLUMNS).union(*records) - {SCORES}
    for column in filters:
        if column not in valid:
            raise UserError(f"{column}={filters[column]}: unknown column{closest(column, valid)}")


def _matches(column: str, value: Any, wanted: str) -> bool:
    if value is None:
        return wanted.lower() in ("none", "null", "")
    if isinstance(value, bool):
        return wanted.lower() == str(value).lower()
    if isinstance(value, (int, float)):
        try:
            return math.isclose(value, float(wanted), rel_tol=0, abs_tol=_TOLERANCE)
        except ValueError:
            return False
    if column in _IDS:
        return bool(wanted) and str(value).startswith(wanted)
    return str(value) == wanted


def _columns(records: Sequence[Record]) -> list[str]:
    return column_order((set(COLUMNS) - {SCORES}).union(*records))


def _csv(records: Sequence[Record], columns: list[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for record in records:
        cells = (record.get(column) for column in columns)
        writer.writerow([str(cell).lower() if isinstance(cell, bool) else cell for cell in cells])
    return text.getvalue()


def _parquet(records: Sequence[Record], columns: list[str]) -> bytes:
    import pyarrow  # here: heavy, and only this format needs it
    from pyarrow import parquet

    arrays = []
    for column in columns:
        cells = [record.get(column) for record in records]
        kinds = {type(cell) for cell in cells if cell is not None}
        if kinds == {int, float}:
            cells = [None if cell is None else float(cell) for cell in cells]
        elif len(kinds) > 1:  # such as a level of one method beside the levels of a stack
            cells = [None if cell is None else str(cell) for cell in cells]
        arrays.append(pyarrow.array(cells))
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table(arrays, names=columns), sink)
    return sink.getvalue()


def _terminal(records: Sequence[Record]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    metrics = {_text(record.get("metric")) for record in records} - {""}
    score = metrics.pop() if len(metrics) == 1 else ""  # one metric heads its column, several stand in the cells
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for heading in ("run_id", "method"):
        grid.add_column(heading, no_wrap=True)
    for heading in ("model", "task"):
        grid.add_column(heading, overflow="fold")
    for heading in ("sparsity", "achieved"):
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column(score or "score", justify="right", no_wrap=True)
    flags = any(record.get("flagged") for record in records)
    for heading in ("status", "flag") if flags else ("status",):
        grid.add_column(heading, no_wrap=True)
    for record in records:
        grid.add_row(
            _text(record.get("run_id"))[:_SHORT],
            _text(record.get("method")),
            _text(record.get("model")) + (" outliers" if record.get("model.outliers") else ""),
            _text(record.get("task")),
            _level(record),
            _number(record.get("achieved"), ".4f"),
            _score(record, named=not score),
            _text(record.get("status")),
            *(["flagged" if record.get("flagged") else ""] if flags else []),
        )
    # Into a file or a pipe the table takes the width it needs.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _UNLIMITED
    console = Console(file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n") + "\n"


def _level(record: Record) -> str:
    """``0.5``, or ``0.5 2:4`` where a pattern was asked for."""
    pattern = _text(record.get("pattern"))
    return " ".join(
        filter(None, (_number(record.get("sparsity"), ".6g"), "" if pattern == "unstructured" else pattern))
    )


def _score(record: Record, *, named: bool) -> str:
    name = record.get("metric")
    if not name or record.get(name) is None:
        return ""
    stderr = record.get(f"{name}_stderr")
    spread = "" if stderr is None else f" ± {_number(stderr, '.2g')}"
    return (f"{name} " if named else "") + _number(record[name], ".5g") + spread


def _number(value: Any, spec: str) -> str:
    return format(value, spec) if isinstance(value, (int, float)) else _text(value)


def _text(value: Any) -> str:
    return "" if value is None else str(value)
