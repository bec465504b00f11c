"""FLOPs against numbers worked out by hand, against PyTorch's own counter, and across model families."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from sparsebench.costs.flops import Attention, Matrix, ModelShape, decode, prefill, shape_of
from sparsebench.errors import UserError

TINY = {"hidden_size": 8, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 10}
GROUPED = {**TINY, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 12}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=3),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED),
    "gemma": lambda: GemmaConfig(**GROUPED),
    "gemma2": lambda: Gemma2Config(**GROUPED, sliding_window=3),
    "gemma3": lambda: Gemma3TextConfig(**GROUPED, sliding_window=3),
    "opt": lambda: OPTConfig(**TINY, ffn_dim=12, word_embed_proj_dim=6, pad_token_id=1),
    "gpt2": lambda: GPT2Config(n_embd=8, n_head=4, n_layer=2, vocab_size=10, n_positions=32),
}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # no accidental zeros: padding rows, biases
            parameter.copy_(torch.randn_like(parameter) + 3)
    return model.eval()


@pytest.fixture
def paper_llama() -> PreTrainedModel:
    """One layer, width 8, 4 heads of 2 over 2 key heads, MLP 12, vocabulary 10, tied embeddings."""
    return build(
        LlamaConfig(
            hidden_size=8, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, intermediate_size=12,
            vocab_size=10, tie_word_embeddings=True,
        )
    )  # fmt: skip


def test_one_layer_by_hand(paper_llama: PreTrainedModel) -> None:
    # weights: q 8*8=64, k 8*4=32, v 8*4=32, o 8*8=64, gate, up, down 8*12=96 each, head 8*10=80: 560
    # 3 tokens: linear 2*3*560 = 3360; pairs 1+2+3 = 6, each 4 heads * (2*2 + 2*2) = 32: 192; in total 3552
    # a token after 2: linear 2*560 = 1120; 3 pairs * 32 = 96; in total 1216
    shape = shape_of(paper_llama)
    assert shape.attention == (Attention(heads=4, kv_heads=2, head_dim=2, window=None),)
    assert (shape.layers, shape.hidden, shape.vocab, shape.weights, shape.nonzero) == (1, 8, 10, 560, 560)
    assert shape.linears[0] == Matrix("model.layers.0.self_attn.q_proj", 8, 8, 64)
    assert shape.linears[-1] == Matrix("lm_head", 8, 10, 80)
    assert prefill(shape, 3) == prefill(shape, 3, dense=True) == 3552
    assert decode(shape, 2) == decode(shape, 2, dense=True) == 1216
    assert prefill(shape, 0) == 0


def test_zeros_are_taken_off_exactly(paper_llama: PreTrainedModel) -> None:
    # half of gate's 96 weights are zero: 48 multiply-adds fewer a token; -0.0 is a zero, 1e-30 is not
    before = shape_of(paper_llama)
    gate = paper_llama.model.layers[0].mlp.gate_proj.weight
    with torch.no_grad():
        gate[:, ::2] = 0.0
        gate[0, 0], gate[0, 1] = -0.0, 1e-30
    after = shape_of(paper_llama)
    assert after.nonzero == before.nonzero - 48
    assert prefill(after, 5) == prefill(before, 5) - 2 * 5 * 48
    assert decode(after, 5) == decode(before, 5) - 2 * 48
    assert prefill(after, 5, dense=True) == prefill(before, 5)


def test_a_zero_in_the_tied_embedding_is_a_zero_of_the_head(paper_llama: PreTrainedModel) -> None:
    with torch.no_grad():
        paper_llama.get_input_embeddings().weight[4] = 0
    shape = shape_of(paper_llama)
    assert {matrix.name: matrix.nonzero for matrix in shape.linears}["lm_head"] == 72


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_part_is_what_pytorch_counts(family: str) -> None:
    # eager attention is bmm, every linear layer is mm or addmm: two independent counts of the same products
    model, length = build(FAMILIES[family]()), 7
    shape = shape_of(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(length)[None], use_cache=False)
    ops = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    assert ops.get("aten.mm", 0) + ops.get("aten.addmm", 0) == 2 * length * shape.nonzero
    if family in ("opt", "gpt2"):  # no rotary embedding: bmm is attention alone, over the full square
        assert ops["aten.bmm"] == sum(4 * at.heads * at.head_dim for at in shape.attention) * length**2


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_is_the_sum_of_its_decode_steps(family: str) -> None:
    shape = shape_of(build(FAMILIES[family]()))
    for dense in (False, True):
        for length in range(9):
            steps = sum(decode(shape, t, dense=dense) for t in range(length))
            assert prefill(shape, length, dense=dense) == steps


def test_windows_per_layer() -> None:
    assert [at.window for at in shape_of(build(FAMILIES["mistral"]())).attention] == [3, 3]
    assert [at.window for at in shape_of(build(FAMILIES["gemma2"]())).attention] == [3, None]
    assert [at.window for at in shape_of(build(FAMILIES["qwen2"]())).attention] == [None, None]
    turned_on = Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=3, max_window_layers=1)
    assert [at.window for at in shape_of(build(turned_on)).attention] == [None, 3]


def test_window_of_three_by_hand() -> None:
    # queries 0..4 see 1, 2, 3, 3, 3 tokens
    attention = Attention(heads=1, kv_heads=1, head_dim=1, window=3)
    assert [attention.keys(t) for t in range(5)] == [1, 2, 3, 3, 3]
    assert [attention.pairs(n) for n in range(6)] == [0, 1, 3, 6, 9, 12]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 64), st.none() | st.integers(1, 40)), min_size=1, max_size=4),
    st.integers(0, 10_000), st.integers(0, 10_000), st.integers(0, 60),
)  # fmt: skip
def test_identities(layers: list[tuple[int, int, int | None]], nonzero: int, zeros: int, length: int) -> None:
    attention = tuple(Attention(heads, 1, dim, window) for heads, dim, window in layers)
    shape = ModelShape(8, 10, attention, (Matrix("only", 1, nonzero + zeros, nonzero),))
    assert prefill(shape, length + 1) - prefill(shape, length) == decode(shape, length)
    assert prefill(shape, length, dense=True) - prefill(shape, length) == 2 * length * zeros
    assert decode(shape, length, dense=True) - decode(shape, length) == 2 * zeros


def test_removed_heads_are_read_from_the_widths() -> None:
    model = build(LlamaConfig(**GROUPED))
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.nn.Linear(8, 2 * 4, bias=False)
    attention.k_proj = torch.nn.Linear(8, 1 * 4, bias=False)
    assert shape_of(model).attention == (Attention(4, 2, 4), Attention(2, 1, 4))


def test_fused_experts_are_refused() -> None:
    experts = MixtralConfig(**GROUPED, num_local_experts=2)
    with pytest.raises(UserError, match=r"^model: .*mlp.* in MixtralForCausalLM$"):
        shape_of(build(experts))


def test_offloaded_weights_are_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED))
    with pytest.raises(UserError, match=r"^model\.device_map: .*q_proj is offloaded"):
        shape_of(model)


@pytest.mark.parametrize("count", [prefill, decode])
def test_negative_length(count: Callable[[ModelShape, int], int]) -> None:
    with pytest.raises(ValueError, match="length=-1"):
        count(ModelShape(8, 10, (), ()), -1)
