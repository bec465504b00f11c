"""From a template to an executed notebook.

A template is a Python file in the top-level ``reports/`` folder: ``# %% <name>`` begins a cell of code,
``# %% [markdown] <name>`` one of text, whose lines are comments. The cell named ``parameters`` is written anew for
every report. What executing leaves behind depends on nothing but the template, the parameters and the records.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsebench.errors import UserError
from sparsebench.paths import data_folder, import_path

if TYPE_CHECKING:
    from nbformat import NotebookNode

_HEAD = re.compile(r"# %% (?P<markdown>\[markdown\] )?(?P<name>\w+)")
_PARAMETER = re.compile(r"^(?P<name>[A-Z_]+) = [^#]*(?P<comment>#.*)?$")
_CELL_SECONDS = 900

Progress = Callable[[int, int], None]
"""Called with (cells done, cells)."""


def built(template: str, parameters: Mapping[str, Any]) -> NotebookNode:
    """The notebook of ``reports/<template>.py`` with its parameters filled in, not executed.

    ValueError when a parameter is missing on either side, or the template has no cells.
    """
    import nbformat

    book: NotebookNode = nbformat.v4.new_notebook()
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for name, is_text, lines in _cells((data_folder("reports") / f"{template}.py").read_text(encoding="utf-8")):
        if name == "parameters":
            lines = _filled(lines, parameters)
        if is_text:
            source = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)
            book.cells.append(nbformat.v4.new_markdown_cell(source, id=name))
        else:
            book.cells.append(nbformat.v4.new_code_cell("\n".join(lines), id=name))
    if not book.cells:
        raise ValueError(f"template {template}: has no cells")
    return book


def _cells(text: str) -> list[tuple[str, bool, list[str]]]:
    found: list[tuple[str, bool, list[str]]] = []
    for line in text.splitlines():
        head = _HEAD.fullmatch(line)
        if head:
            found.append((head["name"], bool(head["markdown"]), []))
        elif found:
            found[-1][2].append(line)
    for _, _, lines in found:
        while lines and not lines[-1].strip():
            lines.pop()
    return found


def _filled(lines: list[str], parameters: Mapping[str, Any]) -> list[str]:
    names = [match["name"] for line in lines if (match := _PARAMETER.match(line))]
    if sorted(names) != sorted(parameters):
        raise ValueError(f"the template's parameters are {sorted(names)}, not {sorted(parameters)}")
    comments = {match["name"]: match["comment"] for line in lines if (match := _PARAMETER.match(line))}
    return [f"{name} = {parameters[name]!r}" + (f"  {comments[name]}" if comments[name] else "") for name in names]


def executed(book: NotebookNode, folder: Path, progress: Progress | None = None) -> dict[str, str]:
    """Runs every cell in ``folder``, in a kernel of its own, and keeps the outputs in ``book``.

    Returns path -> name of the cell that made it, for the files that appeared. UserError with the cell's name and
    the last line of its error when one fails.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    made: dict[str, str] = {}

    def after(cell: NotebookNode, cell_index: int, **_: Any) -> None:
        for path in sorted(one for one in folder.rglob("*") if one.is_file()):
            made.setdefault(path.relative_to(folder).as_posix(), cell.id)
        if progress:
            progress(cell_index + 1, len(book.cells))

    client = NotebookClient(
        book, timeout=_CELL_SECONDS, kernel_name="python3", record_timing=False,
        resources={"metadata": {"path": str(folder)}}, on_cell_executed=after,
        extra_arguments=["--log-level=40"],  # it warns of its local sockets
    )  # fmt: skip
    try:
        client.execute(env=_environment())
    except CellExecutionError as error:
        cell = next((one.id for one in book.cells if _failed(one)), "?")
        raise UserError(f"report: cell {cell} of the notebook failed: {error.ename}: {error.evalue}") from error
    except TimeoutError:
        raise UserError(f"report: a cell of the notebook took longer than {_CELL_SECONDS} s") from None
    for cell in book.cells:
        cell.metadata.pop("execution", None)
    book.metadata.pop("language_info", None)  # the interpreter's version, which changes nothing
    return made


def _failed(cell: NotebookNode) -> bool:
    return any(output.output_type == "error" for output in cell.get("outputs", ()))


def _environment() -> dict[str, str]:
    """The kernel imports the package that is running, installed or not, and draws on no screen."""
    return {**os.environ, "PYTHONPATH": import_path(), "MPLBACKEND": "Agg", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
