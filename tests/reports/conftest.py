"""One report that many tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_store import made

from sparsebench.config import Workspace
from sparsebench.reports import command

SWEEP = "wanda"  # a sweep whose file states claims


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small store with the plan of the sweep ``wanda``."""
    return made(tmp_path_factory.mktemp("reports") / "store", SWEEP)


@pytest.fixture(scope="session")
def report(store: Path) -> Path:
    """The folder of its report."""
    text = command.run([SWEEP], {}, store, Workspace(None))
    folder = store / "reports" / SWEEP
    assert str(folder / "index.html") in text
    return folder
