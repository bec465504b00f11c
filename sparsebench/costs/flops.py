"""Floating-point operations of a Hugging Face causal decoder, from its shapes and its exact zeros.

Conventions (handbook of Liu and Wang 2023, section C), the same for every method:

- one multiply-add is 2 FLOPs;
- a linear layer costs ``2 * tokens * nonzero weights``; the language-model head is one of them, counted
  once per token (logits of every position, as when a text is scored), also when it is tied to the embedding;
- attention costs ``2 * head_dim`` for the score and ``2 * head_dim`` for the weighted sum, per query head and
  per computed pair (causal, within the sliding window); grouped keys and values do not lower that;
- not counted: embedding look-ups, biases, norms, softmax, activations, rotary embeddings.

They are theoretical: a masked weight run by a dense kernel takes the dense FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsebench.costs.saving import NO_SAVING, Saving
from sparsebench.errors import UserError
from sparsebench.kernels.stored import stored_form
from sparsebench.models.base import Read, as_it_is

# Fields of a config whose attention is not "every head, its own or grouped keys, one window per layer".
_FOREIGN = ("kv_lora_rank", "num_kv_shared_layers", "attention_types", "attention_chunk_size")


@dataclass(frozen=True)
class Matrix:
    """One linear layer: ``outputs x inputs`` weights, of which ``nonzero`` are not exactly 0."""

    name: str
    inputs: int
    outputs: int
    nonzero: int


@dataclass(frozen=True)
class Attention:
    """One attention layer. ``window``: tokens a query sees at most, itself included (None: all before it)."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None

    def keys(self, position: int) -> int:
        """Pairs computed by the query at ``position`` (0-based)."""
        return min(position + 1, self.window or position + 1)

    def pairs(self, length: int) -> int:
        """Pairs computed by the queries 0 .. ``length - 1``: the causal triangle, cut by the window."""
        full = min(length, self.window or length)
        return full * (full + 1) // 2 + (length - full) * full


@dataclass(frozen=True)
class ModelShape:
    """What the FLOPs of a decoder depend on: one ``Attention`` per layer, every linear layer, head included."""

    hidden: int
    vocab: int
    attention: tuple[Attention, ...]
    linears: tuple[Matrix, ...]

    @property
    def layers(self) -> int:
        return len(self.attention)

    @property
    def nonzero(self) -> int:
        """Nonzero weights of all linear layers: multiply-adds per token outside attention."""
        return sum(matrix.nonzero for matrix in self.linears)

    @property
    def weights(self) -> int:
        """All weights of the linear layers, zeros included."""
        return sum(matrix.inputs * matrix.outputs for matrix in self.linears)


def matrices(model: nn.Module, read: Read = as_it_is) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """Each linear layer as (name of the module, its parameter, its weight as a view (out, in)).

    Knows ``nn.Linear`` and GPT-2's ``Conv1D`` (stored transposed). UserError for a weight that is packed
    (quantised) or not in memory (offloaded): its zeros cannot be counted.
    """
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        stored: nn.Parameter = module.weight  # type: ignore[assignment]
        weight = read(f"{name}.weight", stored)
        if weight.is_meta:
            raise UserError(f"model.device_map: the weight of {name} is offloaded, its zeros cannot be counted")
        whole = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else stored.shape
        if stored.dim() != 2 or stored.shape != whole:
            raise UserError(f"model: the weight of {name} is packed (quantised?), its zeros cannot be counted")
        yield name, stored, weight if isinstance(module, nn.Linear) else weight.T


