"""Stored bytes against the published formulas, by hand, and over random masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, LlamaConfig, OPTConfig, PreTrainedModel, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from sparsebench.costs.storage import (
    bitmap_bytes,
    csr_bytes,
    kv_bytes_per_token,
    nm_bytes,
    smallest,
    weight_bytes,
)

SMALL = {
    "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1,
    "intermediate_size": 12, "vocab_size": 10,
}  # fmt: skip


def llama(*, tied: bool, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=tied), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    return model


def test_handbook_numbers() -> None:
    # 2:4 in 16 bits: 2 values and two 2-bit positions = 36 of 64 bits per group
    assert nm_bytes(nnz=2 * 1000, itemsize=2, m=4) * 8 == 36 * 1000
    # 1000 x 1000, half zero, 16 bits: CSR 2*5e5 + 4*(5e5 + 1001) = 3.004 MB, above the 2 MB of the dense matrix
    assert csr_bytes(rows=1000, nnz=500_000, itemsize=2) == 3_004_004
    assert bitmap_bytes(numel=10**6, nnz=500_000, itemsize=2) == 1_125_000


@pytest.mark.parametrize(("m", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (16, 4)])
def test_position_bits(m: int, bits: int) -> None:
    assert nm_bytes(nnz=80, itemsize=2, m=m) == 160 + 10 * bits


def test_parts_of_bytes_are_rounded_up() -> None:
    assert bitmap_bytes(numel=9, nnz=0, itemsize=2) == 2
    assert nm_bytes(nnz=1, itemsize=2, m=4) == 3


def test_smallest_format_by_hand() -> None:
    full = torch.ones(16, 64, dtype=torch.float16)  # 1024 entries, 2048 bytes
    assert smallest(full) == ("dense", 2048)

    two_four = full.clone()
    two_four[:, 0::4] = two_four[:, 1::4] = 0  # 512 kept: 1024 + 128; a bitmap is as large
    assert smallest(two_four) == ("2:4", 1152)

    one_four = full * (torch.arange(64) % 4 == 3)  # 256 kept: 512 + 64, the bitmap 512 + 128
    assert smallest(one_four) == ("1:4", 576)

    # 2:4 only down the outputs, not along the inputs: columns 0..31 full in even rows, 32..63 in odd rows
    wrong_way = full.clone()
    wrong_way[0::2, :32] = wrong_way[1::2, 32:] = 0
    assert smallest(wrong_way) == ("bitmap", 128 + 1024)

    broken = two_four.clone()
    broken[3, :4] = 1  # one group of four with 4 kept: 514 nonzeros
    assert smallest(broken) == ("bitmap", 128 + 1028)

    # 8 kept at random places: 16 + 4*(8 + 17) = 116 in CSR, 128 + 16 as a bitmap, 1:32 not held by row 0
    rare = torch.zeros(16, 64, dtype=torch.float16)
    rare[0, :8] = 1
    assert smallest(rare) == ("csr", 116)


def test_a_group_with_fewer_still_fills_its_slots() -> None:
    weight = torch.ones(16, 64, dtype=torch.float16) * (torch.arange(64) % 4 == 3)
    weight[0, :32] = 0  # 248 kept, but 256 slots: 512 + 64
    assert smallest(weight) == ("1:4", 576)


def test_groups_must_divide_the_inputs() -> None:
    weight = torch.ones(4, 6) * (torch.arange(6) % 4 < 2)  # 2:4 but for the half group at the end
    assert smallest(weight) == ("bitmap", 3 + 4 * 16)


def test_nothing_kept() -> None:
    assert smallest(torch.zeros(8, 64, dtype=torch.float16)) == ("csr", 36)  # 9 row offsets


def test_model_by_hand() -> None:
    # parameters: embedding 80, q 64, k 32, v 32, o 64, gate, up, down 96 each, three norms of 8: 584; 4 bytes each
    model = llama(tied=True)
    assert weight_bytes(model).dense == weight_bytes(model).sparse == 4 * 584
    assert weight_bytes(model).format == "dense"

    with torch.no_grad():
        for projection in ("gate_proj", "up_proj"):
            getattr(model.model.layers[0].mlp, projection).weight[:, 0::2] = 0  # (12, 8): 48 of 96 kept, 1:2
        model.model.layers[0].self_attn.q_proj.weight[:, 3:] = 0  # (8, 8): 24 of 64 kept
    stored = weight_bytes(model)
    # 1:2: 48*4 + 48/8 = 198 of 384; bitmap: 64/8 + 24*4 = 104 of 256
    assert stored.dense == 2336
    assert stored.sparse == 2336 - 2 * (384 - 198) - (256 - 104)
    layers = {layer["name"].split(".")[-1]: layer for layer in stored.per_layer}
    assert layers["gate_proj"] == {
        "name": "model.layers.0.mlp.gate_proj", "rows": 12, "cols": 8, "nonzero": 48,
        "format": "1:2", "dense_bytes": 384, "bytes": 198,
    }  # fmt: skip
    assert (layers["q_proj"]["format"], layers["q_proj"]["bytes"]) == ("bitmap", 104)
    assert "lm_head" not in layers
    # votes by dense bytes: dense k, v, o, down = 4 * 224, 1:2 = 4 * 192, bitmap = 4 * 64
    assert stored.format == "dense"
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 0::2] = 0
    assert weight_bytes(model).format == "1:2"


def test_a_tied_head_is_never_sparse_and_an_own_head_is() -> None:
    for tied, saved in ((True, 0), (False, 320 - (20 * 4 + 8))):  # 2:8: 20 values, 60 bits of positions
        model = llama(tied=tied)
        with torch.no_grad():
            model.get_output_embeddings().weight[:, 2:] = 0
        stored = weight_bytes(model)
        assert stored.dense == 4 * (584 if tied else 664)
        assert stored.dense - stored.sparse == saved
        assert stored.format == "dense"


def test_dtype_is_the_stored_one() -> None:
    assert weight_bytes(llama(tied=True, dtype=torch.bfloat16)).dense == 2 * 584


def test_kv_bytes() -> None:
    # keys and values, 1 layer, 2 heads, head_dim 2
    assert kv_bytes_per_token(llama(tied=True)) == 2 * 1 * 2 * 2 * 4
    assert kv_bytes_per_token(llama(tied=True, dtype=torch.bfloat16)) == 2 * 1 * 2 * 2 * 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Qwen3Config(**SMALL, head_dim=6), 2 * 1 * 2 * 6 * 4),
        (Gemma2Config(**SMALL, head_dim=4), 2 * 1 * 2 * 4 * 4),
        (OPTConfig(hidden_size=8, num_attention_heads=4, num_hidden_layers=3, ffn_dim=12, vocab_size=10,
                   word_embed_proj_dim=8, pad_token_id=1), 2 * 3 * 4 * 2 * 4),
    ],
)  # fmt: skip
def test_families(config: LlamaConfig, expected: int) -> None:
    model = AutoModelForCausalLM.from_config(config)
    assert kv_bytes_per_token(model) == expected
    stored = weight_bytes(model)
    assert stored.dense == stored.sparse == 4 * sum(parameter.numel() for parameter in model.parameters())


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 9), st.sampled_from([1, 3, 4, 6, 8, 16, 32, 64]), st.floats(0, 1), st.floats(0, 1),
    st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31),
)  # fmt: skip
def test_never_above_dense_and_never_more_for_fewer_weights(
    rows: int, cols: int, first: float, second: float, dtype: torch.dtype, seed: int
) -> None:
    places = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed))
    few, many = sorted((first, second))  # the kept entries of the sparser one are among those of the denser one
    sizes = [smallest((places < density).to(dtype))[1] for density in (few, many, 2.0)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == rows * cols * dtype.itemsize


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([2, 4, 8, 16, 32]), st.integers(0, 2**31))
def test_skipping_hopeless_patterns_misses_nothing(rows: int, groups: int, m: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, m + 1, (), generator=rng))
    kept = torch.rand(rows, groups, m, generator=rng).argsort(-1) < n  # exactly n in each group
    size = smallest(kept.reshape(rows, groups * m).to(torch.float16))[1]
    assert size <= nm_bytes(rows * groups * n, 2, m)
