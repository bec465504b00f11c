"""Golden tests take everything from the keys of ``<slug>.npz``: shapes, cases, sparsities and patterns.

The files lie in ``data/`` or in the folder that SPARSEBENCH_GOLDEN_DIR names. A test is marked with the
slug and a pattern; it runs once for every key that fits the pattern (its named groups are the case's
``parts``), and its fixture ``case`` is that key with all arrays of the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"
# what a mask was made at: s0.5 is a sparsity, 2of4 an n:m pattern whose n counts PRUNED weights
SETTING = r"(?P<setting>s\d[\d.]*|\d+of\d+)"


@dataclass(frozen=True)
class Case:
    """One key of a golden file. ``parts``: the named groups of the test's pattern."""

    arrays: Mapping[str, np.ndarray]
    key: str
    parts: Mapping[str, str]

    @property
    def golden(self) -> Tensor:
        return self[self.key]

    @property
    def name(self) -> str:
        return self.parts["name"]

    @property
    def options(self) -> dict[str, Any]:
        """The method options of the key's setting; ``pattern`` counts KEPT weights, the file pruned ones."""
        setting = self.parts["setting"]
        if setting.startswith("s"):
            return {"sparsity": float(setting[1:])}
        pruned, group = map(int, setting.split("of"))
        return {"pattern": f"{group - pruned}:{group}"}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.arrays:
            pytest.fail(f"{self.key} needs {name}, which the golden file does not have")
        return torch.from_numpy(self.arrays[name].copy())

    def find(self, pattern: str) -> list[re.Match[str]]:
        """Matches of the keys of the file that fit a pattern as a whole."""
        return [match for key in self.arrays if (match := re.fullmatch(pattern, key))]


def golden_folder() -> Path:
    return Path(os.environ.get("SPARSEBENCH_GOLDEN_DIR") or DATA)


@cache
def read(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as found:
        return dict(found)


def cases(slug: str, pattern: str, optional: bool = False) -> list[Any]:
    """A parameter for every fitting key, or one that fails with the reason. ``optional`` kinds of keys
    may be absent from other vectors, not from our own."""
    file = golden_folder() / f"{slug}.npz"
    if not file.is_file():
        return [pytest.param(f"golden file {file} does not exist", id="missing-file")]
    arrays = read(file)
    found = [Case(arrays, key, match.groupdict()) for key in arrays if (match := re.fullmatch(pattern, key))]
    if found:
        return [pytest.param(case, id=case.key) for case in found]
    nothing = f"{file.name} has no key that fits {pattern}"
    if optional and file.parent != DATA:
        return [pytest.param(nothing, id="no-case", marks=pytest.mark.skip(reason=nothing))]
    return [pytest.param(nothing, id="no-case")]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "golden(slug, pattern, optional): run for each fitting key of a golden file")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for marker in metafunc.definition.iter_markers("golden"):
        slug, pattern = marker.args
        found = cases(slug, pattern.replace("{setting}", SETTING), **marker.kwargs)
        metafunc.parametrize("case", found, indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    if isinstance(request.param, str):
        pytest.fail(request.param)
    return request.param
