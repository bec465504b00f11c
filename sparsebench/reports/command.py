"""The verb ``report <sweep> [store=<folder>] [out=<folder>] [overwrite=true] [allow_unfair=true]``."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsebench.config import Workspace
from sparsebench.errors import UserError
from sparsebench.reports import data, notebook, page

NOTEBOOK, PAGE, MANIFEST = "report.ipynb", "index.html", "manifest.json"
TEMPLATE = "sweep"
_SWITCHES = {"true": True, "false": False}


def run(names: Sequence[str], given: dict[str, str], default_store: Path, workspace: Workspace) -> str:
    """Makes the report and says where it is. UserError on bad input; then nothing is written.

    The folder is made beside its final place and moved there whole: what was there before stays until then.
    """
    words = dict(given)
    if len(names) != 1:
        raise UserError("report: name a sweep, one at a time (see `list sweeps`)")
    store = Path(words.pop("store", str(default_store))).expanduser()
    out = Path(words.pop("out", str(store / "reports" / names[0]))).expanduser()
    overwrite, allow_unfair = _switch(words, "overwrite"), _switch(words, "allow_unfair")
    if words:
        valid = "store=, out=, overwrite=true and allow_unfair=true"
        raise UserError(f"report: takes only {valid}, not {' '.join(f'{key}={one}' for key, one in words.items())}")
    _check_free(out, names[0], overwrite)
    data.load(names[0], store, workspace.config_dir)  # what is wrong with the records is said before anything is made
    made = make(names[0], store, out, workspace.config_dir, allow_unfair)
    return f"report of {names[0]}: {made / PAGE}\n  notebook {made / NOTEBOOK}, tables, figures and data beside it\n"


def _switch(words: dict[str, str], name: str) -> bool:
    value = words.pop(name, "false")
    if value not in _SWITCHES:
        raise UserError(f"{name}={value}: must be true or false")
    return _SWITCHES[value]


def _check_free(out: Path, sweep: str, overwrite: bool) -> None:
    """UserError when ``out`` holds something else than an earlier report of the same sweep."""
    if not os.path.lexists(out) or (overwrite and out.is_dir()):
        return
    if not out.is_dir():
        raise UserError(f"out={out}: is not a folder; give another")
    if not any(out.iterdir()):
        return
    try:
        before = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["sweep"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"out={out}: holds other files; give another folder, or overwrite=true") from None
    if before != sweep:
        raise UserError(f"out={out}: holds the report of {before}; give another folder, or overwrite=true")


def make(sweep: str, store: Path, out: Path, config_dir: Path | None = None, allow_unfair: bool = False) -> Path:
    """The report of one sweep in ``out``; returns the folder. UserError when it cannot be written or a cell fails."""
    draft = out.parent / f".{out.name}-{secrets.token_hex(4)}"
    try:
        draft.mkdir(parents=True)
        book = notebook.built(TEMPLATE, {
            "SWEEP": sweep,
            "STORE": os.path.relpath(store.resolve(), draft.resolve()),
            "CONFIG_DIR": str(config_dir) if config_dir else None,
            "DATE": datetime.now(UTC).date().isoformat(),
            "ALLOW_UNFAIR": allow_unfair,
        })  # fmt: skip
        files = notebook.executed(book, draft, _progress())
        (draft / NOTEBOOK).write_text(page.as_json(book), encoding="utf-8")
        (draft / PAGE).write_text(page.page(book, f"{sweep}: report"), encoding="utf-8")
        (draft / MANIFEST).write_text(_manifest(sweep, draft, files), encoding="utf-8")
        _put(draft, out)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written: {error.strerror or error}; give another folder") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out


def _manifest(sweep: str, folder: Path, files: dict[str, str]) -> str:
    """What every file of the report is and which cell made it. Notebook and page hold the date and have no hash."""
    rows: list[dict[str, Any]] = [
        {"file": path, "sha256": hashlib.sha256((folder / path).read_bytes()).hexdigest(), "cell": cell}
        for path, cell in sorted(files.items())
    ]
    rows += [{"file": name, "sha256": None, "cell": None} for name in (PAGE, NOTEBOOK)]
    return json.dumps({"sweep": sweep, "template": TEMPLATE, "files": rows}, indent=1) + "\n"


def _put(draft: Path, out: Path) -> None:
    """The draft in the place of what was there."""
    aside = out.parent / f".{out.name}-{secrets.token_hex(4)}-old"
    if out.exists():
        os.replace(out, aside)
    os.replace(draft, out)
    shutil.rmtree(aside, ignore_errors=True)


def _progress() -> notebook.Progress | None:
    """A line on stderr while the cells run; None when that is not a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        end = "\r\033[K" if done == total else ""
        print(f"\r\033[Kreport: cell {done}/{total}{end}", end="", file=sys.stderr, flush=True)

    return show
