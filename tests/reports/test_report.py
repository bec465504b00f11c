"""The whole report: what it writes, what it says of runs that do not count, and that it can be made again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from shutil import copy

import nbformat
import pandas
import pytest
from report_store import FAILED, FLAGGED, LEVELS, MISSING, WINDOWS, made, plan

from sparsebench.config import Workspace
from sparsebench.errors import UserError
from sparsebench.reports import command, notebook


def table(report: Path, name: str) -> pandas.DataFrame:
    return pandas.read_csv(report / name)


def test_everything_is_there(report: Path) -> None:
    files = "records.csv curves.csv verdicts.csv verdicts.json fits.json frontier.csv published_vs_ours.csv"
    for name in [*files.split(), "manifest.json", "report.ipynb", "index.html"]:
        assert (report / name).stat().st_size > 0, name
    figures = {path.stem for path in (report / "figures").iterdir()}
    assert figures >= {"tradeoff-tiny_100k-perplexity", "layers", "safe", "frontier-perplexity-bytes_weights"}
    assert len(list((report / "figures").iterdir())) == 3 * len(figures)
    tables = {path.stem for path in (report / "tables").iterdir()}
    assert tables >= {"curves", "knees", "matched", "safe", "costs", "runs", "not_counted", "methods", "verdicts"}
    assert len(list((report / "tables").iterdir())) == 3 * len(tables)


def test_the_manifest_names_the_cell_of_every_file(report: Path) -> None:
    manifest = json.loads((report / "manifest.json").read_text(encoding="utf-8"))
    rows = {row["file"]: row for row in manifest["files"]}
    there = {path.relative_to(report).as_posix() for path in report.rglob("*") if path.is_file()}
    assert set(rows) == there - {"manifest.json"}
    assert rows["curves.csv"]["cell"] == "levels"
    for name, row in rows.items():
        if row["sha256"]:
            assert hashlib.sha256((report / name).read_bytes()).hexdigest() == row["sha256"], name


def test_curves_hold_every_level_and_mark_what_does_not_count(report: Path) -> None:
    curves = table(report, "curves.csv")
    assert len(curves) == 1 + 3 * len(LEVELS) - 2  # the failed and the missing run have no score
    hollow = curves[curves["hollow"]]
    assert hollow["run_ids"].tolist() == [FLAGGED]
    assert "achieved" in hollow["flags"].iloc[0]
    wanda = curves[(curves["method"] == "wanda") & (curves["requested"] == 0.3)].iloc[0]
    assert wanda["achieved"] == pytest.approx(0.32)
    assert wanda["ci_low"] < wanda["score"] < wanda["ci_high"]
    assert wanda["n"] == WINDOWS
    assert set(curves.loc[~curves["hollow"], "interval"]) == {"jackknife t"}


def test_what_is_missing_is_listed_with_its_reason(report: Path) -> None:
    listed = table(report, "tables/not_counted.csv").set_index("run_id")
    assert listed["state"].to_dict() == {FLAGGED: "flagged", FAILED: "failed", MISSING: "missing"}
    assert "out of memory" in listed.loc[FAILED, "why"]
    page = (report / "index.html").read_text(encoding="utf-8")
    assert "25 of 28 planned runs count" in page


def test_methods_are_compared_at_the_same_achieved_sparsity(report: Path) -> None:
    """wanda reached 0.32 where 0.3 was asked: it is interpolated, and still the best at every level."""
    shown = table(report, "tables/matched.csv").set_index("method")
    assert shown.loc["wanda", "0.3"].startswith("~")
    assert not shown.loc["magnitude", "0.3"].startswith("~")
    best = table(report, "tables/best.csv")
    assert set(best["best"]) == {"wanda"}
    assert best["ahead"].all()
    latex = (report / "tables" / "matched.tex").read_text(encoding="utf-8")
    assert r"\toprule" in latex and r"\label{tab:matched}" in latex and r"\textbf{" in latex


def test_verdicts_follow_the_ledger(report: Path) -> None:
    rows = json.loads((report / "verdicts.json").read_text(encoding="utf-8"))
    assert {row["id"] for row in rows} >= {"wanda.beats_magnitude"}
    assert all(row["why"] for row in rows)
    assert {row["verdict"] for row in rows} == {"untested"}, "the claims are about another model than this store's"


def test_published_numbers_have_source_and_quality(report: Path) -> None:
    beside = table(report, "published_vs_ours.csv")
    assert len(beside) and beside["place"].notna().all() and beside["quality"].notna().all()
    assert beside["difference"].isna().all(), "another model: no difference"
    page = (report / "index.html").read_text(encoding="utf-8")
    assert "README of locuslab/wanda" in page


def test_the_notebook_runs_again_to_the_same_bytes(report: Path) -> None:
    """Executed as it was saved, beside the first: every file comes out the same."""
    again = report.parent / "again"
    again.mkdir()
    copy(report / "report.ipynb", again)
    book = nbformat.read(again / "report.ipynb", as_version=4)
    nbformat.validate(book)
    assert all(cell.get("outputs") != [] or cell.id in ("parameters", "levels", "answers") for cell in book.cells)
    notebook.executed(book, again)
    before = nbformat.read(report / "report.ipynb", as_version=4)
    for cell, was in zip(book.cells, before.cells, strict=True):
        assert cell.get("outputs") == was.get("outputs"), cell.id
    for path in (
        path for path in report.rglob("*") if (path.is_file() and path.parent != report) or path.suffix == ".csv"
    ):
        assert (again / path.relative_to(report)).read_bytes() == path.read_bytes(), path.name


def test_out_of_another_sweep_is_not_overwritten(report: Path, store: Path) -> None:
    plan(store, "other")
    with pytest.raises(UserError, match=r"out=.*: holds the report of wanda; .*overwrite=true"):
        command.run(["other"], {"out": str(report)}, store, Workspace(None))


@pytest.mark.parametrize(
    ("names", "words", "message"),
    [
        ([], {}, "name a sweep"),
        (["a", "b"], {}, "name a sweep"),
        (["wonda"], {}, "no plan of that name; did you mean 'wanda'"),
        (["wanda"], {"colour": "red"}, "takes only store=, out="),
        (["wanda"], {"overwrite": "maybe"}, "overwrite=maybe: must be true or false"),
    ],
)
def test_bad_input_is_one_line(store: Path, names: list[str], words: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as error:
        command.run(names, words, store, Workspace(None))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_or_a_full_folder_is_no_place_for_a_report(store: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    for out, message in ((tmp_path, "holds other files"), (tmp_path / "mine.txt", "is not a folder")):
        with pytest.raises(UserError, match=message):
            command.run(["wanda"], {"out": str(out)}, store, Workspace(None))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_finished(tmp_path: Path) -> None:
    made(tmp_path / "store", only="failed")
    with pytest.raises(UserError, match=r"none of its 28 runs is finished \(failed 27, missing 1\); see: status wanda"):
        command.run(["wanda"], {}, tmp_path / "store", Workspace(None))
    assert not (tmp_path / "store" / "reports").exists()


def test_mixed_versions_are_refused(tmp_path: Path) -> None:
    made(tmp_path / "store", versions=(1, 2))
    with pytest.raises(
        UserError, match=r"different versions of method wanda are mixed \(4 of version 1, 5 of version 2\)"
    ):
        command.run(["wanda"], {}, tmp_path / "store", Workspace(None))
