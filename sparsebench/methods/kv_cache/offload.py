"""Simulated time of generation when the cache does not fit the GPU: ALISA's three phases, and SpeContext's placement.

Nothing here is measured: rooflines of the formulas that the papers give (arXiv 2403.17312, 2512.00722), with what their
abstracts leave open chosen as stated. Bytes are of half precision unless ``kv_bytes`` says otherwise; times in seconds.

ALISA per layer and step, b sequences, n tokens, h = KV heads x head size, k = tokens that are read:

    linear   = max(2 b P / F, P e / BW)                       P: weights of a layer, e: bytes per weight
    attention = max(4 b k h / F, 2 b k h e_kv / BW) + 4 b n / BW
    fetch    = (k's tokens on the CPU) 2 b h e_kv / PCIe;     recompute = max(r 4 b h hidden / F, r b hidden e / PCIe)

The tokens read are taken as spread evenly over those that are not local. Phase I ends when the cache no longer fits
(p1); from p2 on a share beta of the tokens that do not fit is dropped and computed again from the layer's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf

from transformers import PreTrainedModel

from sparsebench.costs.flops import shape_of


@dataclass(frozen=True)
class Hardware:
    """``memory`` in bytes; ``bandwidth`` of the GPU's memory and ``pcie`` in bytes/s; ``flops`` per second, half of
    peak."""

    memory: float
    bandwidth: float
    flops: float
    pcie: float


PRESETS = {
    "v100_16": Hardware(16e9, 900e9, 56e12, 12e9),
    "v100_32": Hardware(32e9, 900e9, 56e12, 12e9),
    "h100_80": Hardware(80e9, 3.35e12, 495e12, 50e9),
}


@dataclass(frozen=True)
class Workload:
    """A decoder of ``layers`` with ``hidden`` inputs and ``kv_width`` = KV heads x head size, ``layer_weights``
    weights in each layer, run for ``batch`` prompts of ``n_in`` tokens to ``n_out`` more; ``kv_bytes`` per cached
    value; ``activations`` bytes that are always taken."""

    layers: int
    hidden: int
    kv_width: int
    layer_weights: float
    batch: int
    n_in: int = 128
    n_out: int = 512
    kv_bytes: float = 2.0
    activations: float = 1e9

    @property
    def per_token(self) -> float:
        """Bytes that one position adds to the caches of the whole batch."""
        return 2 * self.layers * self.kv_width * self.kv_bytes * self.batch

    def room(self, hardware: Hardware) -> float:
        """Bytes that are left for the cache."""
        return hardware.memory - 2 * self.layers * self.layer_weights - self.activations

    def linear(self, hardware: Hardware, tokens: float = 1.0) -> float:
        """Projections and MLP of all layers."""
        work = 2 * self.batch * tokens * self.layer_weights / hardware.flops
        return self.layers * max(work, 2 * self.layer_weights / hardware.bandwidth)

    def attention(self, hardware: Hardware, read: float) -> float:
        """Attention of one step over ``read`` tokens in all layers."""
        work = 4 * self.batch * read * self.kv_width / hardware.flops
        return self.layers * max(work, 2 * self.batch * read * self.kv_width * self.kv_bytes / hardware.bandwidth)

    def fetch(self, hardware: Hardware, tokens: float) -> float:
        """Moving the keys and values of so many tokens from the CPU, all layers."""
        return self.layers * tokens * 2 * self.batch * self.kv_width * self.kv_bytes / hardware.pcie

    def recompute(self, hardware: Hardware, tokens: float) -> float:
        """Computing keys and values of so many tokens again from inputs that lie on the CPU, all layers."""
        work = 4 * self.batch * self.kv_width * self.hidden / hardware.flops
        return self.layers * tokens * max(work, self.batch * self.hidden * 2 / hardware.pcie)


def workload_of(model: PreTrainedModel, batch: int, n_in: int, n_out: int, kv_bytes: float) -> Workload:
    """The workload of a model's own shape. UserError for attention without a formula."""
    shape = shape_of(model)
    head = model.get_output_embeddings().weight.numel()
    attention = shape.attention[0]
    width, weights = attention.kv_heads * attention.head_dim, (shape.weights - head) / shape.layers
    return Workload(shape.layers, shape.hidden, width, weights, batch, n_in, n_out, kv_bytes)


@dataclass(frozen=True)
class Plan:
    """A schedule and its simulated throughput in tokens per second of the whole batch."""

    throughput: float
    beta: float
    p1: int
    p2: int


def placed(load: Workload, hardware: Hardware, n: int, beta: float, p2: int) -> tuple[int, int, int]:
    """Tokens on the GPU, on the CPU and deleted when there are ``n``; together n."""
    outside = min(n, max(0, ceil((n * load.per_token - load.room(hardware)) / load.per_token)))
    deleted = int(beta * outside) if n >= p2 else 0
    return n - outside, outside - deleted, deleted


