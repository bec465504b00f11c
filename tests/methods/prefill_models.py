"""A small random Llama, the prefill methods with what their tests need, and one way to run them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsebench.methods.attention.anchor_attention import AnchorAttention
from sparsebench.methods.attention.base import AttentionMethod, SparseAttention
from sparsebench.methods.attention.block_sparse import BlockSparse
from sparsebench.methods.attention.flexprefill import FlexPrefill
from sparsebench.methods.attention.local_sink import LocalSink
from sparsebench.methods.attention.minference import MInference
from sparsebench.methods.attention.pbs_attn import PbsAttn
from sparsebench.methods.attention.seer_attention import SeerAttention
from sparsebench.methods.attention.vertical_slash import VerticalSlash
from sparsebench.methods.base import Surroundings
from sparsebench.models.base import LoadedModel

IDS = torch.randint(2, 64, (3, 200), generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Kind:
    """``everything``: native options that drop nothing, None if there are none; ``slack``: how near a target is
    reached on prompts of 200 tokens; ``mistakes``: (options, prompt's tokens, words of the message); ``always``:
    options that keep tests short."""

    kind: type[AttentionMethod]
    everything: dict[str, Any] | None
    slack: float = 0.03
    mistakes: tuple[tuple[dict[str, Any], int, list[str]], ...] = ()
    always: dict[str, Any] = field(default_factory=dict)

    def make(self, **options: Any) -> AttentionMethod:
        return self.kind(**self.always, **options)


METHODS = {
    "local_sink": Kind(
        LocalSink,
        {"n_local": 200},
        mistakes=(({"n_init": 300}, 200, ["n_init=300", "only 256 tokens"]),),
    ),
    "vertical_slash": Kind(
        VerticalSlash,
        {"vertical_size": 200, "slash_size": 200},
        mistakes=(
            ({"vertical_size": 2, "slash_size": 64}, 200, ["vertical_size=2", "forced_verticals=4"]),
            ({"vertical_size": 9, "slash_size": 3}, 200, ["slash_size=3", "8"]),
            ({"vertical_size": 9, "slash_size": 20}, 4096, ["slash_size=20", "64"]),
            ({"slash_size": 20}, 200, ["slash_size=20", "both"]),
            ({"approximation_size": 256}, 200, ["approximation_size=256", "only 200 tokens"]),
        ),
    ),
    "block_sparse": Kind(BlockSparse, {"top_chunks": 100}, slack=0.06, mistakes=()),
    "flexprefill": Kind(
        FlexPrefill,
        {"gamma": 1.0},
        mistakes=(
            ({"variant": "simplified", "approximation_size": 512}, 200, ["approximation_size=512", "only 256 tokens"]),
            ({"max_budget": 8, "min_budget": 64}, 200, ["max_budget=8", "min_budget=64"]),
        ),
    ),
    "flexprefill_simplified": Kind(FlexPrefill, {"gamma": 1.0}, always={"variant": "simplified"}),
    "anchor_released": Kind(AnchorAttention, None, always={"variant": "released"}),
    "tri_shape": Kind(LocalSink, {"n_local": 200}, always={"shape": "tri_shape"}),
    "minference": Kind(
        MInference,
        {"ratio": 400.0},
        mistakes=(({"fitted_from": "/no/such/file"}, 200, ["fitted_from=/no/such/file", "safetensors"]),),
    ),
    "anchor_attention": Kind(AnchorAttention, {"theta": 1e9}),
    "pbs_attn": Kind(
        PbsAttn,
        {"threshold": 1.0},
        mistakes=(
            ({"block_size": 16, "segment_size": 40}, 200, ["segment_size=40", "16"]),
            ({"segment_size": 60}, 200, ["segment_size=60", "8"]),
        ),
    ),
    "seer_attention": Kind(
        SeerAttention,
        {"nz_ratio": 1.0},
        slack=0.06,
        mistakes=(
            ({"gate_type": "Qmean_Kavg"}, 200, ["gate_type=Qmean_Kavg", "Qavg_Kmaxminavg"]),
            ({"threshold": 0.1, "nz_ratio": 0.5}, 200, ["nz_ratio=0.5", "not both"]),
            ({"gate_hidden_size": 7}, 200, ["gate_hidden_size=7", "even"]),
        ),
        always={"steps": 2, "batch": 2},
    ),
}


def learned(method: AttentionMethod, model: Any) -> dict[str, torch.Tensor]:
    """What a method learns on other tokens."""
    windows = torch.randint(2, 64, (4, 200), generator=torch.Generator().manual_seed(9))
    return method.fit(Surroundings(LoadedModel(model, None, "toy", 256), lambda: windows, 0))


def make_llama(kv_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=8, max_position_embeddings=256, initializer_range=0.3,
        pad_token_id=0, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(shape).eval()


def attachment(method: AttentionMethod, model: Any) -> SparseAttention:
    return SparseAttention("test", method.asked, method.tolerance, method, model, learned(method, model))


@torch.no_grad()
def run(model: Any, method: AttentionMethod | None, ids: torch.Tensor, **words: Any) -> Any:
    """Logits of the dense model, or logits and counts under a method."""
    if method is None:
        return model(input_ids=ids, use_cache=False, **words).logits
    handler = attachment(method, model)
    with handler.attached():
        logits = model(input_ids=ids, use_cache=False, **words).logits
    return logits, handler.counted()
