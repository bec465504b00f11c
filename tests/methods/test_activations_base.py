"""What all methods of activation sparsity share: which tokens, what is counted, what is saved, what is refused."""

from __future__ import annotations

import pytest
import torch
from gated_models import attachment, gated, llama
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from sparsebench.errors import UserError
from sparsebench.methods.activations import apply, check
from sparsebench.methods.activations.gating import Gate
from sparsebench.methods.activations.saved import digest
from sparsebench.methods.activations.scored import ScoreGate
from sparsebench.methods.activations.sites import READER, gated_blocks, walk
from sparsebench.methods.activations.teal import Teal
from sparsebench.methods.base import Surroundings
from sparsebench.models.base import LoadedModel
from sparsebench.models.saving import save_model

WINDOWS = torch.randint(2, 64, (6, 24), generator=torch.Generator().manual_seed(1))


def fitted(model, method, label="teal"):
    loaded = LoadedModel(model, None, "toy", 64)
    return apply([(label, method)], Surroundings(loaded, lambda: WINDOWS, 0)).attachments[0]


class Half(Gate):
    """Keeps every second entry."""

    def __call__(self, x):
        keep = torch.zeros_like(x, dtype=torch.bool)
        keep[..., ::2] = True
        return x * keep, keep


@pytest.fixture(scope="module")
def model():
    return llama()


@torch.no_grad()
def logits(model, ids=WINDOWS, **more):
    return model(input_ids=ids, **more).logits


