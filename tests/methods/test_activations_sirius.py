"""Sirius on a small model: its two ends, the cache after a correction, what is counted."""

from __future__ import annotations

import pytest
import torch
from gated_models import llama

from sparsebench.errors import UserError
from sparsebench.methods.activations import apply, check
from sparsebench.methods.activations.cats import Cats
from sparsebench.methods.activations.gating import Acting
from sparsebench.methods.activations.sirius import NeuronGate, Sirius, neuron_statistic
from sparsebench.methods.activations.sites import gated_blocks, walk
from sparsebench.methods.base import Surroundings
from sparsebench.models.base import LoadedModel

PROMPTS = torch.randint(2, 64, (2, 12), generator=torch.Generator().manual_seed(4))
NEW = 21


@pytest.fixture(scope="module")
def model():
    one = llama(hidden=48, intermediate=96)
    one.generation_config.eos_token_id = None
    return one


def attach(model, **options):
    loaded = LoadedModel(model, None, "toy", 64)
    return apply([("sirius", Sirius(**options))], Surroundings(loaded, lambda: PROMPTS, 0)).attachments[0]


def decode(model, new=NEW, **options):
    """(texts, what was counted)."""
    one = attach(model, **options)
    with one.attached():
        found = model.generate(input_ids=PROMPTS, max_new_tokens=new)
    return found, one.counted()


def greedy(model, new=NEW):
    return model.generate(
        input_ids=PROMPTS, attention_mask=torch.ones_like(PROMPTS), max_new_tokens=new, do_sample=False, pad_token_id=0
    )


def test_accepting_nothing_is_the_full_model(model):
    for kind in ("griffin", "cats"):
        found, counted = decode(model, threshold=1.5, period=4, tree_width=2, kind=kind)
        assert torch.equal(found, greedy(model))
        assert counted.columns["advance"] == 1
        assert counted.columns["effective_density"] > 1


def test_dropping_nothing_is_the_full_model(model):
    found, counted = decode(model, sparsity=0.0, threshold=0.0, period=5, tree_width=1)
    assert torch.equal(found, greedy(model))
    assert counted.columns["advance"] == 5 and counted.achieved == 0
    assert counted.columns["effective_density"] == 1


@torch.no_grad()
def test_accepting_everything_is_sparse_drafts_from_full_chunk_starts(model):
    found, counted = decode(model, sparsity=0.5, threshold=0.0, period=4, tree_width=1)
    assert counted.columns["advance"] == 4
    block_gates = attach(model, sparsity=0.5).gates
    for row, prompt in zip(found.tolist(), PROMPTS, strict=True):
        text = prompt.tolist()
        text.append(int(model(input_ids=prompt[None]).logits[0, -1].argmax()))
        for seen, gate in zip(walk(model, prompt[None], ["mlp_hidden"]), block_gates, strict=True):
            gate.look(seen.values["mlp_hidden"])
        while len(text) < len(row):
            cache = model(input_ids=torch.tensor([text[:-1]]), use_cache=True).past_key_values
            for _ in range(min(4, len(row) - len(text)) - 1):
                with Acting(lambda tokens: tokens).on(model, block_gates):
                    step = model(input_ids=torch.tensor([text[-1:]]), past_key_values=cache, use_cache=True)
                text.append(int(step.logits[0, -1].argmax()))
            text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
        assert text == row
    assert not torch.equal(found, greedy(model))


@torch.no_grad()
@pytest.mark.parametrize("rewrite", [True, False])
def test_after_a_correction_the_cache_is_the_full_models(model, rewrite, monkeypatch):
    from sparsebench.methods.activations.drafting import Decoder

    seen = []
    chunk = Decoder._chunk

    def watched(self, start, cache, period, ends):
        found, cache = chunk(self, start, cache, period, ends)
        seen.append((len(found), cache.get_seq_length(), cache.layers[1].keys.clone(), cache.layers[1].values.clone()))
        return found, cache

    monkeypatch.setattr(Decoder, "_chunk", watched)
    one = attach(model, threshold=0.02, period=5, tree_width=3, kv_rewrite=rewrite)
    with one.attached():
        found = model.generate(input_ids=PROMPTS[:1], max_new_tokens=NEW)
    length = PROMPTS.shape[1]
    same = []
    for advance, entries, keys, values in seen:
        length += advance
        assert entries == length == keys.shape[2] and keys.shape[0] == 1
        fresh = model(input_ids=found[:, :length], use_cache=True).past_key_values.layers[1]
        same.append(torch.allclose(fresh.keys, keys, atol=1e-5) and torch.allclose(fresh.values, values, atol=1e-5))
    assert all(same) == rewrite


