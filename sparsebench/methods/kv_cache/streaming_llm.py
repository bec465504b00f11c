"""StreamingLLM: attention sinks and a sliding window of the cache (Xiao et al. 2023, arXiv 2309.17453).

    kept = [0 .. n_sink) and [n - recent .. n),   budget = n_sink + recent

After every forward the entries between the first ``n_sink`` and the last ``recent`` ones are dropped. With
``positions=cache`` (the paper) keys and queries are rotated to their places inside the cache, so that a stream may be
longer than the model's context; ``positions=text`` leaves them at their places in the text (kvpress). ``room=1`` leaves
a place for the token that comes, as the paper's streaming loop does (``evict_for_space``). ``while_decoding=false``
drops once, at the end of the prompt (kvpress). The budget must be above ``n_sink``: kvpress' slice runs past the end
there and ties decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.kv_cache.base import Evictor
from sparsebench.methods.kv_cache.entries import Entries, newest, oldest
from sparsebench.methods.kv_cache.rotary import needs_rotary, turned


@method(
    name="streaming_llm",
    version=1,
    paper="Xiao et al. 2023, arXiv 2309.17453",
    target="kv_cache",
    phase="prefill+decode",
    baseline="random_kv",
    taxonomy=Taxonomy(
        object="kv_cache",
        granularity=("token",),
        when_mask_is_found="at_inference",
        mask_dynamics="dynamic",
        benefit_realised_on=("memory", "flops"),
        kernel_required="none",
    ),
)
@dataclass(frozen=True)
class StreamingLlm(Evictor):
    """Keeps the first entries and a sliding window of the newest, in every head alike."""

    n_sink: int = option(4, "first entries, which always stay", low=0, unit="tokens")
    recent: int | None = option(
        None, "newest entries that stay, in place of sparsity", low=1, unit="instead of sparsity"
    )
    positions: str = option(
        "cache", "rotary positions: places in the cache (paper) or in the text (kvpress)", choices=("cache", "text")
    )
    decode: bool = option(True, "drop after every decoded token too, so that the cache keeps its size")
    room: int = option(0, "places left free after each forward (1: the paper's streaming loop)", low=0, unit="tokens")

    @property
    def asked(self) -> float | None:
        return None if self.recent is not None else super().asked

    @property
    def streams(self) -> bool:
        return self.positions == "cache" and self.decode and self.asked != 0

    @property
    def while_decoding(self) -> bool:
        return self.decode

    def kept(self, tokens: Tensor) -> Tensor:
        if self.recent is not None:
            return torch.full_like(tokens, self.n_sink + self.recent)
        return super().kept(tokens)

    def forced(self, kept: int) -> int:
        return self.n_sink + self.room + 1

    def check_model(self, model: PreTrainedModel) -> None:
        if self.recent is not None and self.budget is not None:
            raise UserError(f"{self.name('recent')}: goes without {self.name('budget')}")
        if self.positions == "cache":
            needs_rotary(model, self.name("positions"), everywhere=False)

    def before(self, now: Entries) -> None:
        call = now.call
        if self.positions == "text" or call.rotary is None:
            return
        steps = torch.where(now.valid, now.rank - call.key_position_ids, 0)
        if not bool(steps.any()):
            return
        call.key = turned(call.key, steps, call.rotate_at)
        call.query = turned(call.query, steps[:, :1, -call.tokens :], call.rotate_at)

    def choose(self, now: Entries, count: Tensor) -> Tensor:
        recent = (count - self.n_sink - self.room)[:, None]
        return oldest(now.valid, self.n_sink) | newest(now.valid, recent)

    def tolerance(self, shortest: int, model: PreTrainedModel) -> float:
        return (1 + self.room) / max(1, shortest)