def hooks(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_counts_weigh_entries_by_the_weights_they_spare(model):
    blocks = gated_blocks(model)
    one = attachment(model, [Half(blocks[0], "down"), Half(blocks[1], "q")], lambda tokens: tokens)
    with one.attached():
        logits(model)
    counted = one.counted()
    sizes = {row["layer"]: (row["zeros"], row["total"]) for row in counted.rows}
    tokens = WINDOWS.numel()
    assert sizes == {
        "model.layers.0.mlp.down_proj": (tokens * 40 * 32, tokens * 80 * 32),
        "model.layers.1.self_attn.q_proj": (tokens * 16 * 32, tokens * 32 * 32),
    }
    everything = sum(linear.weights for block in blocks for linear in block.linears.values())
    assert counted.achieved == 0.5 and counted.columns["activation_sparsity"] == 0.5
    assert counted.columns["density_linear"] == pytest.approx(1 - (40 * 32 + 16 * 32) / everything)
    assert counted.saving.linear["model.layers.0.mlp.down_proj"] == (0.5, 0.5)


def test_an_entry_of_the_gate_spares_a_row_of_up_and_a_column_of_down(model):
    one = attachment(model, [Half(gated_blocks(model)[0], None)], lambda tokens: tokens)
    with one.attached():
        logits(model)
    rows = {row["layer"].rsplit(".", 1)[-1]: row["achieved"] for row in one.counted().rows}
    assert rows == {"up_proj": 0.5, "down_proj": 0.5}


def test_only_the_tail_of_a_prompt_and_all_decoded_tokens_are_acted_on(model):
    dense = logits(model)
    one = attachment(model, [Half(block, "down") for block in gated_blocks(model)], lambda tokens: tokens // 3)
    with one.attached():
        sparse = logits(model)
    assert torch.equal(sparse[:, :16], dense[:, :16])
    assert not torch.isclose(sparse[:, 16:], dense[:, 16:]).all(dim=-1).any()
    counted = one.counted()
    assert counted.achieved == 0.5 and counted.columns["sparse_tokens"] == pytest.approx(1 / 3)
    assert counted.saving.linear["model.layers.0.mlp.down_proj"] == (pytest.approx(1 - 0.5 / 3), 0.5)
    with one.attached(), torch.no_grad():
        first = model(input_ids=WINDOWS[:, :2], use_cache=True)
        assert torch.equal(first.logits, logits(model, WINDOWS[:, :2]))  # 2 // 3 tokens of a prompt of two
        model(input_ids=WINDOWS[:, 2:5], past_key_values=first.past_key_values, use_cache=True)
        assert one.acting.tallies["model.layers.0.mlp.down_proj"].acted == [0, 18]
    assert not hooks(model)


def test_hooks_are_removed_also_after_an_error(model):
    one = attachment(model, [Half(gated_blocks(model)[0], "q")], lambda tokens: tokens)
    with pytest.raises(RuntimeError), one.attached():
        raise RuntimeError
    assert not hooks(model)
    assert not one.counted().acted
    with one.attached():
        logits(model)
    with one.attached():
        pass
    assert not one.counted().acted  # each context counts anew


def test_walk_gives_what_the_sites_see_in_the_dense_model():
    model = llama()
    with torch.no_grad():
        hidden = model(input_ids=WINDOWS, output_hidden_states=True).hidden_states  # hooks the blocks for good
        before = hooks(model)
        for seen in walk(model, WINDOWS, [*READER, "gate_in", "gate_out"]):
            block = seen.block.module
            normed = block.input_layernorm(hidden[seen.block.index])
            torch.testing.assert_close(seen.values["attn_in"], normed)
            torch.testing.assert_close(seen.values["gate_in"], block.mlp.gate_proj(seen.values["mlp_in"]))
            torch.testing.assert_close(seen.values["gate_out"], block.mlp.act_fn(seen.values["gate_in"]))
            torch.testing.assert_close(
                seen.values["mlp_hidden"], seen.values["gate_out"] * block.mlp.up_proj(seen.values["mlp_in"])
            )
    assert hooks(model) == before


def test_a_gate_touches_only_its_tokens(model):
    block = gated_blocks(model)[0]
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    gate = ScoreGate(block, "q", None, 1e9)
    found = gated([gate], gate.module, x, lambda tokens: tokens // 2)
    assert torch.equal(found[:, 5:], torch.zeros(2, 4, 32))
    torch.testing.assert_close(found[:, :5], gate.module(x)[:, :5])


def test_a_model_without_gated_mlps_is_refused():
    opt = OPTForCausalLM(OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1,
            num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32))  # fmt: skip
    with pytest.raises(UserError, match=r"^model: OPTForCausalLM has no [^\n]*gate_proj[^\n]*gated MLP[^\n]*$"):
        check([("teal", Teal())], opt)


def test_what_was_fitted_is_saved_with_the_model_and_used_again(model, tmp_path):
    one = fitted(model, Teal(sparsity=0.6))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    save_model(LoadedModel(model, tokenizer, "toy", 64), tmp_path / "saved", {}, {"teal": one.fitted()})
    file = tmp_path / "saved" / "sparsebench-teal.safetensors"
    method = Teal(sparsity=0.6, fitted_from=str(file))
    check([("teal", method)], model)

    def no_data():
        raise AssertionError("nothing is fitted again")

    again = apply([("teal", method)], Surroundings(LoadedModel(model, None, "toy", 64), no_data, 0)).attachments[0]
    outputs = []
    for attached in (one, again):
        with attached.attached():
            outputs.append(logits(model))
    assert torch.equal(*outputs)
    assert one.fitted().keys() == again.fitted().keys()


def test_a_file_that_does_not_fit_is_refused(model, tmp_path):
    file = tmp_path / "teal.safetensors"
    save_file(fitted(model, Teal(sparsity=0.6)).fitted(), file)
    other = llama(std=0.1)
    wrong = [
        (other, Teal(sparsity=0.6, fitted_from=str(file)), "another model"),
        (model, Teal(sparsity=0.5, fitted_from=str(file)), r"sparsity=0\.6, not 0\.5"),
        (model, Teal(sparsity=0.6, allocation="greedy", fitted_from=str(file)), r"lacks model\.layers\.0\.error"),
        (model, Teal(fitted_from=str(tmp_path / "none")), "not a readable"),
    ]
    for which, method, reason in wrong:
        with pytest.raises(UserError, match=rf"^method\.teal\.fitted_from=[^\n]*{reason}[^\n]*$"):
            check([("teal", method)], which)
    save_file({"weight": torch.ones(2)}, file)
    with pytest.raises(UserError, match=r"^method\.teal\.fitted_from=[^\n]*not written by save=[^\n]*$"):
        check([("teal", Teal(fitted_from=str(file)))], model)


def test_the_digest_knows_the_model_but_not_its_pruned_weights():
    before, pruned, outliers = llama(), llama(), llama()
    with torch.no_grad():
        pruned.model.layers[0].mlp.up_proj.weight[0] = 0
        outliers.model.layers[0].input_layernorm.weight[0] = 4
    assert torch.equal(digest(before), digest(pruned))
    assert not torch.equal(digest(before), digest(outliers))
