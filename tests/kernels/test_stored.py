"""A form that a method left with a layer is found for the weight it was made of, and for no other."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsebench.costs.flops import shape_of
from sparsebench.costs.storage import weight_bytes
from sparsebench.kernels.formats import GroupQuantised
from sparsebench.kernels.stored import Stored, store, stored_form, stored_matrix
from sparsebench.kernels.swap import swapped

NAME = "model.layers.0.mlp.up_proj"


def halved(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A random Llama whose layer ``NAME`` keeps half of its groups in 4 bits, and whose other layers are dense."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=31, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).to(dtype).eval()
    layer = model.get_submodule(NAME)
    matrix = GroupQuantised.from_dense(layer.weight, torch.tensor([[1, 0, 1, 0]]).bool().repeat(48, 1))
    layer.weight.data.copy_(matrix.dense())
    store(layer, Stored(48 * 32, 8 * matrix.nbytes, "4-bit groups", matrix), layer.weight)
    return model


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "one entry": lambda layer: layer.weight.data[0, 0].mul_(-1),  # which no version counter of torch notices
    "in place": lambda layer: layer.weight.detach().zero_(),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2)),
    "a trained one": lambda layer: torch.optim.SGD(layer.parameters(), 0.1).step(lambda: _loss(layer)),
    "another dtype": lambda layer: layer.to(torch.float64),
    "its shape": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.view(64, 48))),
}


def _loss(layer: nn.Linear) -> Tensor:
    loss = layer.weight.square().sum()
    loss.backward()
    return loss


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_has_no_form(change: str) -> None:
    layer = halved().get_submodule(NAME)
    assert stored_form(layer, layer.weight) is not None
    CHANGES[change](layer)
    assert stored_form(layer, layer.weight) is None and stored_matrix(layer) is not None


def test_whatever_leaves_the_bits_alone_leaves_the_form() -> None:
    model = halved(torch.bfloat16)
    layer = deepcopy(model).get_submodule(NAME)
    form = stored_form(layer, layer.weight)
    assert form is not None and form.matrix is not None and form.nbytes == form.matrix.nbytes
    before = layer.weight.detach().clone()
    CHANGES["one entry"](layer)
    assert stored_form(layer, layer.weight) is None
    layer.weight = nn.Parameter(before.t().contiguous().t())  # back again, otherwise laid out
    assert stored_form(layer, layer.weight) is form
    assert stored_form(layer, layer.weight.to("meta")) is None  # offloaded: nobody knows
    assert stored_form(nn.Linear(2, 2), torch.ones(2, 2)) is None and stored_matrix(nn.Linear(2, 2)) is None


def test_bytes_flops_and_kernels_follow_the_weight() -> None:
    model = halved()

    def seen() -> tuple[str, int, str | None]:
        """The layer's format in the bytes, its kept entries in the FLOPs, and the kernel that runs it."""
        (row,) = (one for one in weight_bytes(model).per_layer if one["name"] == NAME)
        (matrix,) = (one for one in shape_of(model).linears if one.name == NAME)
        with swapped(model) as swap:
            return row["format"], matrix.nonzero, {one.name: one.format for one in swap.layers}.get(NAME)

    assert seen() == ("4-bit groups", 48 * 32, "4-bit groups")
    with torch.no_grad():
        model.get_submodule(NAME).weight[:, 8:] = 0  # fewer entries, by someone who knows nothing of the form
    nonzero = int(model.get_submodule(NAME).weight.count_nonzero())
    assert nonzero <= 48 * 8 and seen() == ("bitmap", nonzero, "bitmap")
    ids = torch.arange(4)[None]
    with torch.inference_mode():
        right = model(input_ids=ids).logits
        with swapped(model):
            torch.testing.assert_close(model(input_ids=ids).logits, right, rtol=1e-4, atol=1e-5)
