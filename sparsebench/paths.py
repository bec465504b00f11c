"""Where ``conf/``, ``sweeps/`` and ``reports/`` lie: at the top of a checkout, or inside an installed package."""

from __future__ import annotations

import os
from pathlib import Path

from sparsebench.errors import UserError, closest

FOLDERS = ("conf", "sweeps", "reports")

_PACKAGE = Path(__file__).resolve().parent


def import_path() -> str:
    """PYTHONPATH for a child process, with which it imports the package that is running, installed or not."""
    return os.pathsep.join(filter(None, (str(_PACKAGE.parent), os.environ.get("PYTHONPATH"))))


def data_folder(name: str, package: Path = _PACKAGE) -> Path:
    """The absolute path of one of the project's data folders.

    A checkout's own folder wins, so that edits act at once; a wheel carries copies in ``_data/``.

    Args:
        name: ``conf``, ``sweeps`` or ``reports``.
        package: the folder of the ``sparsebench`` package.

    Raises:
        UserError: for another name, or when the folder is in neither place (a damaged installation).
    """
    if name not in FOLDERS:
        raise UserError(f"data folder {name!r} is unknown{closest(name, FOLDERS)}")
    top, carried = package.parent / name, package / "_data" / name
    # The pyproject.toml tells a checkout from site-packages, where another project may own a top-level `conf`.
    if (package.parent / "pyproject.toml").is_file() and top.is_dir():
        return top.absolute()
    if carried.is_dir():
        return carried.absolute()
    raise UserError(f"{name}: folder found neither at {top} (checkout) nor at {carried} (wheel); reinstall sparsebench")
