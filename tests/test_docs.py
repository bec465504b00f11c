"""The README and the generated pages say what is true: examples run, tables are current, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparsebench import cli, demo, docs
from sparsebench.results.record import COLUMNS

TOP = Path(__file__).resolve().parent.parent
README = (TOP / "README.md").read_text(encoding="utf-8")


def test_the_reference_page_is_current():
    page = (TOP / "docs" / "reference.md").read_text(encoding="utf-8")
    assert page == docs.reference(), "docs/reference.md is stale: run `make docs`"


def test_the_example_of_a_method_in_the_readme_runs(tmp_path, command):
    example = re.search(r"```python\n(from dataclasses.*?)```", README, re.DOTALL)
    assert example and len(example[1].splitlines()) <= 30
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "relative.py").write_text(example[1], encoding="utf-8")
    (folder / "sparsebench.yaml").write_text("plugins: [relative.py]\n", encoding="utf-8")
    words = ["--config-dir", str(folder), "method=relative", "pattern=2:4", "model=tiny_100k", "task.windows=2"]
    answer = command(*words)
    assert answer.code == 0, answer.err
    assert "relative" in answer.out and "0.5000" in answer.out
    assert "exponent of the sums" in command("--config-dir", str(folder), "show", "relative").out


def test_links_and_pictures_of_the_pages_exist():
    for page in (README, (TOP / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page):
            assert (TOP / target).exists(), target


def test_columns_that_the_readme_names_exist():
    section = README.split("## What a record holds")[1].split("## The embedded models")[0]
    table = [line for line in section.splitlines() if line.startswith("| `")]
    named = {name for line in table for name in re.findall(r"`([a-z_]+)`", line.split("|")[1])}
    assert named and not {name for name in named if not name.startswith("_")} - set(COLUMNS)


@pytest.mark.parametrize("line", re.findall(r"^python -m sparsebench (.*?)(?:\s+#.*)?$", README, re.MULTILINE))
def test_commands_of_the_readme_are_valid(line, tmp_path, monkeypatch):
    """Verbs and options exist; whether the model can be fetched is not asked here."""
    import shlex

    monkeypatch.chdir(tmp_path)
    for name in ("my.txt", "held_out.txt"):
        (tmp_path / name).write_text("In the beginning.\n", encoding="utf-8")

    from sparsebench.config import Workspace, runs

    arguments = cli.parse(shlex.split(line))
    if arguments.verb == "run":
        assert runs(Workspace(), arguments.overrides, sweep=arguments.grid)
    assert arguments.verb in cli.VERBS


def test_the_demo_draws_and_tabulates(tmp_path):
    def record(method, level, outliers, value):
        found = {"method": method, "sparsity": level, "achieved": level or 0.0, "perplexity": value}
        return found | {"perplexity_stderr": 0.1, "model.outliers": outliers}

    records = [
        record(method, level, outliers, 10.0 + 10 * (level or 0) ** 2)
        for outliers in (None, True)
        for method, level in (("dense", None), ("magnitude", 0.3), ("magnitude", 0.5), ("wanda", 0.3), ("wanda", 0.5))
    ]
    text = demo.markdown(records)
    assert text.count("| method | 0.3 | 0.5 |") == 2
    assert "| wanda | 10.90 ± 0.10 | 12.50 ± 0.10 |" in text
    demo.plot(records, tmp_path / "plots" / "demo.png")
    assert (tmp_path / "plots" / "demo.png").read_bytes().startswith(b"\x89PNG")
