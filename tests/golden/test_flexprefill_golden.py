"""FlexPrefill against the released code: block masks of both of its paths, exactly."""

from __future__ import annotations

import pytest
from prefill_cases import heads_of

from sparsebench.methods.attention.flexprefill import FlexPrefill


@pytest.mark.golden("flexprefill", r"(?P<name>c\d+)_mask_(list|bool)_path")
def test_block_mask(case):
    query, key = (case[f"{case.name}_{part}_bnhd"].transpose(1, 2) for part in "qk")
    gamma, tau = case[f"{case.name}_gamma_tau"].tolist()
    size = int(case[f"{case.name}_cfg_block"])
    method = FlexPrefill(gamma=gamma, tau=tau, block_size=size, budget_divisor=128)
    found = method.select(heads_of(query, key))
    assert found.mask.equal(case.golden[0])
