"""The wheel works without the checkout: built, installed on its own, run from a foreign folder.

The new environment sees the test environment's packages through a ``.pth`` file. Python does not
read the ``.pth`` files of a folder added so, hence the checkout's editable install stays out of sight.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
STORE = "sparsebench-store"
# The cheapest run that loads a model, prunes it and evaluates it.
RUN = "method=magnitude sparsity=0.5 model=tiny_100k task=perplexity task.windows=2".split()
LAYOUT = """
import sparsebench
from sparsebench.paths import FOLDERS, data_folder
for folder in (sparsebench.__file__, *map(data_folder, FOLDERS)):
    print(folder)
"""


def call(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command that must succeed, with nothing in its environment that points to the checkout."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    clean = {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith("SPARSEBENCH_")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment in which the wheel, and nothing else, was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    call(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, TOP, cwd=folder)
    (wheel,) = folder.glob("sparsebench-*.whl")
    home = folder / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    call(*pip, "--python", home / "bin" / "python", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = home.glob("lib/python*/site-packages")
    shared = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (site / "test_environment.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")
    return home


def test_everything_lies_inside_the_wheel(environment: Path, tmp_path: Path) -> None:
    found = call(environment / "bin" / "python", "-c", LAYOUT, cwd=tmp_path).stdout.splitlines()
    assert len(found) == 4
    assert all(Path(path).is_relative_to(environment.resolve()) for path in found), found
    _, *folders = map(Path, found)
    for folder in folders:
        carried, here = (
            {p.relative_to(top) for p in top.rglob("*") if p.is_file() and p.suffix != ".pyc"}
            for top in (folder, TOP / folder.name)
        )
        assert carried, folder
        assert carried <= here, carried - here
        assert {path for path in here if path.suffix == ".yaml"} <= carried, here - carried
    package = Path(found[0]).parent
    assert (package / "data" / "kjv.txt.gz").is_file()
    assert (package / "models" / "weights" / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.parametrize("command", [("python", "-m", "sparsebench"), ("sparsebench",)], ids=["module", "script"])
def test_help_answers_and_writes_nothing(environment: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    program, *rest = command
    assert "sparsebench" in call(environment / "bin" / program, *rest, "--help", cwd=tmp_path).stdout
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_only_its_store(environment: Path, tmp_path: Path) -> None:
    call(environment / "bin" / "python", "-m", "sparsebench", *RUN, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [STORE]
