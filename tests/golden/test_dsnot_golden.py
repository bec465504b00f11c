"""DSnoT against masks and statistics of the reference implementation (True = pruned there)."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights import masks
from sparsebench.methods.weights.base import Layer
from sparsebench.methods.weights.dsnot import DSnoT
from sparsebench.methods.weights.hessian import Hessian
from sparsebench.methods.weights.magnitude import Magnitude
from sparsebench.methods.weights.sparsegpt import SparseGPT
from sparsebench.methods.weights.statistics import InputMoments, InputNorm
from sparsebench.methods.weights.walk import apply
from sparsebench.methods.weights.wanda import Wanda
from sparsebench.models.base import LoadedModel

START = r"(?P<name>(?!seq_).+?)_mask_(?P<initial>wanda|magnitude|sparsegpt)_{setting}"
MASK = START + r"(_cycles(?P<cycles>\d+)|_thr(?P<threshold>[\d.]+)|_pow(?P<power>[\d.]+)|_(?P<sign>samesign))?"
INITIAL = START + r"_init"
STATISTIC = r"(?P<name>.+)_(?P<statistic>sum_metric_row|scaler_row|var)"
WALK = r"seq_(?P<name>.+)_mask_(?P<skip>skipmlp|noskip)"
OUTPUT = r".*_(mask_.*|sum_metric_row|scaler_row|var)"
SEQUENTIAL_SPARSITY = 0.5  # the walk's cases do not name it


def linear(weight):
    module = nn.Linear(1, 1, bias=False)
    module.weight = nn.Parameter(weight)
    return module


def measured(case, statistic):
    for sequence in case[f"{case.name}_inputs"]:
        statistic.add(sequence[None], 1)
    return statistic


def start(case):
    """The layer as a stack hands it to DSnoT, and the pruner's mask: compared within rows, weights not updated."""
    layer = Layer(case.name, linear(case[f"{case.name}_weight"]))
    if case.parts["initial"] == "sparsegpt":
        method, statistic = SparseGPT(**case.options), measured(case, Hessian())
        weight = layer.weight.masked_fill(statistic.dead, 0.0)
        layer.score = weight**2 / statistic.factor(method.percdamp).diag() ** 2
    else:
        method = (Wanda if case.parts["initial"] == "wanda" else Magnitude)(**case.options)
        layer.statistic = measured(case, InputNorm())
        layer.score = method.score(layer)
    layer.n_of_m, layer.dense = method.n_of_m, layer.weight
    layer.statistic = measured(case, InputMoments())
    keep = masks.keep_n_of_m(layer.score, *method.n_of_m) if method.n_of_m else None
    return layer, masks.keep_rows(layer.score, method.level) if keep is None else keep


@pytest.mark.golden("dsnot", INITIAL, optional=True)
def test_initial_mask_is_the_reference_mask(case):
    assert torch.equal(~start(case)[1], case.golden)


@pytest.mark.golden("dsnot", MASK)
def test_refined_mask_is_the_reference_mask(case):
    parts = case.parts
    method = DSnoT(
        skip_layer="none",
        max_cycle_time=parts["cycles"] or 50,
        update_threshold=float(parts["threshold"] or 0.1),
        pow_of_var_regrowing=float(parts["power"] or 1),
        same_sign_rule=parts["sign"] is not None,
    )
    layer, mask = start(case)
    assert torch.equal(~method.refine(layer, mask), case.golden)


@pytest.mark.golden("dsnot", STATISTIC, optional=True)
def test_statistic_is_the_reference_statistic(case):
    name = {"sum_metric_row": "sums", "scaler_row": "squares", "var": "variance"}[case.parts["statistic"]]
    one_by_one, together, flat = measured(case, InputMoments()), InputMoments(), InputMoments()
    inputs = case[f"{case.name}_inputs"]
    together.add(inputs, len(inputs))
    flat.add(inputs.flatten(0, 1), len(inputs))
    # sums may cancel: what is left of float32 rounding is relative to what was summed
    slack = 1e-6 * float(inputs.abs().sum(dim=1).mean()) if name == "sums" else 0.0
    for one in (one_by_one, together, flat):
        torch.testing.assert_close(getattr(one, name), case.golden, rtol=1e-5, atol=slack)


class ToyBlock(nn.Module):
    """h = x + x Wq^T, out = h + tanh(h Wup^T)"""

    def __init__(self, q, up):
        super().__init__()
        self.self_attn, self.mlp = nn.ModuleDict({"q": linear(q)}), nn.ModuleDict({"up": linear(up)})

    def forward(self, hidden):
        hidden = hidden + self.self_attn["q"](hidden)
        return hidden + torch.tanh(self.mlp["up"](hidden))


class ToyDecoder(nn.Module):
    """One block behind an embedding whose rows are the given hidden states, one row per token."""

    def __init__(self, states, block):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(states.flatten(0, 1))
        self.blocks = nn.ModuleList([block])
        self.config = SimpleNamespace(num_hidden_layers=1)

    def forward(self, input_ids, use_cache=False):
        return self.blocks[0](self.embed(input_ids))


@pytest.mark.golden("dsnot", WALK, optional=True)
def test_walk_refines_what_is_not_skipped(case):
    states = case["seq_inputs"]
    model = ToyDecoder(states, ToyBlock(case["seq_q_weight"], case["seq_up_weight"]))
    ids = torch.arange(states.shape[0] * states.shape[1]).view(states.shape[:2])
    around = Surroundings(LoadedModel(model, None, "toy", states.shape[1]), lambda: ids, seed=0)
    skip = "mlp" if case.parts["skip"] == "skipmlp" else "none"
    refiner = DSnoT(max_cycle_time=str(int(case["seq_max_cycle_time"])), skip_layer=skip)
    apply([("wanda", Wanda(sparsity=SEQUENTIAL_SPARSITY)), ("dsnot", refiner)], around)

    block = model.blocks[0]
    after = {"q": block.self_attn["q"], "up": block.mlp["up"]}[case.name].weight
    before = case[f"seq_{case.name}_weight"]
    assert torch.equal((after == 0) & (before != 0), case.golden & (before != 0))
    assert torch.equal(after[~case.golden], before[~case.golden])


@pytest.mark.golden("dsnot", OUTPUT)
def test_no_golden_output_is_left_unread(case):
    setting = r"(s\d[\d.]*|\d+of\d+)"
    kinds = (MASK, INITIAL, STATISTIC, WALK)
    assert any(re.fullmatch(kind.replace("{setting}", setting), case.key) for kind in kinds)
