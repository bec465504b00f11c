"""The outlier transform changes the weights and their inputs, and not one bit of the outputs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from sparsebench.errors import UserError
from sparsebench.models.outliers import inject_outliers, powers_of_two

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SUPPORTED = [
    LlamaConfig(**SHAPE), LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True), MistralConfig(**SHAPE),
    Qwen2Config(**SHAPE), Qwen3Config(**SHAPE),
]  # fmt: skip
UNSUPPORTED = [
    OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4,
              max_position_embeddings=64, word_embed_proj_dim=32),
    GemmaConfig(**SHAPE), Gemma2Config(**SHAPE), Phi3Config(**SHAPE), Olmo2Config(**SHAPE), CohereConfig(**SHAPE),
    Qwen2MoeConfig(**SHAPE, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
                   shared_expert_intermediate_size=16),
]  # fmt: skip


def build(config: PretrainedConfig) -> PreTrainedModel:
    """A random model whose gains and biases are not all one or zero."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(64).reshape(2, 32), use_cache=False).logits


@pytest.mark.parametrize("sigma", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("config", SUPPORTED, ids=lambda config: config.model_type)
def test_logits_are_bit_exactly_the_same(config: PretrainedConfig, sigma: float) -> None:
    model = build(config)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    inject_outliers(model, sigma)
    assert torch.equal(logits(model), before)
    changed = {
        name.split("layers.0.")[-1] for name, old in weights.items() if not torch.equal(model.state_dict()[name], old)
    }
    expected = {"input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_proj.weight",
                "self_attn.k_proj.weight", "self_attn.v_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
                "mlp.down_proj.weight"}  # fmt: skip
    assert (expected <= changed) if sigma else not changed


def test_bfloat16_is_exact_too() -> None:
    model = build(LlamaConfig(**SHAPE)).bfloat16()
    before = logits(model)
    inject_outliers(model, 1.0)
    assert torch.equal(logits(model), before)


def test_float16_is_refused_where_it_would_round() -> None:
    model = build(LlamaConfig(**SHAPE)).half()
    with pytest.raises(UserError, match=r"^model\.outliers=true: float16 cannot hold"):
        inject_outliers(model, 4.0)


def test_the_draws_are_fixed_and_differ_between_blocks() -> None:
    first, second = build(LlamaConfig(**SHAPE)), build(LlamaConfig(**SHAPE))
    plain = first.model.layers[0].input_layernorm.weight.detach().clone()
    other = first.model.layers[1].input_layernorm.weight.detach().clone()
    torch.manual_seed(7)  # the global generator, hence a run's seed, plays no part
    inject_outliers(first, 1.0)
    torch.manual_seed(8)
    inject_outliers(second, 1.0)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    scales = [layer.input_layernorm.weight / old for layer, old in zip(first.model.layers, (plain, other), strict=True)]
    assert not torch.equal(scales[0], scales[1])


def test_scales_are_powers_of_two_with_the_asked_spread() -> None:
    scales = powers_of_two(20000, 1.0, torch.Generator().manual_seed(0))
    exponents = torch.log2(scales)
    assert torch.equal(exponents, exponents.round())
    # the standard deviation of N(0, 1 / ln 2) rounded to integers: sqrt(1 / ln(2)^2 + 1 / 12)
    assert exponents.std().item() == pytest.approx(math.sqrt(1 / math.log(2) ** 2 + 1 / 12), rel=0.03)


@pytest.mark.parametrize("config", UNSUPPORTED, ids=lambda config: config.model_type)
def test_other_architectures_are_refused_untouched(config: PretrainedConfig) -> None:
    model = build(config)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"^model\.outliers=true: [^\n]*$"):
        inject_outliers(model, 1.0)
    assert all(torch.equal(old, model.state_dict()[name]) for name, old in before.items())
