"""What runs on one model share changes no bit of their results, and is really made only once."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from commands import Command
from torch import Tensor, nn
from weight_models import WINDOWS

from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights import sharing
from sparsebench.methods.weights.dsnot import DSnoT
from sparsebench.methods.weights.hessian import Hessian
from sparsebench.methods.weights.magnitude import Magnitude
from sparsebench.methods.weights.perp import Perp
from sparsebench.methods.weights.sharing import Shared
from sparsebench.methods.weights.sparsegpt import SparseGPT
from sparsebench.methods.weights.statistics import InputNorm, Several
from sparsebench.methods.weights.walk import apply
from sparsebench.methods.weights.wanda import Wanda
from sparsebench.models import embedded, restoring
from sparsebench.models.base import LoadedModel
from sparsebench.models.blocks import decoder_blocks
from sparsebench.models.restoring import Original

PERP = Perp(training_mode="reconstruct", n_iterations=2, rank=2)
STACKS: list[tuple[Any, ...]] = [
    (Wanda(sparsity=0.25),),
    (SparseGPT(sparsity=0.5, blocksize=16),),
    (Wanda(sparsity=0.5),),
    (Wanda(sparsity=0.5, norm="l1"),),
    (Magnitude(sparsity=0.5), DSnoT()),
    (Wanda(sparsity=0.75, sequential="none"),),
    (SparseGPT(sparsity=0.5, sequential="none"),),
    (SparseGPT(sparsity=0.75, sequential="none", percdamp=0.1),),
    (Wanda(pattern="2:4", sequential="none"), PERP),
    (Wanda(sparsity=0.5, sequential="layer"),),
    (SparseGPT(pattern="2:4"),),
    (Wanda(sparsity=0.5), PERP),
]


def pruned(model: Any, stack: tuple[Any, ...], shared: dict[str, Any] | None, windows: Tensor = WINDOWS) -> Any:
    """The weights after a stack of methods."""
    named = [(type(method).__name__.lower(), method) for method in stack]
    apply(named, Surroundings(LoadedModel(model, None, "toy", 64), lambda: windows, 0, shared=shared))  # type: ignore[arg-type]
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_runs_one_after_the_other_give_what_each_gives_alone(family: str, make: Any) -> None:
    model, shared = make(family), {}
    original = Original(model)
    for stack in STACKS:
        assert original.restore(model)
        assert_same(pruned(model, stack, shared), pruned(make(family), stack, None))
    assert shared["weights"].statistics and shared["weights"].front is not None


def test_other_data_is_seen(make: Any) -> None:
    model, shared = make(), {}
    original = Original(model)
    for windows in (WINDOWS, WINDOWS.flip(0)[:3], WINDOWS):
        assert original.restore(model)
        stack = (SparseGPT(sparsity=0.5, sequential="none"),)
        assert_same(pruned(model, stack, shared, windows), pruned(make(), stack, None, windows))


@pytest.mark.parametrize("room", [0, 1500, 40_000])
def test_what_has_no_room_is_made_again(room: int, make: Any) -> None:
    model, shared = make(), {"weights": Shared(room=room)}
    original = Original(model)
    for stack in STACKS[:8]:
        assert original.restore(model)
        assert_same(pruned(model, stack, shared), pruned(make(), stack, None))
    parts = {id(one): one for one in shared["weights"].statistics.values()}.values()
    assert sum(sharing._bytes(one) for one in parts) <= room


def calls(model: nn.Module) -> Counter[int]:
    """Counts the calls of each block from now on."""
    found: Counter[int] = Counter()
    for index, block in enumerate(decoder_blocks(model)[1]):
        block.register_forward_pre_hook(lambda module, args, index=index: found.update([index]))
    return found


@pytest.mark.parametrize("kind", [Wanda, SparseGPT])
def test_statistics_of_the_dense_model_are_gathered_once(kind: Any, make: Any) -> None:
    model, shared = make(), {}
    original, counted = Original(model), calls(model)
    for place, level in enumerate((0.25, 0.5, 0.75)):
        original.restore(model)
        pruned(model, (kind(sparsity=level, sequential="none"),), shared)
        if place == 0:
            assert counted[2] > 0
            first = dict(counted)
    assert dict(counted) == first  # the second and third level ran no block


def test_the_first_block_is_measured_once_when_calibration_sees_pruned_blocks(make: Any) -> None:
    model, shared = make(), {}
    original, counted, seen = Original(model), calls(model), []
    for level in (0.25, 0.5):
        original.restore(model)
        counted.clear()
        pruned(model, (Wanda(sparsity=level),), shared)
        seen.append(dict(counted))
    assert seen[1][0] == 1  # the pruned block's outputs, and nothing else
    assert seen[0][0] > 1
    assert seen[1][1] == seen[1][2] + 1  # measured and passed through; the last one is only measured


def test_layers_with_one_input_share_hessian_and_factor(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Hessian] = []
    real, factors = Hessian.__init__, Counter[str]()
    cholesky = torch.linalg.cholesky_ex

    def init(self: Hessian) -> None:
        real(self)
        made.append(self)

    def counting(*args: Any, **kwargs: Any) -> Any:
        factors["cholesky"] += 1
        return cholesky(*args, **kwargs)

    monkeypatch.setattr(Hessian, "__init__", init)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", counting)
    model, shared = make(), {}
    original = Original(model)
    pruned(model, (SparseGPT(sparsity=0.5, sequential="none"),), shared)
    assert len(made) == 4 * 3 and factors["cholesky"] == 2 * 4 * 3  # qkv, o, gate and up, down; of three blocks
    original.restore(model)
    pruned(model, (SparseGPT(sparsity=0.75, sequential="none"),), shared)
    assert len(made) == 4 * 3 and factors["cholesky"] == 2 * 4 * 3
    original.restore(model)
    pruned(model, (SparseGPT(sparsity=0.75),), shared)  # the first block is dense here too
    assert len(made) == 4 * 3 + 4 * 2


def test_statistics_are_told_apart_by_what_makes_them() -> None:
    shared = Shared()
    norm = InputNorm("l1")
    norm.add(torch.ones(2, 3, 4), 2)
    shared.remember({"wanda": partial(InputNorm, "l1")}, {"q": Several({"wanda": norm})})
    assert shared.known({"other": partial(InputNorm, "l1")}, ["q"])["q"].parts["other"] is norm  # type: ignore[index]
    assert shared.known({"wanda": partial(InputNorm, "l2")}, ["q"]) is None
    assert shared.known({"wanda": partial(InputNorm, "l1")}, ["q", "k"]) is None
    shared.remember({"wanda": lambda: InputNorm("l2")}, {"k": Several({"wanda": norm})})  # nobody knows what it makes
    assert shared.known({"wanda": lambda: InputNorm("l2")}, ["k"]) is None


def test_weights_are_put_back_bit_for_bit(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    with torch.no_grad():
        model.model.norm.weight[0] = -0.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    original = Original(model)
    pruned(model, (SparseGPT(sparsity=0.5),), None)
    assert original.restore(model)
    assert_same(model.state_dict(), before)
    hook = model.model.layers[0].register_forward_hook(lambda *args: None)
    assert not original.restore(model)
    hook.remove()
    assert original.restore(model)
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 48, bias=False)
    assert not original.restore(model)
    monkeypatch.setattr(restoring, "ROOM", 1000)
    assert Original.of(model) is None


def test_a_grid_loads_its_model_once(command: Command, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    from sparsebench.models import loading

    real = loading.load_folder

    def load(folder: Any, how: Any) -> Any:
        loads.append(str(folder))
        return real(folder, how)

    monkeypatch.setattr(loading, "load_folder", load)
    assert embedded  # the ladder loads through the same function
    words = [
        *small,
        "calibration.nsamples=4",
        "calibration.seqlen=32",
        "method.sparsegpt.sequential=none",
        "format=json",
    ]
    grid = command(*words, "method=sparsegpt", "sparsity=0.25,0.5", "-m")
    assert grid.code == 0, grid.err
    assert len(loads) == 2  # to check the whole grid before it starts, and to run it
    alone = command(*words, "method=sparsegpt", "sparsity=0.5", "force=true")
    together = {row["sparsity"]: row for row in json.loads(grid.out)}
    [single] = json.loads(alone.out)
    assert single["perplexity"] == together[0.5]["perplexity"] != together[0.25]["perplexity"]
    assert single["statistics"] == together[0.5]["statistics"] == "dense"
