"""Every sweep of the package can be planned: its grid, exclusions and claims fit each other, hub or not."""

from __future__ import annotations

import pytest

from sparsebench.config import Workspace
from sparsebench.run import Part
from sparsebench.sweep import plan as plans
from sparsebench.sweep import spec

WORKSPACE = Workspace()
RUNS = {"cats": 27, "flexprefill": 11, "sparse_frontier": 696, "sparse_frontier_qwen": 6048, "r_sparse": 58}
"""Of those whose rules name options that act only beside others."""


@pytest.mark.parametrize("name", list(spec.names(WORKSPACE)))
def test_it_can_be_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def content(workspace: Workspace, model: Part) -> str:
        return model.label

    monkeypatch.setattr(plans, "_content", content)  # some models are on the hub
    made = plans.make(WORKSPACE, spec.load(WORKSPACE, name))
    assert made.runs and not made.untested
    assert len(made.runs) == RUNS.get(name, len(made.runs))
