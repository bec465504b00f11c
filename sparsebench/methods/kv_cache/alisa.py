"""ALISA: sparse window attention over the whole cache (Zhao et al. 2024, arXiv 2403.17312), rebuilt: there is no
released code.

    k = max(2, ceil(r n)) of the n tokens so far, r = 1 - sparsity;  local: the newest int(k * local_fraction)
    S_j = sum of the attention that the last m queries paid to j;   global: the k - local largest S among the rest
    w = softmax over local and global;  the next row of the history is w, 0 elsewhere

per layer and KV head, with w averaged over its query heads. Nothing is dropped: what is not read now may be read
later, which is the difference from H2O; but it returns only by what the history still holds of it, or not at all. The
prompt is dense and its last rows begin the history; ``history_steps`` m is the local window at the end of the prompt,
at most 64. The budget grows with n (``budget`` fixes it). Several tokens at once are computed as if one by one.
``kv_bits=8`` stores keys and values per channel as 8-bit integers between the prompt's least and largest values; later
ones are clipped. The schedule of ALISA's system (what lies on the GPU, on the CPU, or is computed again) is simulated
in ``offload``. Achieved sparsity is 1 - read / n over decoded tokens; ``kv_read`` also counts the sums that choosing
reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsebench.costs.flops import Attention
from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.kv_cache.base import Selector
from sparsebench.methods.kv_cache.entries import Entries, newest, top
from sparsebench.methods.kv_cache.offload import PRESETS, dense_gpu, plan, workload_of
from sparsebench.models.plug import Work

HISTORY = "alisa"  # per entry: what each of the last queries paid it
LONGEST = 64


@method(
    name="alisa",
    version=1,
    paper="Zhao et al. 2024, arXiv 2403.17312",
    target="kv_cache",
    phase="decode",
    baseline="streaming_llm",
    taxonomy=Taxonomy(
        object="kv_cache",
        granularity=("token",),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        benefit_realised_on=("flops",),
        kernel_required="gathered attention that gives its weights",
    ),
)
@dataclass(frozen=True)
class Alisa(Selector):
    """Each decoded token reads the newest tokens and those that were attended to most of late."""

    local_fraction: float = option(0.5, "share of what is read that is newest", low=0.0, high=1.0)
    history_steps: int | None = option(
        None, "queries whose attention is summed; the local window, at most 64, if not given", low=1, high=4096
    )
    kv_bits: int = option(8, "bits of a stored value; 16: as it is", choices=(8, 16))

    hardware: str | None = option(
        None, "simulate the schedule on this GPU for the model's shape", choices=("v100_16", "v100_32", "h100_80")
    )
    batch: int = option(16, "sequences at a time", low=1, high=100_000, only="hardware")
    n_in: int = option(128, "tokens of a prompt", low=1, unit="tokens", only="hardware")
    n_out: int = option(512, "tokens that are decoded", low=1, unit="tokens", only="hardware")
    overlap: bool = option(False, "transfers run beside computation", only="hardware")

    def wanted(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(local, global) entries to read of ``seen`` int64."""
        if self.budget is not None:
            count = torch.full_like(seen, self.budget)
        else:  # 1 - 0.8 is a little more than 0.2: not one entry more for that
            count = (seen.double() * (1 - (self.asked or 0.0)) - 1e-9).ceil().long().clamp(min=2)
        local = (count.double() * self.local_fraction).long().clamp(min=1)
        return local, count - local

    def select(self, now: Entries, count: Tensor) -> Tensor | None:
        state, tokens = now.layer.state, now.call.tokens
        if HISTORY not in state:  # the prompt was read without this method: nothing is known of it yet
            state[HISTORY] = self._first_history(now, 0)
        steps = self._steps(now)
        masks = []
        for t in range(tokens):
            seen = now.visible_to(t)
            local, rest = self.wanted(seen.sum(dim=-1))
            latest = newest(seen, local)
            history = state[HISTORY]
            inside = torch.arange(history.shape[3], device=history.device) >= history.shape[3] - steps[:, None]
            sums = (history * inside[:, None, None]).sum(dim=3)
            mask = latest | top(sums, rest, seen & ~latest)
            masks.append(mask)
            paid = now.grouped(now.weights(t, t + 1, now.repeated(mask)[:, :, None])).mean(dim=2)[:, :, 0]
            state[HISTORY] = torch.cat([history[..., 1:], paid[..., None]], dim=3)
        return torch.stack(masks, dim=2)

    def _steps(self, now: Entries) -> Tensor:
        """(B,) rows of the history that count."""
        if self.history_steps is not None:
            return torch.full_like(now.prompt, self.history_steps)
        return self.wanted(now.prompt)[0].clamp(max=LONGEST)

    def _first_history(self, now: Entries, last: int) -> Tensor:
        """(B, K, S, m): the last rows of the prompt's attention, zeros before them."""
        most = int(self._steps(now).max())
        rows = min(most, last)
        if not rows:
            return torch.zeros(*now.valid.shape, most, device=now.valid.device)
        paid = now.grouped(now.attention(rows)).mean(dim=2).transpose(2, 3)
        return torch.nn.functional.pad(paid, (most - rows, 0))

    def compress(self, now: Entries) -> None:
        if self.asked != 0 and now.prefill:
            now.layer.state[HISTORY] = self._first_history(now, now.call.tokens)
        if self.kv_bits == 8:
            self._quantise(now)

    def _quantise(self, now: Entries) -> None:
        """New entries to 8 bits. The prompt's grid needs no memory: its least and largest value lie on it."""
        layer = now.layer
        if layer.keys is None or layer.values is None:
            raise ValueError("nothing was cached yet")
        of_prompt = (now.valid & (now.rank < now.prompt[:, None, None]))[..., None]
        new = torch.zeros_like(of_prompt)
        new[:, :, -now.call.tokens :] = True
        layer.keys, layer.values = (
            torch.where(new, quantised(x.float(), of_prompt).to(x.dtype), x) for x in (layer.keys, layer.values)
        )

    def tally(self, now: Entries, work: Work) -> tuple[float, float]:
        dense = float(work.dense.sum()) * work.computed.shape[1]
        return (0.0, 0.0) if now.prefill else (dense - float(work.computed.sum()), dense)

    def stored(self, now: Entries) -> Tensor:
        return now.seen * self.share_read(now)

    def share_read(self, now: Entries) -> float:
        return 1 / now.call.key.element_size() if self.kv_bits == 8 else 1.0

    def index_read(self, now: Entries) -> Tensor | float:
        if self.asked == 0:
            return 0.0
        return now.seen * 4 / (2 * now.call.key.shape[-1] * now.call.key.element_size())  # one float32 sum per entry

    def index_prefill(self, layer: Attention, length: int) -> float:
        return 2.0 * layer.heads * layer.head_dim * length * min(length, self.history_steps or LONGEST)

    def columns(self, notes: Mapping[str, float], model: PreTrainedModel) -> dict[str, Any]:
        """Simulated tokens per second of the schedule, and its gain over a cache that stays on the GPU."""
        if self.hardware is None:
            return {}
        machine = PRESETS[self.hardware]
        load = workload_of(model, self.batch, self.n_in, self.n_out, self.kv_bits / 8)
        found = plan(load, machine, self.asked or 0.0, self.overlap)
        dense = dense_gpu(replace(load, kv_bytes=2.0), machine)
        gain = {"simulated_gain": found.throughput / dense} if dense else {}
        return {"simulated_tokens_per_second": found.throughput, "simulated_recomputed": found.beta, **gain}

    def check_model(self, model: PreTrainedModel) -> None:
        if self.hardware is None:
            return
        if workload_of(model, self.batch, self.n_in, self.n_out, 2.0).room(PRESETS[self.hardware]) <= 0:
            raise UserError(f"{self.name('hardware')}: the model's weights do not fit it")

    def tolerance(self, shortest: int, model: PreTrainedModel) -> float:
        return 2 / max(1, shortest)


def quantised(x: Tensor, among: Tensor) -> Tensor:
    """x (B, K, S, D) float32 rounded to 256 levels per channel between the least and the largest value of the columns
    ``among`` (B, K, S, 1) bool; values outside are clipped."""
    low = x.masked_fill(~among, torch.inf).amin(dim=2, keepdim=True)
    high = x.masked_fill(~among, -torch.inf).amax(dim=2, keepdim=True)
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)
