"""The benchmarks run, and the harness knows a bad measurement."""

from __future__ import annotations

import time

import pytest

from sparsebench.bench import attention, decode, kernels
from sparsebench.costs.paired import Measured, copies, measure
from sparsebench.errors import UserError
from sparsebench.kernels import build, lists


def test_kernels_table() -> None:
    report = kernels.run(
        kernels.Options(
            shapes=("48x80",),
            sparsity=(0.5,),
            formats=("bitmap", "lists", "2:4", "columns", "both", "w4", "csr"),
            repeats=3,
        ),
        lambda text: None,
    )
    names = [row["kernel"] for row in report.rows if row["kernel"] != "onednn"]
    assert names == ["torch", "own", "read", "bitmap", "lists", "2:4", "columns", "both", "w4", "csr"]
    assert len({tuple(row) for row in report.rows}) == 1 and report.facts["kernels"] == build.status()
    bound = {row["kernel"]: row["bound"] for row in report.rows}
    assert bound["torch"] == 1 and 1.5 < bound["bitmap"] < 1.9


@pytest.mark.parametrize("head", ["own", "torch"])
def test_decode_table(head: str) -> None:
    options = decode.Options(
        layers=1, hidden=128, intermediate=64, vocabulary=32, context=4, sparsity=(0.5, 0.9), repeats=3, head=head
    )
    report = decode.run(options, lambda text: None)
    assert [row["variant"] for row in report.rows] == [
        "torch",
        "own",
        "bitmap 0.5",
        "lists 0.9" if lists.pays(0.9) else "bitmap 0.9",
        "2:4",
        "columns 0.5",
        "w+x 0.5+0.5",
    ]


def test_attention_table() -> None:
    options = attention.Options(lengths=(128,), density=(0.5,), sparsity=(0.5,), heads=4, kv_heads=2, dim=32, repeats=3)
    report = attention.run(options, lambda text: None)
    assert [(row["phase"], row["level"]) for row in report.rows] == [
        ("prefill", "torch"), ("prefill", "own"), ("prefill", "0.5"),
        ("decode", "torch"), ("decode", "own"), ("decode", "sdpa"), ("decode", "0.5"),
    ]  # fmt: skip


def test_bad_options() -> None:
    with pytest.raises(UserError, match="shapes=12: must be outputs x inputs"):
        kernels.run(kernels.Options(shapes=("12",)), lambda text: None)
    with pytest.raises(UserError, match="hidden=130"):
        decode.run(decode.Options(hidden=130), lambda text: None)
    with pytest.raises(UserError, match="heads=5"):
        attention.run(attention.Options(heads=5), lambda text: None)


def test_ratios_are_base_over_candidate() -> None:
    seen: list[int] = []
    slow, fast = (lambda i: time.sleep(0.004)), (lambda i: (seen.append(i), time.sleep(0.001)))
    result = measure({"slow": slow}, {"fast": fast}, 5)
    assert result.ratio("slow", "fast").median > 1.5 and result.time("slow") >= 0.004
    assert seen == list(range(7))  # each call takes the next copy


def test_verdicts() -> None:
    def result(noise: float, own: float, read: float) -> Measured:
        return Measured({"own": [own], "read": [read]}, {("own", "own"): [noise]})

    assert result(1.0, 1.0, 0.9).verdict(1.5, 1.6) == "ok"
    assert result(1.3, 1.0, 0.9).verdict(1.5, 1.6) == "noisy"
    assert result(1.0, 8.0, 1.0).verdict(1.5, 1.6) == "stacked"
    assert result(1.0, 1.0, 0.9).verdict(2.0, 1.6) == "error"


def test_copies_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsebench.costs.paired.cache_bytes", lambda: 1000)
    assert len(copies([1], 700, list)) == 8 and len(copies([1], 10**6, list)) == 2
