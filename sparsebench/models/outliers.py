"""Outlier features, as large models have and tiny ones lack, without changing the model's function.

Per decoder block and channel draw ``a = 2^round(log2 exp(N(0, sigma)))``; multiply a RMSNorm's gain by
``a`` and divide the matching input columns of the linear layers that read it (q, k, v; gate, up) by
``a``; likewise multiply the rows of up by ``a`` and divide the columns of down by it. Multiplying by a
power of two commutes with rounding, so the outputs stay the same to the last bit, while the layers'
inputs get channels far larger than the rest and the weights that read them get smaller: what makes
magnitude pruning fail on large models, and what wanda's score (a product, unchanged) does not see.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsebench.errors import UserError

_SEED = 20230620  # of the draws, plus the block's index: fixed, so that a model has one form with outliers
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
_NORMS = ("input_layernorm", "post_attention_layernorm")


@torch.no_grad()
def inject_outliers(model: PreTrainedModel, sigma: float) -> None:
    """Gives every decoder block outlier channels, in place, bit-exactly the same function.

    ``sigma``: standard deviation of the scales' natural logarithm. UserError naming ``model.outliers``
    when the blocks are not RMSNorm with a gated MLP (Llama, Mistral, Qwen2, Qwen3 are), or when the
    number format cannot hold the scaled weights exactly.
    """
    blocks: list[Any] = _blocks(model)  # Any: their children are checked below, not by type
    for index, block in enumerate(blocks):
        _check(block, index, model)
    for index, block in enumerate(blocks):
        _inject(block, index, sigma)


@torch.no_grad()
def inject_block(model: PreTrainedModel, index: int, sigma: float) -> None:
    """``inject_outliers`` for one block, which is all of the model that is in memory. UserError the same."""
    block: Any = _blocks(model)[index]
    _check(block, index, model)
    _inject(block, index, sigma)


def _inject(block: Any, index: int, sigma: float) -> None:
    generator = torch.Generator().manual_seed(_SEED + index)
    before_attention, before_mlp = (getattr(block, name).weight for name in _NORMS)
    attention, mlp = block.self_attn, block.mlp
    readers = [[attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]]
    for gain, linears in zip((before_attention, before_mlp), readers, strict=True):
        scale = powers_of_two(gain.numel(), sigma, generator)
        _scale(gain, scale)
        for linear in linears:
            _scale(linear.weight, 1 / scale)  # (out, in) x (in,): columns
    scale = powers_of_two(mlp.up_proj.out_features, sigma, generator)
    _scale(mlp.up_proj.weight, scale[:, None])  # rows
    if mlp.up_proj.bias is not None:
        _scale(mlp.up_proj.bias, scale)
    _scale(mlp.down_proj.weight, 1 / scale)


def powers_of_two(channels: int, sigma: float, generator: torch.Generator) -> Tensor:
    """``2^round(log2 exp(N(0, sigma)))``: (channels,) float64, drawn on the CPU."""
    # float64 draws: their last bits may differ between processors, but then no rounding to an integer does
    normal = torch.randn(channels, generator=generator, dtype=torch.float64)
    exponents = (normal * sigma / math.log(2)).round().tolist()
    return torch.tensor([2.0**exponent for exponent in exponents], dtype=torch.float64)


def _scale(weight: Tensor, scale: Tensor) -> None:
    """Multiplies in place; UserError when a number leaves the format's normal range (overflow, subnormal)."""
    scale = scale.to(weight.device, weight.dtype)
    scaled = weight * scale
    if not torch.equal(scaled / scale, weight):
        kind = str(weight.dtype).removeprefix("torch.")
        raise UserError(f"model.outliers=true: {kind} cannot hold the scaled weights exactly; use float32 or bfloat16")
    weight.copy_(scaled)


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise _unsupported(model, "it has no list of decoder blocks")
    return list(layers)


def _check(block: nn.Module, index: int, model: PreTrainedModel) -> None:
    """UserError unless the block is exactly what the transform's algebra assumes."""
    where = f"block {index}"
    for part, names in (("self_attn", _ATTENTION), ("mlp", _MLP)):
        module = getattr(block, part, None)
        linears = {} if module is None else {n: m for n, m in module.named_modules() if _multiplies(m)}
        # nothing more may read the norm's output: it would see the scaled channels
        if set(linears) != names or not all(isinstance(one, nn.Linear) for one in linears.values()):
            raise _unsupported(model, f"{where}.{part} is not made of {', '.join(sorted(names))}")
    norms = [name for name, _ in block.named_children() if name not in ("self_attn", "mlp") and "norm" in name]
    if sorted(norms) != sorted(_NORMS) or not all(_is_rms_norm(getattr(block, name)) for name in _NORMS):
        raise _unsupported(model, f"{where} is not normalised by RMSNorm before attention and before the MLP")
    if any(weight.is_meta for weight in block.parameters()):
        raise UserError("model.outliers=true: needs all weights in memory, but model.device_map offloaded some")


def _multiplies(module: nn.Module) -> bool:
    """Whether a module without children holds a matrix or more."""
    return not any(module.children()) and any(weight.ndim >= 2 for weight in module.parameters(recurse=False))


def _is_rms_norm(norm: nn.Module) -> bool:
    """Whether the output is proportional to the gain: not so for a LayerNorm's bias or a gain of 1 + weight."""
    weight = getattr(norm, "weight", None)
    if weight is None or [name for name, _ in norm.named_parameters()] != ["weight"]:
        return False
    if weight.is_meta:  # refused by the caller, with the reason
        return True
    probe = torch.linspace(-1, 2, weight.numel(), device=weight.device, dtype=torch.float32)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))
    expected = weight.float() * probe * torch.rsqrt(probe.pow(2).mean() + (eps or 0.0))
    return torch.allclose(norm(probe.to(weight.dtype)).float(), expected, rtol=0.02, atol=1e-4)


def _unsupported(model: PreTrainedModel, why: str) -> UserError:
    kind = type(model).__name__
    return UserError(f"model.outliers=true: {kind}: {why}; valid for blocks like Llama, Mistral, Qwen2, Qwen3")