def simulate(load: Workload, hardware: Hardware, sparsity: float, beta: float, p2: int, overlap: bool = False) -> float:
    """Seconds of ALISA's schedule for the whole workload."""
    total = load.linear(hardware, load.n_in)
    for n in range(load.n_in + 1, load.n_in + load.n_out + 1):
        k = min(n, max(2, ceil(round((1 - sparsity) * n, 9))))
        local = k // 2
        _, away, deleted = placed(load, hardware, n, beta, p2)
        far = max(1, n - local)
        moved = load.fetch(hardware, (k - local) * away / far)
        computed = (
            load.linear(hardware) + load.attention(hardware, k) + load.layers * 4 * load.batch * n / hardware.bandwidth
        )
        again = load.recompute(hardware, (k - local) * deleted / far)
        total += max(computed + again, moved) if overlap else computed + again + moved
    return total


def plan(load: Workload, hardware: Hardware, sparsity: float = 0.8, overlap: bool = False) -> Plan:
    """The best schedule: beta in 0, .1, ... .9 and p2 in 8 steps from p1 to the end; of equals the smallest beta, then
    the latest p2. Weights that do not fit leave no plan: ValueError."""
    if load.room(hardware) <= 0:
        raise ValueError("the weights do not fit the GPU")
    end = load.n_in + load.n_out
    p1 = next((n for n in range(1, end + 1) if n * load.per_token > load.room(hardware)), end)
    starts = sorted({round(p1 + (end - p1) * i / 7) for i in range(8)}, reverse=True)
    tried = [
        (simulate(load, hardware, sparsity, tenth / 10, p2, overlap), tenth / 10, -p2)
        for tenth in range(10)
        for p2 in (starts if tenth else starts[:1])
    ]
    seconds, beta, p2 = min(tried)
    return Plan(load.batch * load.n_out / seconds, beta, p1, -p2)


def dense_gpu(load: Workload, hardware: Hardware) -> float:
    """Tokens per second without offloading: as many sequences at a time as fit, wave after wave; 0 if none fits."""
    needed = (load.n_in + load.n_out) * replace(load, batch=1).per_token
    fit = int(load.room(hardware) // needed)
    if fit < 1:
        return 0.0
    waves = [min(fit, load.batch - start) for start in range(0, load.batch, fit)]
    seconds = sum(_dense_seconds(replace(load, batch=wave), hardware, 0.0) for wave in waves)
    return load.batch * load.n_out / seconds


def dense_offload(load: Workload, hardware: Hardware, overlap: bool = False) -> float:
    """Tokens per second with the same share of every token's cache on the CPU, all of it read at each step."""
    needed = (load.n_in + load.n_out) * load.per_token
    away = max(0.0, 1 - load.room(hardware) / needed)
    return load.batch * load.n_out / _dense_seconds(load, hardware, away, overlap)


def _dense_seconds(load: Workload, hardware: Hardware, away: float, overlap: bool = False) -> float:
    total = load.linear(hardware, load.n_in)
    for n in range(load.n_in + 1, load.n_in + load.n_out + 1):
        computed = load.linear(hardware) + load.attention(hardware, n)
        moved = load.fetch(hardware, away * n)
        total += max(computed, moved) if overlap else computed + moved
    return total


def thresholds(
    per_layer: Sequence[float], budget: int, memory: float, fixed: float = 0.0, retrieval: float = 0.0, batch: int = 1
) -> list[float]:
    """SpeContext's table: entry c is the longest sequence with the cache of the first c layers on the GPU and
    ``budget`` slots for each other layer (``inf``: any). ``per_layer``: bytes per token and layer; ``fixed``: weights
    and activations; ``retrieval``: bytes per token of the retrieval head's keys."""
    found = []
    for count in range(len(per_layer) + 1):
        left = memory - fixed - batch * budget * sum(per_layer[count:])
        slope = batch * (sum(per_layer[:count]) + retrieval)
        found.append(0.0 if left < 0 else left // slope if slope else inf)
    return found


def layers_on_gpu(table: Sequence[float], tokens: int) -> int:
    """c*: the most layers whose cache stays on the GPU for a sequence of so many tokens; ValueError if none can run."""
    fitting = [count for count, longest in enumerate(table) if tokens <= longest]
    if not fitting:
        raise ValueError(f"{tokens} tokens do not fit the GPU, whatever is offloaded")
    return max(fitting)


def elastic(before: Sequence[int], after: Sequence[int]) -> tuple[set[int], set[int]]:
    """(tokens to load, slots to overwrite) from one step's choice to the next."""
    return set(after) - set(before), set(before) - set(after)
