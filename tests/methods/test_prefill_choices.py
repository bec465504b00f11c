"""What single prefill methods promise, on small models and on keys that are heavy by construction."""

from __future__ import annotations

import pytest
import torch
from prefill_models import IDS, METHODS, attachment, learned, make_llama, run
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparsebench.audits import fingerprint
from sparsebench.errors import UserError
from sparsebench.methods.attention.anchor_attention import AnchorAttention
from sparsebench.methods.attention.base import SparseAttention, heads_of
from sparsebench.methods.attention.block_sparse import BlockSparse
from sparsebench.methods.attention.flexprefill import FlexPrefill
from sparsebench.methods.attention.minference import MInference, candidates, more_candidates, recall
from sparsebench.methods.attention.pbs_attn import PbsAttn, largest
from sparsebench.methods.attention.seer_attention import SeerAttention
from sparsebench.methods.attention.selections import Heads, causal, masked_softmax
from sparsebench.methods.attention.slashes import slash_tiles
from sparsebench.models.plug import Handler, plugged


@pytest.fixture(scope="module")
def model():
    return make_llama(2)


@pytest.fixture(scope="module")
def heavy():
    """Two heads on 512 tokens: a shared direction of all queries, and every 16th key, at random, far along it."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 512, 32, generator=generator)
    direction = torch.randn(32, generator=generator)
    query = query + 2 * direction / direction.norm() * 4
    key[:, torch.randperm(512, generator=generator)[:32]] += 3 * direction / direction.norm() * 3
    return Heads(0, query, key, value, 32**-0.5, lambda: (query, key))


def mass(heads, selection):
    """Mean attention mass inside what is computed."""
    logits = heads.query @ heads.keys.transpose(1, 2) * heads.scaling
    weights = masked_softmax(logits, causal(heads.tokens, heads.tokens, logits.device))
    return float((weights * selection.rows(0, heads.tokens)).sum(dim=2).mean())


def output(heads, selection):
    logits = heads.query @ heads.keys.transpose(1, 2) * heads.scaling
    bias = selection.bias_rows(0, heads.tokens)
    mask = selection.rows(0, heads.tokens) & causal(heads.tokens, heads.tokens, logits.device)
    return masked_softmax(logits if bias is None else logits + bias, mask) @ heads.value


def test_flexprefill_computes_more_the_more_mass_it_holds(heavy):
    found = [FlexPrefill(gamma=gamma, block_size=16).select(heavy).density for gamma in (0.3, 0.6, 0.9, 1.0)]
    assert found == sorted(found) and found[-1] == 1
    few, most = (FlexPrefill(gamma=0.9, block_size=16, max_budget=most).select(heavy) for most in (64, 512))
    assert few.density < most.density


def test_flexprefill_takes_blocks_where_pooling_predicts_the_columns(heavy):
    never, always = (FlexPrefill(gamma=0.9, block_size=16, tau=tau).select(heavy) for tau in (0.0, 1.0))
    assert never.extra["query_aware_heads"] == 0 and always.extra["query_aware_heads"] == 1
    assert mass(heavy, always) > 0.8


def test_anchor_attention_keeps_more_with_theta_and_counts_each_key_once(heavy):
    options = {"block_size": 16, "step": 4}
    found = [AnchorAttention(theta=theta, **options).select(heavy) for theta in (0.0, 2.0, 6.0, 1e9)]
    masses, stripes = [mass(heavy, one) for one in found], [one.extra["stripe_ratio"] for one in found]
    assert masses == sorted(masses) and stripes == sorted(stripes) and masses[-1] == pytest.approx(1)
    dense = output(heavy, found[-1])
    errors = {
        variant: (output(heavy, AnchorAttention(theta=4.0, variant=variant, **options).select(heavy)) - dense).norm()
        for variant in ("clean", "released")
    }
    assert errors["clean"] < errors["released"]


def test_stripes_hold_more_than_blocks_where_heavy_keys_are_scattered(heavy):
    stripes = AnchorAttention(sparsity=0.6, block_size=16, step=2).select(heavy)
    blocks = BlockSparse(sparsity=0.6, chunk_size=32).select(heavy)
    assert stripes.density == pytest.approx(blocks.density, abs=0.03)
    assert mass(heavy, stripes) > mass(heavy, blocks)


def test_the_permutation_gathers_scattered_heavy_keys(heavy):
    options = {"threshold": 0.9, "block_size": 16, "segment_size": 64}
    sorted_keys, plain = (PbsAttn(permutation=order, **options).select(heavy) for order in ("importance", "none"))
    assert sorted_keys.density < plain.density
    larger = PbsAttn(**{**options, "segment_size": 256, "threshold": 1e-6}).select(heavy)
    assert larger.density > PbsAttn(**{**options, "threshold": 1e-6}).select(heavy).density, "own segments are dense"
    shared = PbsAttn(share_permutation=True, **options).select(heavy)
    assert shared.density >= sorted_keys.density - 0.02


def test_minference_finds_the_best_of_its_candidates_for_each_head(model):
    tensors = learned(MInference(), model)
    assert tensors["patterns"].shape == (2, 4, 3)

    class Check(Handler):
        def allow(self, call):
            found = recall(heads_of(call, 0, 0, 200, {}))
            best = [candidates(200).index(tuple(pattern)) for pattern in tensors["patterns"][call.index].tolist()]
            assert found.argmax(dim=0).tolist() == best

    windows = torch.randint(2, 64, (4, 200), generator=torch.Generator().manual_seed(9))
    with torch.no_grad(), plugged(model, Check()):
        model(input_ids=windows[:1], use_cache=False)


def test_minference_in_the_released_form_has_lines_only(model):
    assert set(learned(MInference(assign="released"), model)["patterns"][..., 0].flatten().tolist()) == {1}
    counted = run(model, MInference(ratio=1.0, starting_layer=1), IDS)[1]
    assert counted.rows[0]["achieved"] == 0 < counted.rows[1]["achieved"]


@pytest.mark.parametrize("name", ["minference", "seer_attention"])
def test_what_was_learned_is_saved_and_loaded(model, name, tmp_path):
    method = METHODS[name].make(sparsity=0.5)
    first = attachment(method, model)
    save_file(first.fitted(), tmp_path / "fitted.safetensors")
    again = METHODS[name].make(sparsity=0.5, fitted_from=str(tmp_path / "fitted.safetensors"))
    again.check_model(model)
    loaded = again.fit(type("Around", (), {"loaded": type("Loaded", (), {"model": model})}))
    second = SparseAttention("test", 0.5, 0.03, again, model, loaded)
    logits = []
    for handler in (first, second):
        with torch.no_grad(), handler.attached():
            logits.append(model(input_ids=IDS).logits)
    assert logits[0].equal(logits[1])
    with pytest.raises(UserError, match="must be"):
        again.check_model(_deeper())


def _deeper():
    return LlamaForCausalLM(LlamaConfig(**{**make_llama(2).config.to_dict(), "num_hidden_layers": 3}))


def test_the_gate_learns_and_the_model_does_not(model):
    before = fingerprint(model)
    trained, fresh = (learned(SeerAttention(steps=steps, batch=2, lr=1e-2), model) for steps in (40, 1))
    assert fingerprint(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training
    losses = trained["gate_losses"]
    assert losses[-10:].mean() < losses[:10].mean()
    held = []
    for tensors in (fresh, trained):

        class Check(Handler):
            masses: list[float] = []  # noqa: RUF012

            def allow(self, call, tensors=tensors):
                for row in range(len(IDS)):
                    heads = heads_of(call, row, 0, IDS.shape[1], tensors)
                    self.masses.append(mass(heads, SeerAttention(nz_ratio=0.3).select(heads)))

        check = Check()
        check.masses = []
        with torch.no_grad(), plugged(model, check):
            model(input_ids=IDS, use_cache=False)
        held.append(sum(check.masses) / len(check.masses))
    assert held[1] > held[0]


def test_a_threshold_of_nothing_keeps_every_block(model):
    counted = run(model, SeerAttention(threshold=0.0, steps=1, batch=1), IDS)[1]
    assert counted.achieved == 0 and counted.columns["sparsity_reported"] == 0
    high = {"threshold": 0.5, "steps": 1, "batch": 1, "last_block_dense": False}
    empty, safe = (run(model, SeerAttention(force_diagonal=safe, **high), IDS) for safe in (False, True))
    assert empty[0].isfinite().all() and empty[1].achieved > safe[1].achieved


def test_minference_can_search_by_the_error_of_the_output(model):
    method = MInference(search="output")
    tensors = learned(method, model)
    tried = more_candidates(200)

    class Check(Handler):
        def allow(self, call):
            heads = heads_of(call, 0, 0, 200, {})
            found = method.exactness(heads)
            assert found.shape == (len(tried), 4) and bool((found <= 0).all())
            best = [tried.index(tuple(pattern)) for pattern in tensors["patterns"][call.index].tolist()]
            assert found.argmax(dim=0).tolist() == best

    windows = torch.randint(2, 64, (4, 200), generator=torch.Generator().manual_seed(9))
    with torch.no_grad(), plugged(model, Check()):
        model(input_ids=windows[:1], use_cache=False)
    assert [pattern[1:] for pattern in more_candidates(3500)][:6] == [
        (30, 800), (100, 800), (100, 750), (500, 700), (3500, 100), (1000, 4096),
    ]  # fmt: skip


def test_the_permutation_can_be_random_and_blocks_pooled_by_their_maximum(heavy):
    options = {"threshold": 0.9, "block_size": 16, "segment_size": 64}
    importance, random = (PbsAttn(permutation=order, **options).select(heavy) for order in ("importance", "random"))
    assert importance.density < random.density
    again = PbsAttn(permutation="random", **options).select(heavy)
    assert again.columns.equal(random.columns)
    padded = largest(-torch.ones(1, 20, 3), 16, 12)
    assert padded[0, :, 0].tolist() == [-1.0, 0.0], "padding counts as zeros"
    one, other = (PbsAttn(key_pool=pool, **options).select(heavy).mask for pool in ("mean", "max"))
    assert not one.equal(other)


def walked(verticals, slashes, size):
    """Tiles as they are described: one query tile after the other, offsets from the largest on."""
    tokens = len(verticals)
    mask = torch.zeros(-(-tokens // size), tokens, dtype=torch.bool)
    work = 0
    for row in range(len(mask)):
        end, stop = (row + 1) * size, None
        for offset in sorted((o for o in range(tokens) if slashes[o] and o < end), reverse=True):
            reach = max(end - offset, size)
            if stop is not None and reach <= stop:
                continue
            start = reach - size if stop is None or reach > stop + size else stop
            stop = start + size
            mask[row, start:stop] = True
            work += size * size
        single = [j for j in range(min(stop or 0, tokens)) if verticals[j] and not mask[row, j]]
        mask[row, single] = True
        work += size * len(single)
    return mask, work


@pytest.mark.parametrize("seed", range(12))
def test_tiles_are_those_of_a_walk(seed):
    draw = torch.Generator().manual_seed(seed)
    tokens, size = 40 + 7 * seed, (1, 4, 8, 16)[seed % 4]
    shares = torch.rand(2, generator=draw)
    verticals, slashes = (torch.rand(tokens, generator=draw) < share**2 for share in shares)
    found = slash_tiles(verticals[None], slashes[None], size)
    mask, work = walked(verticals, slashes, size)
    assert found.mask[0].equal(mask)
    assert float(found.reported[0]) == pytest.approx(1 - work / (tokens * (tokens + 1) / 2))