def attention_of(model: PreTrainedModel) -> tuple[Attention, ...]:
    """The attention layers, in order. Widths of separate q/k projections win over the config, so that layers
    whose heads were removed count right. UserError for attention of another kind (latent, linear, shared)."""
    config = model.config.get_text_config(decoder=True)
    for foreign in _FOREIGN:
        if getattr(config, foreign, None):
            raise _uncountable(model, f"its attention ({foreign}={getattr(config, foreign)!r})")
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    windows = _windows(model, config, layers)
    modules = [module for module in model.get_decoder().modules() if hasattr(module, "k_proj")]
    if len(modules) != layers:  # fused projections: nothing to read but the config
        return tuple(Attention(heads, kv_heads, head_dim, window) for window in windows)
    found = []
    for module, window in zip(modules, windows, strict=True):
        width = getattr(module, "head_dim", head_dim)
        queries = _outputs(module, "q_proj", heads * width)
        keys = _outputs(module, "k_proj", kv_heads * width)
        if queries % width or keys % width:
            raise _uncountable(model, f"q/k projections {queries} and {keys} wide with heads of {width}")
        found.append(Attention(queries // width, keys // width, width, window))
    return tuple(found)


def shape_of(model: PreTrainedModel, read: Read = as_it_is) -> ModelShape:
    """Reads the text decoder and its head: modules, config and exact nonzeros (``!= 0``).

    Modules outside the decoder (a vision tower) do not run for text and are left out. UserError when the
    decoder computes with weights that are neither linear layers nor embeddings (experts, convolutions).
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    for name, module in decoder.named_modules():
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                raise _uncountable(model, f"{name}.{own} {tuple(parameter.shape)}")
    running = {*decoder.modules(), head}
    linears = []
    for name, _, weight in matrices(model, read):
        if model.get_submodule(name) in running:
            outputs, inputs = weight.shape
            own = stored_form(model.get_submodule(name), weight)  # a method's own form keeps zeros too
            nonzero = int(torch.count_nonzero(weight)) if own is None else own.kept
            linears.append(Matrix(name, inputs, outputs, nonzero))
    config = model.config.get_text_config(decoder=True)
    return ModelShape(config.hidden_size, config.vocab_size, attention_of(model), tuple(linears))


def prefill(shape: ModelShape, length: int, *, dense: bool = False, saving: Saving = NO_SAVING) -> float:
    """FLOPs of one sequence of ``length`` tokens in one forward, in total (not per token), with the logits of
    every position. ``dense``: zeros count as if they were multiplied; ``saving``: what methods of inference time
    skip. ValueError if ``length`` < 0."""
    if length < 0:
        raise ValueError(f"length={length}: must be >= 0")
    if dense:
        return 2 * length * shape.weights + sum(_per_pair(layer) * layer.pairs(length) for layer in shape.attention)
    per_token = sum(one.nonzero * saving.linear.get(one.name, (1, 1))[0] for one in shape.linears)
    pairs = sum(_per_pair(layer) * layer.pairs(length) for layer in shape.attention)
    return 2 * length * per_token + pairs * saving.pairs_prefill + saving.index_prefill(length)


def decode(shape: ModelShape, length: int, *, dense: bool = False, saving: Saving = NO_SAVING) -> float:
    """FLOPs of one new token when ``length`` tokens are cached: it attends to ``length + 1`` (fewer within a
    window). ``dense`` and ``saving`` as in ``prefill``, which without savings is the sum of these. ValueError if
    ``length`` < 0."""
    if length < 0:
        raise ValueError(f"length={length}: must be >= 0")
    if dense:
        return 2 * shape.weights + sum(_per_pair(layer) * layer.keys(length) for layer in shape.attention)
    per_token = sum(one.nonzero * saving.linear.get(one.name, (1, 1))[1] for one in shape.linears)
    pairs = sum(_per_pair(layer) * layer.keys(length) for layer in shape.attention)
    return 2 * per_token + pairs * saving.pairs_decode + saving.index_decode(length)


def _per_pair(layer: Attention) -> int:
    """Score and weighted sum, 2 * head_dim each, for every query head."""
    return 4 * layer.heads * layer.head_dim


def _windows(model: PreTrainedModel, config: Any, layers: int) -> list[int | None]:
    """The window of each layer: ``layer_types`` where the config has it (Qwen, Gemma), else one for all (Mistral)."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window if getattr(config, "use_sliding_window", True) else None] * layers
    known: dict[str, int | None] = {"full_attention": None, "sliding_attention": window}
    for kind in kinds[:layers]:
        if kind not in known:
            raise _uncountable(model, f"layers of type {kind!r}")
    return [known[kind] for kind in kinds[:layers]]


def _outputs(module: nn.Module, name: str, default: int) -> int:
    """Width of a projection, ``default`` where it is not a plain linear layer."""
    projection = getattr(module, name, None)
    return projection.out_features if isinstance(projection, nn.Linear) else default


def _uncountable(model: PreTrainedModel, what: str) -> UserError:
    return UserError(f"model: no FLOP or KV-cache formula for {what} in {type(model).__name__}")
