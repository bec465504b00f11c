"""Wall time and peak memory: blocks whose cost is known."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from sparsebench.costs import timing
from sparsebench.costs.timing import Peak, stopwatch

MIB = 1 << 20
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")


def hold(mebibytes: int, seconds: float = 0.0) -> None:
    """Holds that much touched memory, then lets go of it."""
    block = torch.ones(mebibytes * MIB, dtype=torch.uint8)
    time.sleep(seconds)
    del block


def test_stopwatch() -> None:
    with stopwatch() as watch:
        assert watch.seconds != watch.seconds  # NaN: not yet known
        time.sleep(0.05)
    assert 0.05 <= watch.seconds < 5


def test_stopwatch_after_an_error() -> None:
    watch = stopwatch()
    with pytest.raises(KeyError), watch:
        raise KeyError
    assert watch.seconds >= 0


@needs_proc
def test_peak_sees_memory_that_is_gone_at_the_end_and_not_what_was_before() -> None:
    hold(200)
    resident = timing._resident()
    with Peak() as peak:
        hold(100, seconds=0.05)
    assert peak.how.startswith("resident set")
    assert peak.bytes is not None
    assert resident + 90 * MIB < peak.bytes < resident + 150 * MIB


@needs_proc
def test_peak_polls_where_the_kernel_does_not_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_reset_high_water", lambda: False)
    resident = timing._resident()
    with Peak() as peak:
        hold(100, seconds=0.1)
    assert peak.how == "resident set, polled"
    assert peak.bytes is not None
    assert resident + 90 * MIB < peak.bytes < resident + 150 * MIB


def test_an_ignored_reset_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t  900000 kB\nVmRSS:\t  100000 kB\n")
    monkeypatch.setattr(timing, "_PROC", tmp_path)
    assert timing._status("VmHWM") == 900_000 * 1024
    assert not timing._reset_high_water()
    (tmp_path / "status").write_text("VmHWM:\t  100100 kB\nVmRSS:\t  100000 kB\n")
    assert timing._reset_high_water()


@pytest.mark.skipif(sys.platform == "win32", reason="no getrusage")
def test_peak_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timing, "_PROC", tmp_path / "absent")
    with Peak() as peak:
        pass
    assert peak.how == "lifetime resident set"
    assert peak.bytes is not None and peak.bytes > 10 * MIB


def test_peak_where_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timing, "_PROC", tmp_path / "absent")
    monkeypatch.setattr(timing, "_lifetime_peak", lambda: None)
    with Peak() as peak:
        pass
    assert (peak.bytes, peak.how) == (None, "unknown")


def test_cuda_sums_all_gpus_and_resets_them_first(monkeypatch: pytest.MonkeyPatch) -> None:
    reset: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda index: [100, 23][index])
    with Peak("cuda:0") as peak:
        assert reset == [0, 1]
    assert (peak.bytes, peak.how) == (123, "cuda allocator")


def test_stopwatch_waits_for_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    with stopwatch():
        assert waited == [0]
    assert waited == [0, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_peak_on_a_real_gpu() -> None:
    with Peak("cuda") as peak:
        hold = torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")
        del hold
    assert peak.bytes is not None and peak.bytes >= 64 * MIB
