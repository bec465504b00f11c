"""The data folders are found in a checkout and in a wheel, and a damaged installation is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparsebench.errors import UserError
from sparsebench.paths import FOLDERS, data_folder

TOP = Path(__file__).resolve().parents[1]


def package_in(top: Path) -> Path:
    package = top / "sparsebench"
    package.mkdir()
    return package


@pytest.mark.parametrize("name", FOLDERS)
def test_this_checkout_uses_its_own_folders(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert data_folder(name) == TOP / name


def test_a_wheel_uses_what_it_carries_even_beside_a_foreign_conf(tmp_path: Path) -> None:
    package = package_in(tmp_path)
    (package / "_data" / "conf").mkdir(parents=True)
    (tmp_path / "conf").mkdir()
    assert data_folder("conf", package) == package / "_data" / "conf"


def test_a_checkout_wins_over_a_carried_copy(tmp_path: Path) -> None:
    package = package_in(tmp_path)
    (package / "_data" / "conf").mkdir(parents=True)
    (tmp_path / "conf").mkdir()
    (tmp_path / "pyproject.toml").touch()
    assert data_folder("conf", package) == tmp_path / "conf"


def test_a_missing_folder_is_one_line_with_both_places(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^sweeps: folder found neither at") as error:
        data_folder("sweeps", package_in(tmp_path))
    assert "\n" not in str(error.value)


def test_an_unknown_folder_gets_a_hint() -> None:
    with pytest.raises(UserError, match="did you mean 'sweeps'"):
        data_folder("sweep")


def test_the_path_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (package_in(tmp_path) / "_data" / "reports").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert data_folder("reports", Path("sparsebench")).is_absolute()


def test_finding_folders_imports_no_torch() -> None:
    code = "import sys, sparsebench.paths; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=TOP, check=False).returncode == 0
