"""SpeContext's retrieval head: its choice, its distillation, what it loads (hand checks; there is no released code)."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sparsebench.costs.flops import attention_of
from sparsebench.errors import UserError
from sparsebench.methods.base import Surroundings
from sparsebench.methods.kv_cache import apply
from sparsebench.methods.kv_cache.distilling import distilled
from sparsebench.methods.kv_cache.specontext import SpeContext
from sparsebench.models.base import LoadedModel
from sparsebench.models.plug import Handler, plugged
from sparsebench.tasks.scoring import score_tokens

SHAPE = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 96, "initializer_range": 0.3,
}  # fmt: skip
IDS = torch.randint(0, 32, (8, 48), generator=torch.Generator().manual_seed(1))


def make(layers):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, num_hidden_layers=layers)).eval()


def attached(model, **options):
    return apply(
        [("specontext", SpeContext(**options))], Surroundings(LoadedModel(model, None, "toy", 96), lambda: IDS, 0)
    )


class Captured(Handler):
    """The attention that a dense layer pays to what a method chose for it."""

    wants_weights = True

    def __init__(self):
        self.weights = {}

    def after(self, call, work):
        if call.phase == "decode":
            self.weights[call.index] = call.weights


@torch.no_grad()
def test_the_first_layers_own_attention_is_the_optimum_for_a_model_of_one_layer():
    model, dense = make(1), Captured()
    with plugged(model, dense):
        score_tokens(LoadedModel(model, None, "toy", 96), IDS, prefill=40)
    acting = attached(model, budget=12, source="layer0", n_sink=0, n_recent=1).attachments[0]
    chosen = []
    how = acting.how

    class Watching(Handler):
        def allow(self, call):
            chosen.append(acting.allowed.mask if acting.allowed is not None else None)

    with acting.attached(), plugged(model, Watching()):
        score_tokens(LoadedModel(model, None, "toy", 96), IDS, prefill=40)
    best = dense.weights[0].unflatten(1, (2, 2)).amax(dim=2)[:, :, :, :-1]
    mask = chosen[-1][:, ::2]
    for row in range(8):
        wanted = set(best[row, 0, -1].topk(12).indices.tolist()) | {46}
        assert set(mask[row, 0, -1].nonzero()[:, 0].tolist()) <= wanted
    assert how.asked is None


@pytest.mark.parametrize("of_attention", [False, True])
def test_distillation_lowers_its_loss_and_leaves_the_teacher(of_attention):
    model = make(2)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    options = {"rate": 3e-3, "seed": 0, "of_attention": of_attention, "progress": lambda done, total: None}
    shape = attention_of(model)[0]
    _, first = distilled(model, shape, IDS, steps=1, **options)
    found, last = distilled(model, shape, IDS, steps=40, **options)
    assert last < first
    assert found["query"].shape == (32, 32) and found["key"].shape == (16, 32)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


@torch.no_grad()
def test_all_layers_read_the_same_and_what_is_loaded_is_counted():
    model = make(3)
    acting = attached(model, budget=12, source="layer0", n_recent=4).attachments[0]
    masks = []

    class Watching(Handler):
        def allow(self, call):
            if call.phase == "decode":
                masks.append(acting.allowed.mask)

    with acting.attached(), plugged(model, Watching()):
        score_tokens(LoadedModel(model, None, "toy", 96), IDS, prefill=40, step=1)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    sets = torch.stack([mask[:, ::2, 0, :41].sum(-1) for mask in masks[::3]])
    assert int(sets.max()) <= 12
    loaded = acting.counted().columns["kv_loaded"]
    assert 1 / 7 < loaded < 1  # seven steps, the first of which loads all


def test_the_layers_that_stay_on_the_gpu():
    model = make(3)
    weights = sum(one.numel() * 4 for one in model.parameters()) / 1e9
    per_layer = 2 * 2 * 8 * 4 * 96 / 1e9  # K and V, heads, size, bytes, context
    sizes = (1.0, weights + 2.3 * per_layer)
    resident = [SpeContext(budget=12, gpu_memory=one).columns({}, model)["kv_layers_on_gpu"] for one in sizes]
    assert resident == [3, 1]  # the retrieval head's keys take half a layer's place
    with pytest.raises(UserError, match=r"gpu_memory=1e-06: 96 tokens do not fit the GPU"):
        SpeContext(budget=12, gpu_memory=1e-6).check_model(model)


def test_options_that_do_not_fit():
    with pytest.raises(UserError, match=r"dense_layers=2: the model has 2 layers"):
        SpeContext(dense_layers=2).check_model(make(2))
