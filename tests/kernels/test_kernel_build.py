"""Compiling, caching and doing without."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsebench.errors import UserError
from sparsebench.kernels import build, ops
from sparsebench.kernels.formats import Bitmap


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache and nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.forget()
    yield tmp_path / "cache" / "sparsebench" / "kernels"
    build.forget()


def test_without_a_compiler_the_reference_runs(fresh, monkeypatch, caplog) -> None:
    monkeypatch.setenv("PATH", "")
    weight = torch.randn(8, 70)
    assert torch.allclose(ops.linear(torch.eye(70), Bitmap.from_dense(weight)), weight.t())
    ops.linear(torch.eye(70), Bitmap.from_dense(weight))
    assert build.library() is None and build.status() == "reference (no C compiler)"
    assert len([line for line in caplog.messages if "no C compiler" in line]) == 1


def test_a_broken_compiler_is_no_compiler(fresh, tmp_path, monkeypatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text(
        "#!/bin/sh\ncase $1 in --version) echo 1;; *) echo no room >&2; exit 1;; esac\n", encoding="utf-8"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert build.library() is None and build.status() == "reference (cc failed: no room)"


def test_compiled_once(fresh) -> None:
    with build.using("portable"):
        if build.library() is None:
            pytest.skip(build.status())
        (file,) = fresh.iterdir()
        made = file.stat().st_mtime_ns
        build.forget()
        assert build.library() is not None and build.status().startswith("c portable")
    assert [one.stat().st_mtime_ns for one in fresh.iterdir()] == [made]


@pytest.mark.parametrize("damage", [b"", b"\x7fELF and no more"], ids=["emptied", "cut"])
def test_a_damaged_library_is_compiled_again(fresh, damage: bytes) -> None:
    with build.using("portable"):
        if build.library() is None:
            pytest.skip(build.status())
        before = build.status()
        (file,) = fresh.iterdir()
        file.unlink()  # it is mapped
        file.write_bytes(damage)
        build.forget()
        assert build.library() is not None and build.status() == before
    assert list(fresh.iterdir()) == [file]


def test_processes_that_start_together(fresh) -> None:
    words = "from sparsebench.kernels import build\nwith build.using('portable'): print(build.status())"
    started = [
        subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        for _ in range(2)
    ]
    said = [one.communicate(timeout=120)[0] for one in started]
    if said[0].startswith("reference"):
        pytest.skip(said[0])
    assert [text.split()[:2] for text in said] == [["c", "portable"]] * 2
    assert len(list(fresh.iterdir())) == 1


def test_only_what_the_processor_has(monkeypatch) -> None:
    monkeypatch.setattr(build, "_features", lambda: {"avx2", "fma", "f16c", "popcnt", "bmi1", "bmi2"})
    assert build.supported() == ["avx2", "portable"]
    said = "isa=avx512: not on this machine; valid: avx2, portable, reference"
    with pytest.raises(UserError, match=said), build.using("avx512"):
        pass
    without_bf16 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vbmi2"}
    monkeypatch.setattr(build, "_features", lambda: without_bf16)
    assert build.best_isa() == "avx512vbmi2" and "avx512" not in build.supported()
    monkeypatch.setattr(build, "_features", lambda: {"asimd"})
    assert build.supported() == ["neon", "portable"]
    monkeypatch.setattr(build, "_features", set)
    assert build.supported() == ["portable"] == [build.best_isa()]
