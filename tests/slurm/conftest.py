"""The fixture ``slurm``: a real Slurm on this machine for the whole session, or a skip that says why not."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from one_machine import OneMachine, missing


@pytest.fixture(scope="session")
def slurm() -> Iterator[OneMachine]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    pytest.importorskip("submitit", reason="submitit is not installed")
    cluster = OneMachine()
    before = os.environ.get("SLURM_CONF")
    try:
        cluster.up()
        os.environ["SLURM_CONF"] = str(cluster.conf)
        yield cluster
    finally:
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before
        cluster.down()
