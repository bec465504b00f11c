"""SpeContext: a small distilled model picks the context (Xu et al. 2025, arXiv 2512.00722), rebuilt: there is no
released code.

    q_t = RoPE(W_q e_t), k_t = RoPE(W_k e_t);   a_t[h, j] = softmax_j( q_t[h] . k_j / sqrt(D) )
    score[g, j] = max over the query heads of KV head g;   read = sinks + recent + the best others, ``budget`` in all

before the large model runs, from its own normed embeddings e, and the same choice for all of its layers. W_q and W_k
are those of a one-layer model distilled from the large one's next-token distribution (``source=distill``), from its
mean attention (``attn_kd``, an ablation), or the large model's own first layer (``layer0``, no training); in each case
the heads are those of the large model. The distillation is the method's fit, on calibration windows. Prompts are
dense, nothing is dropped, and decoded tokens may fall out of what is read like any others. Elastic loading is counted:
``kv_loaded`` is the share of a step's choice that the step before did not have. Where the cache lies is simulated in
``offload``. Achieved sparsity is 1 - read / prompt over decoded tokens; ``kv_read`` and ``kv_stored`` also count the
retrieval head's keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsebench.costs.flops import Attention, attention_of
from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.base import Surroundings
from sparsebench.methods.kv_cache.base import Selector, scaled
from sparsebench.methods.kv_cache.distilling import distilled, projected
from sparsebench.methods.kv_cache.entries import Entries, newest, oldest, top
from sparsebench.methods.kv_cache.offload import layers_on_gpu, thresholds
from sparsebench.methods.kv_cache.rotary import needs_rotary
from sparsebench.models.plug.cache import HOLE

KEYS, BEFORE = "specontext_keys", "specontext_before"  # the retrieval head's keys; what the last token read


@method(
    name="specontext",
    version=1,
    paper="Xu et al. 2025, arXiv 2512.00722",
    target="kv_cache",
    phase="decode",
    uses=("calibration", "seed"),
    baseline="streaming_llm",
    taxonomy=Taxonomy(
        object="kv_cache",
        granularity=("token",),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        data_need="calibration",
        benefit_realised_on=("memory", "flops"),
        kernel_required="gathered attention",
    ),
)
@dataclass(frozen=True)
class SpeContext(Selector):
    """Each decoded token reads what a small distilled model attends to, in all layers alike."""

    source: str = option("distill", "where the retrieval head comes from", choices=("distill", "layer0", "attn_kd"))
    distill_steps: int = option(200, "training steps of the small model", low=1, high=1_000_000)
    distill_lr: float = option(1e-3, "its learning rate", above=0.0, below=1.0)
    n_sink: int = option(4, "first tokens that are read", low=0, unit="tokens")
    n_recent: int | None = option(
        None, "last tokens that are read; 32, at most half of the budget, if not given", low=1, unit="tokens"
    )
    head_level: bool = option(True, "a choice per KV head, or one for all")
    group_reduce: str = option("max", "how query heads choose together", choices=("max", "mean"))
    gpu_memory: float | None = option(
        None, "say how many layers' caches stay on a GPU of this size at the model's context", above=0.0, unit="GB"
    )
    dense_layers: int = option(0, "first layers that read everything", low=0)

    def check_model(self, model: PreTrainedModel) -> None:
        layers = attention_of(model)
        if self.dense_layers >= len(layers):
            raise UserError(f"{self.name('dense_layers')}: the model has {len(layers)} layers, none would be sparse")
        if self.gpu_memory is not None:
            try:
                self._resident(model)
            except ValueError as error:
                raise UserError(f"{self.name('gpu_memory')}: {error}") from None
        shapes = {(layer.heads, layer.kv_heads, layer.head_dim) for layer in layers}
        if len(shapes) > 1:
            raise UserError("method=specontext: the model's layers have different heads, so they cannot share a choice")
        needs_rotary(model, "method=specontext")

    def forced(self, kept: int) -> int:
        return self.n_sink + max(1, scaled(self.n_recent, 32, kept // 2)) + 1

    def fit(self, around: Surroundings) -> dict[str, Tensor]:
        if self.source == "layer0":
            return {}
        model = around.loaded.model
        found, loss = distilled(
            model, attention_of(model)[0], around.calibration(), steps=self.distill_steps, rate=self.distill_lr,
            seed=around.seed, of_attention=self.source == "attn_kd", progress=around.progress,
        )  # fmt: skip
        return found | {"loss": torch.tensor(loss)}

    def before(self, now: Entries) -> None:
        if now.call.index == 0 and self.asked != 0 and self.source != "layer0":
            self._cache_keys(now)

    def _cache_keys(self, now: Entries) -> None:
        """The retrieval head's keys of the new tokens, beside the entries of the first layer."""
        call, state = now.call, now.layer.state
        new = projected(call.hidden.float(), now.learned["key"], call.key.shape[-1], call.rotary)
        if KEYS not in state:
            state[KEYS] = new.new_zeros(*now.valid.shape, new.shape[-1])
        state[KEYS][:, :, -call.tokens :] = new

    def select(self, now: Entries, count: Tensor) -> Tensor | None:
        if now.call.index == 0:
            now.shared["specontext"] = self._by_position(now, self.choose(now, count))
        if now.call.index < self.dense_layers:
            return None
        chosen: Tensor = now.shared["specontext"]
        where = now.call.key_positions
        found = chosen.gather(3, where.clamp(min=0)[:, :, None].expand(-1, -1, chosen.shape[2], -1))
        return found & (where != HOLE)[:, :, None]

    def choose(self, now: Entries, count: Tensor) -> Tensor:
        """(B, K, T, S) bool: what the new tokens read in all layers, of budgets ``count`` (B,)."""
        seen = now.visible()
        sink = torch.full_like(count, self.n_sink)
        recent = torch.tensor([max(1, scaled(self.n_recent, 32, int(one) // 2)) for one in count], device=count.device)
        edges = oldest(seen, sink[:, None, None]) | newest(seen, recent[:, None, None])
        best = top(self.scores(now), (count - sink - recent).clamp(min=0)[:, None, None], seen & ~edges)
        chosen = edges | best
        state = now.layer.state
        last = state.get(BEFORE, torch.zeros_like(now.valid))
        previous = torch.cat([last[:, :, None], chosen[:, :, :-1]], dim=2)
        for name, value in (("loaded", chosen & ~previous), ("chosen", chosen)):
            now.notes[name] = now.notes.get(name, 0.0) + float(value.sum())
        state[BEFORE] = chosen[:, :, -1].contiguous()
        return chosen

    def scores(self, now: Entries) -> Tensor:
        """(B, K, T, S) float32: the retrieval head's attention, by KV head or the same for all."""
        call = now.call
        if self.source == "layer0":
            weights = now.attention(call.tokens)
        else:
            query = projected(call.hidden.float(), now.learned["query"], call.key.shape[-1], call.rotary)
            logits = query @ now.repeated(now.layer.state[KEYS]).transpose(-1, -2) * query.shape[-1] ** -0.5
            weights = logits.masked_fill(~now.repeated(now.visible()), -torch.inf).softmax(dim=-1).nan_to_num(0.0)
        groups = now.grouped(weights) if self.head_level else weights[:, None]
        scores = groups.amax(dim=2) if self.group_reduce == "max" else groups.mean(dim=2)
        return scores.expand(-1, now.valid.shape[1], -1, -1)

    def _by_position(self, now: Entries, chosen: Tensor) -> Tensor:
        """(B, K, T, L) bool over true positions, for layers that may have dropped other entries."""
        where = torch.where(now.valid, now.call.key_positions, 0)[:, :, None].expand(chosen.shape)
        out = torch.zeros(*chosen.shape[:3], now.call.slots.shape[-1], dtype=torch.uint8, device=chosen.device)
        return out.scatter_reduce(3, where, (chosen & now.valid[:, :, None]).byte(), "amax").bool()

    def choosing(self, layers: int) -> range:
        return range(1)

    def stored(self, now: Entries) -> Tensor:
        return now.seen if self.source == "layer0" else now.seen + self.index_read(now)

    def index_read(self, now: Entries) -> Tensor:
        """The retrieval head's keys, half an entry each, once for all layers."""
        return now.seen * (0.5 if now.call.index == 0 and self.asked != 0 else 0.0)

    def index_prefill(self, layer: Attention, length: int) -> float:
        return length * self._projection(layer, keys_only=True)

    def index_decode(self, layer: Attention, length: int) -> float:
        return self._projection(layer, keys_only=False) + 2.0 * layer.heads * layer.head_dim * length

    def _projection(self, layer: Attention, keys_only: bool) -> float:
        """FLOPs of W_k, and W_q, per token, for a model as wide as its heads."""
        if self.source == "layer0":
            return 0.0
        return 2.0 * layer.heads * layer.head_dim**2 * (layer.kv_heads + (0 if keys_only else layer.heads))

    def columns(self, notes: Mapping[str, float], model: PreTrainedModel) -> dict[str, Any]:
        found: dict[str, Any] = {"kv_loaded": notes["loaded"] / notes["chosen"]} if notes.get("chosen") else {}
        if self.gpu_memory is not None:
            found["kv_layers_on_gpu"] = self._resident(model)
        return found

    def _resident(self, model: PreTrainedModel) -> int:
        """c*: layers whose caches stay on the GPU at the model's context, the others with slots for the budget."""
        layers, size, context = attention_of(model), model.dtype.itemsize, model.config.max_position_embeddings
        per_layer = [2.0 * layer.kv_heads * layer.head_dim * size for layer in layers]
        budget = min(context, int(self.kept(torch.tensor(context))))
        retrieval = 0.0 if self.source == "layer0" else per_layer[0] / 2
        weights = float(sum(one.numel() * one.element_size() for one in model.parameters()))
        return layers_on_gpu(thresholds(per_layer, budget, (self.gpu_memory or 0.0) * 1e9, weights, retrieval), context)
