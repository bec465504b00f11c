"""The verb ``fit``: what it prints, which mistakes it names, sweeps, laws of others, pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pandas
import pytest
from analysis.law_data import accuracies, grid, pruned
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebench.analysis import fit_command
from sparsebench.analysis.laws import registry
from sparsebench.errors import UserError
from sparsebench.results.store import Store
from sparsebench.sweep import plan as plans

NOWHERE = Path("no-store")
OWN = """
import numpy as np
from sparsebench.analysis.laws.base import Law, Parameter, grid

LINE = Law(name="line", formula="y = E + c/x", variables={"x": "anything"},
           parameters={"E": Parameter(), "c": Parameter()}, link="log",
           curve=lambda p, x: np.log(p["E"] + p["c"] / x["x"]), starts=grid(E=(0.1, 1.0), c=(0.1, 1.0)))
NOT_A_LAW = 3
"""


@pytest.fixture
def table(tmp_path: Path) -> str:
    file = tmp_path / "runs.csv"
    grid(0.003).rename(columns={"N": "params", "D": "tokens", "value": "loss"}).to_csv(file, index=False)
    return str(file)


def words(**changes: str) -> dict[str, str]:
    """The words of a quick fit with some changed (an empty one removes it)."""
    usual = {"law": "chinchilla", "N": "params", "D": "tokens", "value": "loss", "bootstrap": "0", "keep": "2"}
    return {key: value for key, value in {**usual, **changes}.items() if value}


def fit(file: str, **changes: str) -> Any:
    return json.loads(fit_command.run([file], words(format="json", **changes), NOWHERE))


def mistake(names: list[str], given: dict[str, str], store: Path = NOWHERE) -> str:
    with pytest.raises(UserError) as caught:
        fit_command.run(names, given, store)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_json_holds_the_fit_in_full_precision(table: str) -> None:
    found = fit(table, bootstrap="12", drop_highest="2")
    assert list(found)[:7] == ["law", "n", "parameters", "ci", "objective", "identifiable", "warnings"]
    assert found["law"] == "chinchilla" and found["n"] == 30 and found["identifiable"] is True
    assert found["parameters"]["alpha"] == pytest.approx(0.302142, rel=1e-5)
    low, high = found["ci"]["alpha"]
    assert low < 0.302142 < high and len(repr(found["parameters"]["A"])) > 14
    assert found["extrapolation"]["params"]["lowest"] == 1.6e6 and found["extrapolation"]["tokens"]["n"] == 12
    assert found["extrapolation"]["params"]["error"] < 0.02
    again = fit(table, bootstrap="12", drop_highest="2")
    assert found == again


def test_the_table_says_what_a_reader_needs(table: str) -> None:
    text = fit_command.run([table], words(), NOWHERE)
    for part in ("L = E + A/N^alpha + B/D^beta", "30 rows, loss huber 0.001 on log", "alpha", "0.302142", "R2",
                 "condition", "on the 5 rows with params >= 3.2e+06", "N* ~ C^0.5387", "sign test p"):  # fmt: skip
        assert part in text


def test_exponents_that_are_not_determined_are_not_printed(tmp_path: Path) -> None:
    file = tmp_path / "two.csv"
    grid(0.003)[lambda t: t["N"] <= 2e5].to_csv(file, index=False)
    text = fit_command.run([str(file)], words(N="N", D="D", value="value", keep="1", drop_highest="0"), NOWHERE)
    assert "NOT IDENTIFIABLE" in text and "N: 2 distinct values" in text and text.count("not determined") == 2
    assert "C^" not in text


def test_laws_and_columns_are_compared_in_one_table(tmp_path: Path) -> None:
    file = tmp_path / "pruned.csv"
    pruned().to_csv(file, index=False)
    given = words(law="chinchilla_avg", N="N_avg,N_final", D="D", value="value", drop_by="N_initial", drop_highest="2")
    found = json.loads(fit_command.run([str(file)], {**given, "format": "json"}, NOWHERE))
    assert [one["name"] for one in found["fits"]] == ["chinchilla_avg N_avg=N_avg", "chinchilla_avg N_avg=N_final"]
    assert found["comparison"]["by_extrapolation"][0] == "chinchilla_avg N_avg=N_avg"
    text = fit_command.run(
        [str(file)], words(law="chinchilla,power", N="N_avg", x="N_avg", D="D", value="value"), NOWHERE
    )
    assert "by extrapolation: chinchilla < power" in text and "by AICc: chinchilla < power" in text


def test_rows_are_chosen_by_value_and_filtered_with_both_fits_shown(tmp_path: Path) -> None:
    file = tmp_path / "mixed.csv"
    points = grid(0.003)
    both = [points.assign(method="a"), points.assign(method="b", value=lambda t: t["value"] * 2)]
    pandas.concat(both).to_csv(file, index=False)
    found = fit(str(file), N="N", D="D", value="value", method="a", only="D>=4e6")
    assert found["n"] == 24 and found["filter"]["excluded"] == 6 and found["filter"]["without"]["n"] == 30
    assert found["filter"]["without"]["parameters"]["alpha"] == pytest.approx(0.302142, rel=1e-4)
    assert "only D>=4e6: 6 rows excluded; with them:" in fit_command.run(
        [str(file)], words(N="N", D="D", value="value", method="a", only="D>=4e6"), NOWHERE
    )


def test_the_frontier_law_takes_task_names(tmp_path: Path) -> None:
    file = tmp_path / "cells.csv"
    accuracies(0).rename(columns={"task": "name"}).assign(samples=100).to_csv(file, index=False)
    given = {"law": "frontier", "N": "N", "L": "L", "compression": "compression", "task": "name", "value": "value",
             "weights": "samples", "bootstrap": "20", "format": "json"}  # fmt: skip
    found = json.loads(fit_command.run([str(file)], given, NOWHERE))
    assert found["parameters"]["gamma"] == pytest.approx(-0.8, abs=0.03) and "delta_squad" in found["parameters"]
    assert found["loss"] == "binomial" and found["identifiable"]
    recipe = fit_command.run([str(file)], {**given, "loss": "ols", "format": "table", "weights": "samples"}, NOWHERE)
    assert "logits clipped at 1e-06" in recipe


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_drawn(table: str, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"fit.{suffix}"
    fit_command.run([table], words(plot=str(file), bootstrap="4", only="tokens>=4e6", keep="1"), NOWHERE)
    assert file.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"law": "chinchila"}, "law=chinchila: unknown law; did you mean 'chinchilla'?"),
        ({"law": ""}, "law: name the law to fit, law=<name>; valid: chinchilla,"),
        ({"value": ""}, "value: name the column"),
        ({"N": ""}, "N: law=chinchilla needs N=<column> (parameters"),
        ({"N": "size"}, "N=size: no such column; columns: params, tokens, loss"),
        ({"value": "los"}, "value=los: no such column"),
        ({"group": "run"}, "group=run: no such column"),
        ({"drop_by": "run"}, "drop_by=run: no such column"),
        ({"bootstrp": "3"}, "bootstrp: is no option of fit, no variable of the law and no column; did you"),
        ({"x": "params"}, "x: is no option of fit"),
        ({"params": "7"}, "fit: no row of"),
        ({"bootstrap": "many"}, "bootstrap=many: must be a whole number"),
        ({"bootstrap": "-1"}, "bootstrap=-1: must be"),
        ({"keep": "0"}, "keep=0: must be"),
        ({"delta": "0"}, "delta=0.0: must be"),
        ({"delta": "nan"}, "delta=nan: must be"),
        ({"loss": "l2"}, "loss=l2"),
        ({"loss": "binomial"}, "loss=binomial"),
        ({"format": "csv"}, "format=csv"),
        ({"plot": "fit.gif"}, "plot=fit.gif: must end in .png, .pdf, .svg"),
        ({"plot": "none/fit.png"}, "plot=none/fit.png: there is no folder none"),
        ({"only": "tokens"}, "only=tokens: written <column><comparison><number>"),
        ({"only": "tokens>=1e99"}, "only=tokens>=1e99: leaves no row"),
        ({"store": "somewhere"}, "store=somewhere: only together with sweep"),
    ],
)  # fmt: skip
def test_mistakes_are_named(table: str, changes: dict[str, str], says: str) -> None:
    assert mistake([table], words(**changes)).startswith(says)


def test_files_that_are_no_table(tmp_path: Path, table: str) -> None:
    assert mistake([str(tmp_path / "none.csv")], words()).endswith(
        "none.csv: cannot be read: No such file or directory"
    )
    assert "cannot be read" in mistake([str(tmp_path)], words())
    for name, content in (("empty.csv", b""), ("binary.csv", b"\xff\xfe\x00\x01"), ("torn.csv", b'a,b\n1,2\n"3,4\n5')):
        (tmp_path / name).write_bytes(content)
        assert f"{name}: is not a CSV file" in mistake([str(tmp_path / name)], words())
    assert mistake([], words()) == "fit: name one CSV file, or sweep=<name>"
    assert mistake([table, table], words()) == "fit: name one CSV file, or sweep=<name>"
    (tmp_path / "heading.csv").write_text("params,tokens,loss\n")
    assert "0 rows are too few" in mistake([str(tmp_path / "heading.csv")], words())


@pytest.mark.parametrize(
    ("cell", "shown"),
    [("", "is empty"), ("nan", "is empty"), ("abc", "is abc"), ("-1", "is -1"), ("0", "is 0"), ("inf", "is inf")],
)
@pytest.mark.parametrize("column", ["params", "tokens", "loss"])
def test_a_bad_cell_is_named_by_its_line(table: str, column: str, cell: str, shown: str) -> None:
    lines = Path(table).read_text().splitlines()
    cells = lines[3].split(",")
    cells[["params", "tokens", "loss"].index(column)] = cell
    Path(table).write_text("\n".join([*lines[:3], ",".join(cells), *lines[4:]]))
    found = mistake([table], words())
    assert f"={column}: line 4 of runs.csv {shown}" in found and "must be a number > 0" in found


def test_blank_lines_and_too_few_rows(table: str) -> None:
    lines = Path(table).read_text().splitlines()
    Path(table).write_text("\n".join([*lines[:2], "", *lines[2:], "", ""]))
    assert fit(table)["n"] == 30
    Path(table).write_text("\n".join(lines[:6]))
    assert mistake([table], words()) == "law=chinchilla: 5 rows are too few for its 5 parameters"


@settings(max_examples=40, deadline=None)
@given(key=st.text(min_size=1, max_size=12), value=st.text(max_size=12))
def test_any_word_more_is_taken_or_refused_in_words(
    key: str, value: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("any") / "five.csv"
    grid(0.003).iloc[:5].to_csv(file, index=False)  # too few rows: nothing is fitted
    given = {"law": "chinchilla", "N": "N", "D": "D", "value": "value", "bootstrap": "0", key: value}
    with pytest.raises(UserError) as caught:
        fit_command.run([str(file)], given, NOWHERE)
    assert str(caught.value)


def finished(store: Store, run_id: str, status: str = "ok", **fields: Any) -> None:
    store.begin(run_id, {"method": "wanda", "task": "perplexity"}).finish(status, fields)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A store with a plan of 14 runs: 12 finished, one flagged, one open; and one run of another sweep."""
    store = Store(tmp_path / "store")
    runs = [plans.Planned(f"{at:016x}", "s", (), "g", {"method": "wanda"}) for at in range(14)]
    plans.keep(plans.Plan("levels", tuple(runs)), store.folder)
    for at in range(12):
        x = 1.3**at
        finished(store, f"{at:016x}", flops_prefill=x, perplexity=2 + 3 / x, flagged=False)
    finished(store, f"{12:016x}", flops_prefill=1.0, perplexity=99.0, flagged=True)
    finished(store, "f" * 16, flops_prefill=1.0, perplexity=99.0, flagged=False)
    return store.folder


