"""Records by filters give what reading everything gives, from the shards, a compacted form, and what came since."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from commands import Command

from sparsebench.bench import synthetic
from sparsebench.errors import UserError
from sparsebench.results import query, view
from sparsebench.results.store import Store

FILTERS = [
    {},
    {"method": "wanda"},
    {"method": "wanda,magnitude+perp", "sparsity": "0.5"},
    {"calibration": "none"},
    {"calibration": "none,kjv", "status": "failed"},
    {"sparse_model_id": "ab"},
    {"run_id": "run-1"},
    {"accuracy": "0.25"},
    {"method": "dense", "accuracy": "0.25"},
    {"status": "running"},
]


def fill(store: Store, rng: random.Random, runs: int, first: int = 0) -> None:
    for index in range(first, first + runs):
        own = random.Random(index)  # what a run is, is the same in all of its lines
        fields = {
            "method": own.choice(["wanda", "magnitude", "magnitude+perp", "dense"]),
            "model": own.choice(["tiny_1m", 'it\'s "quoted"']),
            "calibration": own.choice([None, "kjv"]),
            "sparse_model_id": own.choice(["abc", "xyz"]) + str(index),
            "sparsity": own.choice([0.5, 0.6]),
        }
        for _ in range(rng.randint(1, 2)):
            attempt = store.begin(f"run-{index}", fields)
            status = rng.choice(["ok", "failed", "running"])
            if status != "running":
                attempt.finish(status, {"accuracy": 0.25} if index % 3 else {"perplexity": 8.0})


def same(store: Store) -> None:
    for filters in FILTERS:
        expected = view.select(store.records(), filters)
        found = query.records(store, filters).records
        assert sorted(found, key=lambda r: r["run_id"]) == sorted(expected, key=lambda r: r["run_id"]), filters


def test_filters_give_the_same_records_however_they_are_stored(tmp_path: Path) -> None:
    rng = random.Random(0)
    store = Store(tmp_path)
    fill(store, rng, 40)
    same(store)
    _, count = query.compact(store)
    assert count == 40
    same(store)
    fill(Store(tmp_path), rng, 10, first=35)  # another writer: later attempts of known runs, and new ones
    same(store)
    newer, count = query.compact(store)
    assert count == 45
    assert list((tmp_path / "compact").iterdir()) == [newer], "the older form is gone, nothing else is left"
    same(store)


def test_the_compacted_form_is_read_by_others(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    fill(Store(tmp_path), random.Random(1), 20)
    file, _ = query.compact(Store(tmp_path))
    table = pandas.read_parquet(file)
    records = {record["run_id"]: record for record in Store(tmp_path).records()}
    assert set(table["run_id"]) == set(records)
    assert [records[run_id]["sparsity"] for run_id in table["run_id"]] == list(table["sparsity"])


def test_a_compacted_form_of_shards_that_were_changed_is_not_used(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, random.Random(2), 10)
    query.compact(store)
    (shard,) = (tmp_path / "records").glob("*.jsonl")
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(b"".join(lines[:4]))
    assert query.records(store, {}).records == Store(tmp_path).records()


def test_a_draft_that_a_crash_left_is_ignored_and_torn_lines_are_counted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, random.Random(3), 5)
    (tmp_path / "compact").mkdir()
    (tmp_path / "compact" / ".0123456789abcdef").write_bytes(b"PAR1 half a file")
    (shard,) = (tmp_path / "records").glob("*.jsonl")
    with shard.open("ab") as file:
        file.write(b'garbage\n{"run_id":"run-9","met')
    found = query.records(store, {})
    assert len(found.records) == 5
    assert found.torn == 2


def test_unknown_columns_and_empty_stores_are_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no records to compact"):
        query.compact(Store(tmp_path))
    fill(Store(tmp_path), random.Random(4), 5)
    with pytest.raises(UserError, match="colour=red: unknown column"):
        query.records(Store(tmp_path), {"colour": "red"})


def test_the_verb(command: Command, tmp_path: Path) -> None:
    synthetic.records(tmp_path / "big", 2000)
    words = [f"store={tmp_path / 'big'}"]
    answer = command("results", "compact", *words)
    assert answer.code == 0 and answer.out.startswith("2000 records in ")
    answer = command("results", "method=method_07", "sparsity=0.5", "format=csv", *words)
    assert answer.code == 0 and len(answer.out.splitlines()) == 3
    assert command("results", "compact", "method=x", *words).code == 2
    assert command("results", "everything", *words).code == 2
    answer = command("results", "status=nonsense", *words)
    assert answer.code == 2 and "valid: running, ok, failed, lost" in answer.err and not answer.out
