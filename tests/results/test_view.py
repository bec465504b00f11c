"""Records as tables: documented columns, full precision, filters; older and newer schemas; other programs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import duckdb
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebench.errors import UserError
from sparsebench.results import record
from sparsebench.results.record import COLUMNS, SCORES, column_order
from sparsebench.results.store import DETAILS, Store
from sparsebench.results.view import FORMATS, select, table

WANDA: dict[str, Any] = {
    "run_id": "0123456789abcdef", "sparse_model_id": "feedfeedfeed", "method": "wanda", "model": "tiny_1m",
    "task": "perplexity", "sparsity": 0.1 + 0.2, "pattern": None, "achieved": 0.29998, "status": "ok", "attempt": 1,
    "flagged": False, "metric": "perplexity", "perplexity": 10 / 3, "perplexity_stderr": 0.0123456, "perplexity_n": 64,
    "bits_per_byte": 1.4, "bits_per_byte_stderr": None, "bits_per_byte_n": 64, "zeal": 1, "error": None,
}  # fmt: skip
STACK: dict[str, Any] = {
    "run_id": "fedcba9876543210", "method": "wanda+mustafar", "model": "tiny_1m", "task": "tinyworld",
    "sparsity": "0.5+0.7", "pattern": "2:4", "achieved": 0.6, "status": "failed", "attempt": 2, "flagged": True,
    "metric": "accuracy", "accuracy": None, "accuracy_stderr": None, "accuracy_n": 0, "error": 'a "bad", thing\n[red]',
    "alpha": "x",
}  # fmt: skip
BOTH = [WANDA, STACK]


FIELDS = {"method": "wanda", "model": "tiny_1m", "sparsity": 0.5}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def expected_columns() -> list[str]:
    names = list(COLUMNS)
    at = names.index(SCORES)
    scores = [
        part for name in ("accuracy", "bits_per_byte", "perplexity") for part in (name, f"{name}_stderr", f"{name}_n")
    ]
    return names[:at] + scores + names[at + 1 :] + ["alpha", "zeal"]


def test_documented_columns_start_as_promised() -> None:
    assert list(COLUMNS)[:15] == [
        "run_id", "sparse_model_id", "method", "model", "calibration", "task", "sparsity", "pattern", "achieved",
        "achieved_model", "seed", "status", "attempt", "flagged", "metric",
    ]  # fmt: skip
    assert all(meaning and "\n" not in meaning for meaning in COLUMNS.values())


def test_csv_has_one_row_a_run_in_full_precision() -> None:
    text = table(BOTH, format="csv")
    assert isinstance(text, str)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == expected_columns()
    assert float(rows[0]["perplexity"]) == 10 / 3 and float(rows[0]["sparsity"]) == 0.1 + 0.2
    assert rows[0]["flagged"] == "false" and rows[0]["pattern"] == "" and rows[1]["accuracy"] == ""
    assert rows[1]["error"] == STACK["error"]


def test_json_has_every_column() -> None:
    rows = json.loads(table(BOTH, format="json"))
    assert [list(row) for row in rows] == [expected_columns()] * 2
    assert rows[0]["perplexity"] == 10 / 3 and rows[1]["accuracy"] is None and rows[0]["host"] is None


def test_parquet_reads_back() -> None:
    data = table(BOTH, format="parquet")
    assert isinstance(data, bytes)
    frame = pandas.read_parquet(io.BytesIO(data))
    assert list(frame.columns) == expected_columns()
    assert frame.perplexity[0] == 10 / 3 and list(frame.sparsity) == [str(0.1 + 0.2), "0.5+0.7"]


def test_table_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = table([{**WANDA, "method": "wanda[red]"}, STACK], format="table")
    assert isinstance(text, str) and "\x1b" not in text
    heading, _, first, second = text.splitlines()
    assert heading.split() == "run_id method model task sparsity achieved score status flag".split()
    assert first.split() == "01234567 wanda[red] tiny_1m perplexity 0.3 0.3000 perplexity 3.3333 ± 0.012 ok".split()
    assert second.split() == "fedcba98 wanda+mustafar tiny_1m tinyworld 0.5+0.7 2:4 0.6000 failed flagged".split()


def test_one_metric_heads_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = table([WANDA], format="table")
    assert isinstance(text, str)
    assert text.splitlines()[0].split()[-4:] == ["sparsity", "achieved", "perplexity", "status"]
    assert "3.3333 ± 0.012" in text and text.count("perplexity") == 2  # the task's name, and the heading


@pytest.mark.parametrize("format", FORMATS)
def test_no_records_at_all(format: str) -> None:
    assert table([], format=format)


def test_unknown_format() -> None:
    with pytest.raises(UserError, match=r"format=cvs.*did you mean 'csv'"):
        table([], format="cvs")


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({}, BOTH),
        ({"method": "wanda"}, [WANDA]),
        ({"method": "magnitude"}, []),
        ({"method": "wanda, wanda+mustafar"}, BOTH),
        ({"sparsity": "0.3"}, [WANDA]),
        ({"sparsity": "0.3000001"}, []),
        ({"sparsity": "0.5+0.7"}, [STACK]),
        ({"sparsity": "half"}, []),
        ({"status": "ok,failed", "flagged": "true"}, [STACK]),
        ({"flagged": "False"}, [WANDA]),
        ({"run_id": "01234567"}, [WANDA]),
        ({"run_id": ""}, []),
        ({"pattern": "none"}, [WANDA]),
        ({"seed": "none"}, BOTH),
        ({"alpha": "x"}, [STACK]),
        ({"attempt": "2"}, [STACK]),
    ],
)
def test_select(filters: dict[str, str], found: list[dict[str, Any]]) -> None:
    assert select(BOTH, filters) == found


def test_select_names_the_closest_column() -> None:
    with pytest.raises(UserError, match="metod=wanda: unknown column; did you mean 'method'"):
        select(BOTH, {"metod": "wanda"})
    with pytest.raises(UserError, match="perplexity=1"):
        select([STACK], {"perplexity": "1"})
    with pytest.raises(UserError):
        select(BOTH, {SCORES: "1"})


@pytest.mark.parametrize("filters", [{"status": "nonsense"}, {"status": "ok,faild"}, {"flagged": "yes"}])
def test_a_value_that_a_column_never_has_is_a_mistake(filters: dict[str, str]) -> None:
    valid = "running, ok, failed, lost, none" if "status" in filters else "true, false, none"
    with pytest.raises(UserError, match=f"no such value; valid: {valid}$"):
        select(BOTH, filters)


@settings(max_examples=100, deadline=None)
@given(
    st.sets(st.sampled_from([*COLUMNS, "acc", "acc_stderr", "acc_n", "ppl", "ppl_n", "aa", "zz"]) | st.text(max_size=5))
)
def test_column_order_is_a_stable_permutation(columns: set[str]) -> None:
    columns.discard(SCORES)
    order = column_order(columns)
    assert sorted(order) == sorted(columns)
    assert column_order(reversed(order)) == order
    assert [one for one in order if one in COLUMNS] == [one for one in COLUMNS if one in columns]


# --- schema -----------------------------------------------------------------------------------------------


def test_a_newer_schema_asks_for_an_update(store: Store) -> None:
    store.begin("a", FIELDS).finish("ok", {})
    (store.folder / "records" / "z.jsonl").write_bytes(record.encode({"run_id": "a", "schema": 2, "state": "done"}))
    for read in (store.records, lambda: store.find("a"), lambda: store.begin("a", FIELDS)):
        with pytest.raises(UserError, match=r"schema 2.*update the package"):
            read()


def test_older_schemas_are_upgraded_step_by_step(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.begin("a", FIELDS).finish("ok", {"level": 0.5})
    monkeypatch.setattr(record, "SCHEMA", 3)
    monkeypatch.setitem(record._UPGRADES, 1, lambda line: {**line, "amount": line.pop("level", None)})
    assert store.records() == [] and store.torn == 2  # no way from 2 to 3: not lines of any version
    monkeypatch.setitem(record._UPGRADES, 2, lambda line: {**line, "level": line.pop("amount")})
    found = store.find("a")
    assert found is not None and found["level"] == 0.5 and found["schema"] == 3
    assert store.records() == [found]


@pytest.mark.parametrize("schema", [None, "1", True, 0, 1.5])
def test_a_line_without_a_schema_is_garbled(schema: Any) -> None:
    with pytest.raises(ValueError, match="schema"):
        record.upgrade({"schema": schema})


# --- other readers ----------------------------------------------------------------------------------------


def test_pandas_and_duckdb_read_the_folders(store: Store) -> None:
    for index, name in enumerate(("a", "b")):
        writer = Store(store.folder)
        attempt = writer.begin(name, FIELDS)
        attempt.finish(
            "ok",
            {"perplexity": 1.5 + index, f"only_{name}": index},
            layers=[{"layer": "q", "achieved": 0.5}],
            samples=[{"sample": i, "nll": 0.25} for i in range(3)],
            config={"method": {name: {"norm": "l1"}}, "seed": index},
            error="late warning",
        )
    counts = {"records": 4, "layers": 2, "samples": 6, "configs": 2, "errors": 2}
    for kind in ("records", *DETAILS):
        frame = pandas.concat(
            [pandas.read_json(path, lines=True) for path in sorted((store.folder / kind).glob("*.jsonl"))]
        )
        assert len(frame) == counts[kind] and {"run_id", "attempt"} <= set(frame.columns)
        rows = duckdb.sql(f"select run_id, attempt from read_json_auto('{store.folder}/{kind}/*.jsonl')").fetchall()
        assert len(rows) == counts[kind]
    with open(next((store.folder / "records").iterdir()), "ab") as file:
        file.write(b'{"run_id":"c","att')
    query = (
        "select run_id, perplexity, only_a, only_b from read_json_auto("
        f"'{store.folder}/records/*.jsonl', union_by_name=true, ignore_errors=true) where status = 'ok' order by run_id"
    )
    assert duckdb.sql(query).fetchall() == [("a", 1.5, 0, None), ("b", 2.5, None, 1)]
