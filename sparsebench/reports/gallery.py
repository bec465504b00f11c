"""``python -m sparsebench.reports.gallery [sweep ...]``: small sweeps, their reports, and one page that leads to all.

What is run, and how small, is the table SWEEPS. Everything lies in ``gallery/`` inside the usual store's folder; a
second run makes only what is new.
"""

from __future__ import annotations

import base64
import html
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsebench.analysis import ledger
from sparsebench.analysis.claims_command import row as ledger_row
from sparsebench.analysis.verdicts import UNTESTED
from sparsebench.config import Workspace
from sparsebench.errors import UserError, closest
from sparsebench.reports import command, page, show
from sparsebench.run import store_folder
from sparsebench.sweep import command as sweeps
from sparsebench.sweep import spec

# Sweep -> the words that make it small. Claims need the models and levels that they name, and 30 samples.
SWEEPS: dict[str, list[str]] = {
    "pruning_tradeoff": ["model=tiny_100k", "model.outliers=false", "sparsity=0.3,0.5,0.7", "task.windows=32"],
    "pruning_nm": ["model=tiny_100k", "model.outliers=false", "pattern=2:4,1:4", "task.windows=32"],
    "wanda": ["sparsity=0.5,0.7", "task.windows=32"],
    "magnitude": ["sparsity=0.375,0.75", "task.windows=32"],
    "essential_sparsity": ["model=tiny_1m", "sparsity=0.3,0.5,0.7", "task.windows=32"],
}


@dataclass(frozen=True)
class Made:
    """One sweep of the gallery: its report's folder, what went wrong instead, and how long both took."""

    sweep: str
    folder: Path | None
    problem: str
    seconds: float


def main(names: Sequence[str]) -> int:
    """Makes the gallery of these sweeps, all when none is named; the exit code is 1 when a report is missing."""
    for name in names:
        if name not in SWEEPS:
            print(f"sparsebench: gallery {name}: not in the gallery{closest(name, SWEEPS)}", file=sys.stderr)
            return 2
    started = time.monotonic()
    workspace, store = Workspace(None), store_folder(None) / "gallery"
    made = [_made(workspace, name, store) for name in names or SWEEPS]
    index = store / "reports" / "index.html"
    index.parent.mkdir(parents=True, exist_ok=True)
    index.write_text(page.simple("sparsebench: gallery", _index(workspace, store, made)), encoding="utf-8")
    for one in made:
        print(f"{one.sweep:<20} {one.seconds:6.0f} s  {one.folder or one.problem}")
    print(f"gallery: {index}, {time.monotonic() - started:.0f} s in all")
    return 0 if all(one.folder for one in made) else 1


def _made(workspace: Workspace, name: str, store: Path) -> Made:
    """Runs the sweep, as far as it is not done, and makes its report."""
    started = time.monotonic()
    try:
        sweeps.run(workspace, name, [*SWEEPS[name], f"store={store}"], store, only_plan=False)
        folder = command.make(name, store, store / "reports" / name)
    except UserError as error:
        return Made(name, None, str(error), time.monotonic() - started)
    return Made(name, folder, "", time.monotonic() - started)


def _index(workspace: Workspace, store: Path, made: Sequence[Made]) -> str:
    """A card a report, then the ledger of all papers on this store."""
    from pandas import DataFrame

    from sparsebench.results.store import Store

    cards = "".join(_card(workspace, one) for one in made)
    found = ledger.build(workspace, Store(store))
    good, counted, untested = found.headline()
    entries = sorted(found.entries, key=lambda one: one.verdict is None or one.verdict.verdict == UNTESTED)
    rows = DataFrame([ledger_row(entry) for entry in entries])
    rows = rows[["paper", "id", "sentence", "verdict", "estimate", "low", "high", "samples", "seeds", "why"]]
    table = show.html_table(
        rows, "verdicts", f"Every claim of every paper that has a sweep, {len(found.papers)} papers."
    )
    return (
        "<h1>Gallery</h1><p class='question'>Small sweeps on small models, each with its report.</p>"
        f"<div class='cards'>{cards}</div><h2 id='ledger'>Ledger</h2>"
        f"<p>{counted - untested} of {counted} main claims that are expected at this scale are tested on these small "
        f"grids, {good} of them are reproduced. The others need the sweeps as they are written.</p>"
        f"<div class='table'>{table}</div>"
    )


def _card(workspace: Workspace, made: Made) -> str:
    known = spec.names(workspace)
    summary = html.escape(spec.load(workspace, made.sweep).summary if made.sweep in known else "")
    if made.folder is None:
        problem = f"<p class='warning'>{html.escape(made.problem)}</p>"
        return f"<div class='card'><h3>{made.sweep}</h3><p>{summary}</p>{problem}</div>"
    figures = sorted((made.folder / "figures").glob("tradeoff-*.png")) or sorted(
        (made.folder / "figures").glob("*.png")
    )
    picture = ""
    if figures:
        data = base64.b64encode(figures[0].read_bytes()).decode("ascii")
        picture = f"<img alt='first figure of {made.sweep}' src='data:image/png;base64,{data}'>"
    return f"<a class='card' href='{made.sweep}/{command.PAGE}'><h3>{made.sweep}</h3>{picture}<p>{summary}</p></a>"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
