"""Wanda against masks and statistics of the reference implementation (True = pruned there)."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights.base import Layer
from sparsebench.methods.weights.statistics import InputNorm
from sparsebench.methods.weights.walk import apply
from sparsebench.methods.weights.wanda import Wanda
from sparsebench.models.base import LoadedModel

MASK = r"(?P<name>(?!seq_).+?)_mask_{setting}"
VARIANT = r"(?P<name>(?!seq_).+?)_mask_variant_{setting}"
STATISTIC = r"(?P<name>.+)_scaler_row"
WALK = r"seq_b(?P<block>\d+)_(?P<name>.+)_mask_{setting}"
OUTPUT = r".*_(mask_.*|scaler_row)"


def linear(weight):
    module = nn.Linear(1, 1, bias=False)
    module.weight = nn.Parameter(weight)
    return module


def statistic_of(case):
    statistic = InputNorm()
    for sequence in case[f"{case.name}_inputs"]:
        statistic.add(sequence[None], 1)
    return statistic


def pruned(case, **options):
    layer = Layer(case.name, linear(case[f"{case.name}_weight"]), statistic_of(case))
    return ~Wanda(**case.options, **options).select(layer)


@pytest.mark.golden("wanda", MASK)
def test_mask_is_the_reference_mask(case):
    assert torch.equal(pruned(case), case.golden)


@pytest.mark.golden("wanda", VARIANT, optional=True)
def test_variant_mask_is_the_reference_mask(case):
    assert torch.equal(pruned(case, use_variant=True), case.golden)


@pytest.mark.golden("wanda", STATISTIC, optional=True)
def test_statistic_is_the_reference_statistic(case):
    torch.testing.assert_close(statistic_of(case).value, case.golden, rtol=1e-5, atol=0)
    together = InputNorm()
    inputs = case[f"{case.name}_inputs"]
    together.add(inputs, len(inputs))
    torch.testing.assert_close(together.value, case.golden, rtol=1e-5, atol=0)


class ToyBlock(nn.Module):
    """h = x + x Wq^T, out = h + tanh(h Wup^T)"""

    def __init__(self, q, up):
        super().__init__()
        self.q, self.up = linear(q), linear(up)

    def forward(self, hidden):
        hidden = hidden + self.q(hidden)
        return hidden + torch.tanh(self.up(hidden))


class ToyDecoder(nn.Module):
    """Blocks behind an embedding whose rows are the given hidden states, one row per token."""

    def __init__(self, states, blocks):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(states.flatten(0, 1))
        self.blocks = nn.ModuleList(blocks)
        self.config = SimpleNamespace(num_hidden_layers=len(blocks))

    def forward(self, input_ids, use_cache=False):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


@pytest.mark.golden("wanda", WALK, optional=True)
def test_walk_measures_dense_blocks_on_pruned_inputs(case):
    indices = sorted(int(match["block"]) for match in case.find(r"seq_b(?P<block>\d+)_q_weight"))
    states = case["seq_inputs"]
    model = ToyDecoder(states, [ToyBlock(case[f"seq_b{i}_q_weight"], case[f"seq_b{i}_up_weight"]) for i in indices])
    ids = torch.arange(states.shape[0] * states.shape[1]).view(states.shape[:2])
    loaded = LoadedModel(model, None, "toy", states.shape[1])
    apply([("wanda", Wanda(**case.options))], Surroundings(loaded, lambda: ids, seed=0))

    place = indices.index(int(case.parts["block"]))
    before = case[f"seq_b{case.parts['block']}_{case.name}_weight"]
    after = getattr(model.blocks[place], case.name).weight
    assert torch.equal((after == 0) & (before != 0), case.golden & (before != 0))
    assert torch.equal(after[~case.golden], before[~case.golden])


@pytest.mark.golden("wanda", OUTPUT)
def test_no_golden_output_is_left_unread(case):
    setting = r"(s\d[\d.]*|\d+of\d+)"
    kinds = (MASK, VARIANT, STATISTIC, WALK)
    assert any(re.fullmatch(kind.replace("{setting}", setting), case.key) for kind in kinds)