def test_more_beams_are_accepted_further_and_counted(model):
    narrow = decode(model, threshold=0.05, period=6, tree_width=1)[1].columns
    wide = decode(model, threshold=0.05, period=6, tree_width=6)[1]
    assert 1 <= narrow["advance"] <= wide.columns["advance"] <= 6
    assert wide.saving.index_decode(0) > 0  # the FLOPs of beams and chunks
    filtered = decode(model, threshold=0.05, period=6, tree_width=6, filter_active=True)[1].columns
    assert 1 <= filtered["advance"] <= 6


def test_densities_are_the_published_ones(model):
    everything = sum(parameter.numel() for parameter in model.parameters())
    mlp = 2 * 3 * 48 * 96
    for kind, share in (("griffin", 0.5), ("cats", 2 / 3)):
        _, counted = decode(model, sparsity=0.5, kind=kind, threshold=0.0, period=4, tree_width=1, new=NEW)
        kept = (everything - mlp + mlp * share) / everything
        columns = counted.columns
        assert counted.achieved == 0.5
        assert columns["density_draft"] == pytest.approx(kept)
        assert columns["effective_density"] == pytest.approx((3 * kept + 1) / 4)
        assert columns["passes_per_token"] == pytest.approx((3 * kept + 1) / 4)
        blocks = gated_blocks(model)
        linear = sum(one.weights for block in blocks for one in block.linears.values())
        draft = (linear - mlp + mlp * share) / linear
        assert columns["density_linear"] == pytest.approx((3 * draft + 1) / 4)


def test_the_sparse_model_alone_is_never_corrected(model):
    found, counted = decode(model, correct=False, sparsity=0.8)
    assert counted.columns["corrections"] == 0 and "advance" not in counted.columns
    assert counted.columns["effective_density"] == counted.columns["density_draft"] < 1
    assert not torch.equal(found, greedy(model))
    assert model.generate.__func__ is type(model).generate  # the model's own again


def test_only_the_full_model_ends_a_text(model):
    full = greedy(model)[0, PROMPTS.shape[1] :].tolist()
    end = full[7]
    model.generation_config.eos_token_id = end
    try:
        found, _ = decode(model, threshold=1.5, period=4, tree_width=2)
    finally:
        model.generation_config.eos_token_id = None
    row = found[0, PROMPTS.shape[1] :].tolist()
    stop = full.index(end)
    assert row[: stop + 1] == full[: stop + 1]
    assert set(row[stop + 1 :]) <= {0}


def test_neurons_of_the_hand_case():
    found = neuron_statistic(torch.tensor([[3.0, 4, 0], [0, 1, 0]]))
    torch.testing.assert_close(found, torch.tensor([0.6, (0.64 + 1) ** 0.5, 0]))
    gate = NeuronGate(gated_blocks(llama(intermediate=3))[0], 1)
    gate.look(torch.tensor([[[3.0, 4, 0], [0, 1, 0]]]))
    assert gate.chosen.tolist() == [False, True, False]


def test_one_set_for_all_beams(model):
    found, counted = decode(model, kind="cats", pattern_strict=True, threshold=0.05, period=6, tree_width=4)
    assert counted.achieved == 0.5 and found.shape == (2, PROMPTS.shape[1] + NEW)


def test_drafts_by_the_thresholds_that_cats_saved(model, tmp_path):
    from safetensors.torch import save_file

    loaded = LoadedModel(model, None, "toy", 64)
    around = Surroundings(loaded, lambda: PROMPTS, 0)
    (cats,) = apply([("cats", Cats(sparsity=0.5, threshold="exact"))], around).attachments
    file = tmp_path / "cats.safetensors"
    save_file(cats.fitted(), file)
    method = Sirius(kind="cats_threshold", thresholds=str(file), sparsity=0.5, threshold=0.0, period=4, tree_width=1)
    check([("sirius", method)], model)
    one = apply([("sirius", method)], around).attachments[0]
    with one.attached():
        model.generate(input_ids=PROMPTS, max_new_tokens=NEW)
    assert [gate.threshold for gate in one.gates] == [gate.threshold for gate in cats.gates]
    counted = one.counted()
    assert counted.columns["advance"] == 4 and counted.achieved == pytest.approx(0.5, abs=0.15)
    for options, says in (
        ({"kind": "cats_threshold"}, r"kind=cats_threshold: needs method\.sirius\.thresholds=<file>"),
        ({"kind": "cats", "thresholds": str(file)}, r"kind=cats: takes no method\.sirius\.thresholds"),
        ({"kind": "cats_threshold", "thresholds": str(file), "sparsity": 0.75}, r"fitted for sparsity=0\.5, not 0\.75"),
    ):
        with pytest.raises(UserError, match=says):
            check([("sirius", Sirius(**options))], model)
    with pytest.raises(UserError, match="was fitted for another model"):
        check([("sirius", method)], llama(hidden=48, intermediate=96, std=0.3))


def test_a_task_that_does_not_generate_is_a_failed_run(command, small):
    answer = command("method=sirius", *small, "task.protocol=continuation")
    assert answer.code == 1
    assert "nothing that it acts on ran" in answer.records[0]["error"]
