"""The benchmark of decoding over a cache: every variant computes what it says, and counts the bytes of it."""

from __future__ import annotations

import json

import pytest
import torch
from commands import Command

from sparsebench.bench import cache as bench
from sparsebench.kernels.gpu.timing import Place

TINY = "lengths=128 heads=4 kv_heads=2 dim=64 page_size=8 repeats=3"


def tiny(**options):
    shape = {"lengths": (128,), "heads": 4, "kv_heads": 2, "dim": 64, "page_size": 8}
    return bench.Options(**{**shape, **options})


def made(options):
    torch.manual_seed(0)
    query = torch.randn(options.heads, options.dim).bfloat16()
    keys, values = torch.randn(2, options.kv_heads, options.lengths[0], options.dim).bfloat16()
    return query, bench.Cache(keys, values)


@pytest.fixture
def place(monkeypatch):
    monkeypatch.setattr("sparsebench.costs.paired.cache_bytes", lambda: 1)
    return Place.named("cpu")


def test_with_nothing_left_out_every_variant_is_dense_attention(place):
    options = tiny(sparsity=(0.0,))
    query, cache = made(options)
    known = {one.name: one for one in bench.steps(options, query, cache, place)}
    assert set(known) == {"own", "torch", "sdpa", *(f"{kind} 0" for kind in bench.KINDS)}
    right = known["sdpa"].call(0).float()
    for one in known.values():
        torch.testing.assert_close(one.call(1).float(), right, atol=0.03, rtol=0.03)


def test_bytes_are_those_of_the_tensors(place):
    options = tiny(sparsity=(0.75,))
    query, cache = made(options)
    known = {one.name.split()[0]: one for one in bench.steps(options, query, cache, place)}
    dense = 2 * 2 * 128 * 64 * 2
    pages = 2 * 2 * 16 * 64 * 2  # two vectors of 16 pages
    assert (known["own"].stored, known["own"].read) == (dense, dense)
    assert (known["evicted"].stored, known["evicted"].read) == (dense // 4, dense // 4)
    assert (known["pages"].stored, known["pages"].read) == (dense + pages, dense // 4 + pages)
    assert (known["tokens"].stored, known["tokens"].read) == (dense, dense // 2 + dense // 4)
    record = 8 + 16 * 2 + 8  # a mask word and a quarter of the entries, rounded up to 16
    assert (known["pruned"].stored, known["pruned"].read) == (2 * 2 * 128 * record, 2 * 2 * 128 * record)


def test_pages_are_those_that_could_hold_the_best_key(place):
    options = tiny(sparsity=(0.9375,), kinds=("pages",))  # one page of 16
    query, cache = made(options)
    query = query[:1].expand(4, -1).contiguous()
    for head in range(2):
        cache.keys[head, 40] = 8 * query[0]  # in page 5
    (one,) = [step for step in bench.steps(options, query, cache, place) if step.name.startswith("pages")]
    found = one.call(0).float()
    torch.testing.assert_close(found[0], cache.values[0, 40].float(), atol=0.02, rtol=0.02)
    torch.testing.assert_close(found[3], cache.values[1, 40].float(), atol=0.02, rtol=0.02)


def test_a_report(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsebench.costs.paired.cache_bytes", lambda: 1)
    answer = command("bench", "cache", *TINY.split(), "sparsity=0.5", "format=json")
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    assert [row["cache"] for row in report["rows"]] == [
        "own", "torch", "sdpa", "evicted 0.5", "pages 0.5", "tokens 0.5", "pruned 0.5",
    ]  # fmt: skip
    assert all(row["ms"] > 0 and row["tokens"] == 128 and row["read_share"] > 0 for row in report["rows"])
    assert all(row["vs_own"] > 0 and row["vs_torch"] > 0 for row in report["rows"][2:])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("heads=3", "heads=3: must be a multiple of kv_heads=2"),
        ("page_size=24", "lengths=128: must be a multiple of page_size=24"),
        ("kinds=[merged]", "kinds=merged: not a choice"),
        ("sparsity=1", "sparsity=1.0: must be a finite number"),
    ],
)
def test_mistakes_are_one_line(command: Command, word: str, message: str) -> None:
    words = [one for one in TINY.split() if one.split("=")[0] != word.split("=")[0]]
    answer = command("bench", "cache", *words, word)
    assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1
