"""The index of a store's lines: it reads what was appended, and everything again when a file was changed by hand."""

from __future__ import annotations

from pathlib import Path

from sparsebench.results.index import Index


def texts(index: Index, run_id: str, *shards: Path) -> list[str]:
    return [line.decode() for _, lines in index.lines(run_id, list(shards)) for line in lines]


def line(run_id: str, value: int) -> str:
    return f'{{"run_id":"{run_id}","value":{value}}}\n'


def test_lines_that_are_appended_are_found_and_half_lines_wait(tmp_path: Path) -> None:
    shard, index = tmp_path / "a.jsonl", Index()
    shard.write_text(line("x", 1) + line("y", 2))
    assert texts(index, "x", shard) == [line("x", 1)]
    with shard.open("a") as file:
        file.write(line("x", 3) + line("x", 4)[:-5])
    assert texts(index, "x", shard) == [line("x", 1), line("x", 3)]
    assert index.torn == 1
    with shard.open("a") as file:
        file.write(line("x", 4)[-5:])
    assert texts(index, "x", shard) == [line("x", 1), line("x", 3), line("x", 4)]
    assert index.torn == 0


def test_several_shards_and_one_that_appears_later(tmp_path: Path) -> None:
    index, a, b = Index(), tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    b.write_text(line("x", 2))
    assert texts(index, "x", b) == [line("x", 2)]
    a.write_text(line("x", 1))
    assert texts(index, "x", a, b) == [line("x", 1), line("x", 2)]


def test_a_shard_that_shrank_or_vanished_is_read_again(tmp_path: Path) -> None:
    index, a, b = Index(), tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text(line("x", 1) + line("x", 2))
    b.write_text(line("x", 3))
    assert len(texts(index, "x", a, b)) == 3
    a.write_text(line("x", 9))
    assert texts(index, "x", a, b) == [line("x", 9), line("x", 3)]
    b.unlink()
    assert texts(index, "x", a) == [line("x", 9)]


def test_lines_that_do_not_begin_with_their_id_are_handed_out_to_be_looked_at(tmp_path: Path) -> None:
    shard, index = tmp_path / "a.jsonl", Index()
    shard.write_text('{"value":1,"run_id":"x"}\n' + "garbage\n" + line("y", 2))
    assert texts(index, "x", shard) == ['{"value":1,"run_id":"x"}\n', "garbage\n"]