def test_a_sweep_is_fitted_from_its_records(sweep: Path) -> None:
    given = {"sweep": "levels", "law": "power", "x": "flops_prefill", "value": "perplexity", "method": "wanda",
             "bootstrap": "0", "format": "json"}  # fmt: skip
    found = json.loads(fit_command.run([], given, sweep))
    assert found["n"] == 12 and found["parameters"] == pytest.approx({"E": 2, "A": 3, "alpha": 1}, rel=1e-6)
    assert "1 of 14 planned runs of levels are not finished" in found["warnings"]
    assert "1 runs missed their sparsity and are left out" in found["warnings"]
    assert json.loads(fit_command.run([], {**given, "store": str(sweep)}, NOWHERE))["n"] == 12


def test_sweeps_that_cannot_be_fitted(sweep: Path, table: str) -> None:
    given = {"law": "power", "x": "flops_prefill", "value": "perplexity"}
    missing = mistake([], {**given, "sweep": "levls"}, sweep)
    assert missing.startswith("sweep=levls: store=") and "start it with: sweep levls" in missing
    assert "not both" in mistake([table], {**given, "sweep": "levels"}, sweep)
    assert "no such column" in mistake([], {**given, "sweep": "levels", "x": "parameters"}, sweep)
    runs = (plans.Planned("a" * 16, "s", (), "g", {"method": "wanda"}),)
    plans.keep(plans.Plan("open", runs), sweep)
    assert "none of its 1 runs can be used: 1 of 1 planned" in mistake([], {**given, "sweep": "open"}, sweep)
    finished(Store(sweep), "a" * 16, flops_prefill=1.0, accuracy=0.5, flagged=False)
    assert "value=perplexity: no such column" in mistake([], {**given, "sweep": "open"}, sweep)


def test_a_law_of_another_package(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_laws.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    points = [EntryPoint(name, f"own_laws:{target}", registry.GROUP) for name, target in
              (("line", "LINE"), ("three", "NOT_A_LAW"), ("gone", "MISSING"), ("power", "LINE"))]  # fmt: skip
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.GROUP else [])
    given = words(law="line", N="", D="", x="params")
    found = json.loads(fit_command.run([table], {**given, "format": "json"}, NOWHERE))
    assert found["law"] == "line" and set(found["parameters"]) == {"E", "c"}
    assert registry.names()[-3:] == ["gone", "line", "three"] and registry.get("power").formula == "y = E + A/x^alpha"
    assert mistake([table], {**given, "law": "three"}) == "law=three: own_laws:NOT_A_LAW is a int, not a Law"
    assert mistake([table], {**given, "law": "gone"}).startswith(
        "law=gone: own_laws:MISSING cannot be loaded: AttributeError"
    )


def test_the_command_is_light_to_import() -> None:
    heavy = "{'scipy', 'pandas', 'matplotlib', 'torch'}"
    code = f"import sys, sparsebench.analysis.fit_command\nassert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
