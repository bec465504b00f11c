"""Fresh copies of the small models."""

from __future__ import annotations

import copy

import pytest
import torch
from weight_models import FAMILIES


@pytest.fixture(scope="session")
def originals():
    made = {}
    for family, (kind, config) in FAMILIES.items():
        torch.manual_seed(3)
        made[family] = kind(config).eval()
    return made


@pytest.fixture
def make(originals):
    """A fresh copy of a family's model."""
    return lambda family="llama": copy.deepcopy(originals[family])
