"""A wider Llama that starts as a trained narrower one: the same function, twice the width.

Every hidden feature, attention query head and MLP neuron exists twice, with the halves' incoming
weights halved (HyperCloning: "Scaling Smart", Samragh et al. 2024, section 3). Exact copies would
get equal gradients for ever, so the two copies of an incoming weight differ by a noise that cancels
as long as the copies of the input agree: the function is the same at the first step, and the copies
part from then on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@torch.no_grad()
def widen(narrow: LlamaForCausalLM, wide: LlamaForCausalLM, noise: float = 0.3) -> None:
    """Gives ``wide`` (twice the hidden size, query heads and MLP width, as many layers and key/value heads,
    tied embeddings) the function of ``narrow``, to float32 precision.

    ``noise``: standard deviation of the difference of two copies, in units of the matrix's own."""
    draw = torch.Generator().manual_seed(0)
    source = narrow.float().state_dict()
    config: Any = narrow.config
    groups, queries = config.num_key_value_heads, config.num_attention_heads * config.head_dim
    # query heads stay beside the key/value head that they read: (q0 q1 | q2 q3) -> (q0 q1 q0 q1 | q2 q3 q2 q3)
    rows = torch.arange(queries).reshape(groups, 1, -1).expand(-1, 2, -1).flatten()

    def halves(weight: Tensor) -> Tensor:
        """(out, in) -> (out, 2 in): the copies of the input share the weight, apart by the noise."""
        jitter = noise * weight.std() * torch.randn(weight.shape, generator=draw)
        return torch.cat([(weight + jitter) / 2, (weight - jitter) / 2], dim=1)

    result = {}
    for name, value in source.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            result[name] = torch.cat([value, value], dim=1)
        elif name == "model.norm.weight":
            result[name] = torch.cat([value, value]) / 2  # the tied head adds both copies
        elif name.endswith("norm.weight"):
            result[name] = torch.cat([value, value])
        elif name.endswith(("k_proj.weight", "v_proj.weight")):
            result[name] = halves(value)
        elif name.endswith("q_proj.weight"):
            result[name] = torch.cat([halves(v) for v in value[rows].chunk(2)])
        elif name.endswith("o_proj.weight"):
            mixed = halves(value).reshape(len(value), 2, groups, -1).transpose(1, 2).flatten(1)
            again = halves(value).reshape(len(value), 2, groups, -1).transpose(1, 2).flatten(1)
            result[name] = torch.cat([mixed, again])
        else:  # gate, up and down projections
            result[name] = torch.cat([halves(value), halves(value)])
    wide.load_state_dict(result)
