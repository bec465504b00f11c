"""A sparse model on sparse kernels gives what the masked one gives, and is itself again afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsebench.errors import UserError
from sparsebench.kernels import build, lists
from sparsebench.kernels.formats import Bitmap
from sparsebench.kernels.lists import Lists
from sparsebench.kernels.swap import SparseLinear, swapped
from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights.walk import apply
from sparsebench.methods.weights.wanda import Wanda
from sparsebench.models.embedded import Ladder


def wide(dtype: torch.dtype = torch.float32, bias: bool = False, zeros: float = 0.5) -> LlamaForCausalLM:
    """A random Llama, wider than the ladder's, with a share of its linear weights zero."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=97, hidden_size=192, intermediate_size=333, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=bias, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).to(dtype).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data *= torch.rand(module.weight.shape) >= zeros
    return model


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wide_model_agrees(isa, dtype, tokens) -> None:
    model = wide(dtype, bias=True)
    ids = torch.randint(97, (2, tokens))
    right = logits(model, ids)
    with swapped(model) as swap:
        assert swap.kernel == build.status() and len(swap.layers) == 14
        assert isinstance(model.model.layers[0].mlp.up_proj, SparseLinear)
        got = logits(model, ids)
    scale = right.abs().max()
    assert float((got - right).abs().max() / scale) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.equal(logits(model, ids), right)


def test_the_ladder_pruned_by_wanda_agrees() -> None:
    loaded = Ladder(rung="tiny_1m").load()
    ids = torch.randint(1024, (1, 24), generator=torch.Generator().manual_seed(0))
    apply([("wanda", Wanda(sparsity=0.5))], Surroundings(loaded, lambda: ids.repeat(2, 1), 0))
    right = logits(loaded.model, ids)
    with swapped(loaded.model) as swap:
        assert float((logits(loaded.model, ids) - right).abs().max()) < 1e-3
        assert not swap.skipped.keys() & {layer.name for layer in swap.layers}
        assert 0.5 < swap.bytes / swap.dense_bytes < 0.55  # half of the values, a bit per entry, offsets
    assert not any(isinstance(module, SparseLinear) for module in loaded.model.modules())


def test_what_is_left_alone_and_why() -> None:
    model = wide()
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)
    model.model.layers[1].mlp.up_proj.double()
    with swapped(model) as swap:
        assert swap.skipped == {
            "model.layers.0.mlp.up_proj": "less than 35% zeros",
            "model.layers.1.mlp.up_proj": "in float64",
            "lm_head": "the output head",
        }


def test_n_of_m_is_recognised() -> None:
    model = wide()
    layer = model.model.layers[0].mlp.gate_proj
    layer.weight.data *= torch.tensor([1, 0, 1, 0]).repeat(333, 48)
    layer.weight.data[layer.weight == 0] = 0
    layer.weight.data[:, 0::2] = torch.randn(333, 96)
    with swapped(model) as swap:
        assert {one.name: one.format for one in swap.layers}["model.layers.0.mlp.gate_proj"] == "2:4"


def test_the_model_is_put_back_after_an_error() -> None:
    model = wide()
    before = dict(model.named_modules())
    with pytest.raises(RuntimeError, match="stop"), swapped(model, "reference"):
        raise RuntimeError("stop")
    assert dict(model.named_modules()) == before


def test_refusals() -> None:
    with pytest.raises(UserError, match="kernel=fast: valid: none, auto, reference"), swapped(wide(), "fast"):
        pass
    dense = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(UserError, match=r"no linear layer to replace \(1 less than 35% zeros"), swapped(dense):
        pass


def test_a_sparse_layer_moves_and_unpacks() -> None:
    weight = torch.randn(9, 70) * (torch.rand(9, 70) < 0.5)
    layer = SparseLinear(Bitmap.from_dense(weight), torch.ones(9))
    assert torch.equal(layer.weight, weight) and not list(layer.parameters())
    x = torch.randn(3, 70)
    again = layer.to(torch.bfloat16)
    assert torch.allclose(again(x.bfloat16()).float(), x @ weight.t() + 1, atol=0.2)
    assert again.matrix.values.dtype == torch.bfloat16 and again.matrix.mask.dtype == torch.int64


def test_lists_are_chosen_and_move() -> None:
    model = wide(torch.bfloat16, zeros=0.9)
    ids = torch.randint(97, (2, 5))
    right = logits(model, ids)
    with swapped(model) as swap:
        assert {layer.format for layer in swap.layers} == {"lists" if lists.pays(0.9) else "bitmap"}
        assert float((logits(model, ids) - right).abs().max() / right.abs().max()) < 2e-2
    weight = torch.randn(9, 70).bfloat16() * (torch.rand(9, 70) < 0.1)
    layer = SparseLinear(Lists.from_dense(weight), None)
    assert layer.to(torch.bfloat16).matrix.nbytes == Lists.from_dense(weight).nbytes
    x = torch.randn(3, 70)
    again = layer.to(torch.float32)  # there are no lists in float32
    assert isinstance(again.matrix, Bitmap) and torch.allclose(again(x), x @ weight.float().t(), atol=1e-5)
