"""Every instruction set that this machine can run, and threads put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sparsebench.kernels import build

ALL = [*build.supported(), build.REFERENCE]


@pytest.fixture(params=ALL)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once per instruction set, and on the torch reference."""
    threads = torch.get_num_threads()
    with build.using(request.param):
        if request.param != build.REFERENCE and build.library() is None:
            pytest.skip(build.status())
        yield request.param
    torch.set_num_threads(threads)
