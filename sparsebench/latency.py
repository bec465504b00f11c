"""Measured milliseconds of a sparse model: on sparse kernels, side by side with the same model run densely.

Quality is always measured on the masked model; here the same model runs with every layer that can on a sparse kernel,
in turn with the dense one, and the largest difference between the two models' logits is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import median_high
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsebench.costs.paired import Call, measure, wall
from sparsebench.errors import UserError
from sparsebench.kernels import build
from sparsebench.kernels.skipping import Needed, skipping
from sparsebench.kernels.swap import Replaced, Swap, installed, packed, plan
from sparsebench.methods.activations.drafting import Decoder
from sparsebench.methods.activations.gating import Gating
from sparsebench.methods.activations.sirius import Drafting
from sparsebench.methods.attention.base import SparseAttention
from sparsebench.methods.attention.on_kernels import KernelUse
from sparsebench.models import caching

if TYPE_CHECKING:
    from sparsebench.making import SparseModel

ROUNDS = 7  # pairs of a dense and a sparse call
_REALISED = ("weights", "activations")  # targets whose savings a kernel here turns into time


@dataclass
class _Kernels:
    """What the sparse model runs on: swapped layers, or layers that skip (``skipping``'s inputs and outputs) beside
    swapped ones.

    ``replaced``: the linear layers among them, once they run; ``beside``: targets of methods whose savings no kernel
    realises; ``attention``: what became of the attention that kernels were to compute."""

    swap: Swap | None = None
    inputs: list[str] = field(default_factory=list)
    outputs: dict[str, Needed] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    replaced: list[Replaced] = field(default_factory=list)
    beside: set[str] = field(default_factory=set)
    attention: list[KernelUse] | None = None  # None: kernels of attention are not asked for

    @property
    def layers(self) -> int:
        """How many ran on kernels, linear ones and attention."""
        return len(self.replaced) + sum(len(use.layers) for use in self.attention or ())

    def attended(self) -> None:
        """Once everything ran: says where attention did not on a kernel, and why. Decoding never does: what is computed
        of a prompt says nothing of it."""
        for use in self.attention or ():
            if use.refused:
                self.warnings.append(f"attention by the reference: {use.refused}")
            else:
                self.beside = self.beside - {"attention"} | {"attention while decoding"}

    def label(self, device: str) -> str:
        """Which kernels they are, for tensors of a kind of device."""
        if self.swap:
            return self.swap.kernel
        return build.status(device) if self.layers else "none"


@torch.no_grad()
def columns(sparse: SparseModel, kernel: str, length: int) -> dict[str, Any]:
    """The record's columns. ``kernel``: auto or reference; ``length``: tokens of the prefill, and cached in decoding;
    fewer where the model's context has no room for the tokens that follow.

    A model with nothing to speed up is timed against itself, and a warning says why. Milliseconds are medians, of
    decoding per token; a method that decodes in its own way is timed in that, from one correction to the next."""
    kernels = _choose(sparse, kernel)
    model, drafting = sparse.loaded.model, _drafting(sparse)
    follow = 1 if drafting is None else drafting.decoder().settings.period
    length = max(1, min(length, sparse.loaded.context - follow))
    plain = deepcopy(model)  # the two take turns, so that both must be ready
    ids = (torch.arange(length) * 7919 % model.config.get_text_config().vocab_size)[None].to(sparse.loaded.device)
    with _unwatched(sparse), sparse.running():
        masked = _answers(model, ids, drafting)
    with _unwatched(sparse), _running(sparse, kernels):
        swapped = _answers(model, ids, drafting)
        decode = _decode(model, ids) if drafting is None else _advance(drafting.decoder(), ids)
        found = {
            "prefill": measure({"dense": _prefill(plain, ids)}, {"sparse": _prefill(model, ids)}, ROUNDS),
            "decode": measure({"dense": _decode(plain, ids)}, {"sparse": decode}, ROUNDS, _per_token),
        }
    kernels.attended()
    scale = float(masked.abs().max()) or 1.0
    left = ", ".join(sorted(kernels.beside))
    result: dict[str, Any] = {
        "kernel": kernels.label(sparse.loaded.device.type),
        "kernel_layers": kernels.layers,
        "kernel_formats": _formats(kernels.replaced),
        "kernel_error": float((masked - swapped).abs().max()) / scale,
        "latency": f"measured, but {left} by the reference" if left else "measured",
        "bytes_resident": _resident(sparse, kernels.replaced),
    }
    verdicts = {one.verdict() for one in found.values()} - {"ok"}
    result["latency_verdict"] = verdicts.pop() if verdicts else "ok"
    for phase, measured in found.items():
        ratio = measured.ratio("dense", "sparse")
        result |= {f"ms_{phase}": 1000 * median_high(measured.seconds["sparse"])}
        result |= {f"ms_{phase}_dense": 1000 * median_high(measured.seconds["dense"]), f"speedup_{phase}": ratio.median}
    if kernels.warnings:
        result["warnings"] = "; ".join(kernels.warnings)
    return result


def _gatings(sparse: SparseModel) -> list[Gating]:
    return [one for one in sparse.applied.attachments if isinstance(one, Gating)]


def _drafting(sparse: SparseModel) -> Drafting | None:
    """The method that decodes in its own way, if there is one."""
    return next((one for one in _gatings(sparse) if isinstance(one, Drafting)), None)


def _choose(sparse: SparseModel, kernel: str) -> _Kernels:
    """Blocks of attention are left out, and zero inputs skipped where a method makes them, else zero weights."""
    found = _of_layers(sparse, kernel)
    found.attention = [] if kernel == "auto" else None
    return found


def _of_layers(sparse: SparseModel, kernel: str) -> _Kernels:
    beside = {one.target for one in sparse.applied.attachments if one.target not in _REALISED}
    skips = [one.skips for one in _gatings(sparse)]
    if skips and kernel == "auto":
        inputs = sorted({name for names, _ in skips for name in names})
        return _Kernels(None, inputs, {name: ask for _, asks in skips for name, ask in asks.items()}, beside=beside)
    if skips:  # gates hold the layers that they act on, which a swap would take away
        return _Kernels(beside=beside)
    try:
        swap = plan(sparse.loaded.model, kernel)
        return _Kernels(swap, replaced=swap.layers, beside=beside)
    except UserError as error:
        return _Kernels(warnings=[str(error)] if sparse.achieved.scope else [], beside=beside)


@contextmanager
def _unwatched(sparse: SparseModel) -> Iterator[None]:
    """What is attached inside does not compute what only the record needs."""
    with ExitStack() as stack:
        for one in _gatings(sparse):
            stack.enter_context(one.unwatched())
        yield


@contextmanager
def _running(sparse: SparseModel, kernels: _Kernels) -> Iterator[None]:
    """The sparse model on its kernels."""
    with ExitStack() as stack:
        if kernels.swap is not None:
            stack.enter_context(installed(sparse.loaded.model, kernels.swap))
        stack.enter_context(sparse.running())
        if kernels.inputs:  # last: a method may run on other weights than the model's own
            model = sparse.loaded.model
            skips = stack.enter_context(skipping(model, kernels.inputs, kernels.outputs))
            rest = packed(model, leave={*kernels.inputs, *kernels.outputs})  # pruned too, but not gated
            stack.enter_context(installed(model, rest))
            kernels.replaced = [*skips, *rest.layers]
            kernels.beside |= set() if skips else {"activations"}
        if kernels.attention is not None:
            uses = [one.on_kernels() for one in sparse.applied.attachments if isinstance(one, SparseAttention)]
            kernels.attention = [stack.enter_context(use) for use in uses]
        yield


def _answers(model: Any, ids: Tensor, drafting: Drafting | None) -> Tensor:
    """Logits of a prefill and of a token behind it: (1, tokens + 1, vocabulary)."""
    decoder = None if drafting is None else drafting.decoder()
    if decoder is None:
        logits, cache = caching.read(model, ids)
    else:
        logits, cache = decoder.read(ids)
    with nullcontext() if decoder is None else decoder.sparse():
        step, _ = caching.read(model, ids[:, :1], cache)
    return torch.cat([logits, step], dim=1)


def _prefill(model: Any, ids: Tensor) -> Callable[[int], Any]:
    return lambda call: model(input_ids=ids, use_cache=False).logits


def _decode(model: Any, ids: Tensor) -> Callable[[int], Tensor]:
    """One token behind a cache of all of ``ids``: each call has its own copy, made ahead."""
    caches = _copies(caching.read(model, ids)[1])
    return lambda call: caching.read(model, ids[:, :1], caches[call])[0][0]


def _advance(decoder: Decoder, ids: Tensor) -> Callable[[int], list[int]]:
    """Drafts and their correction behind a cache of all of ``ids``: the tokens of a call."""
    logits, cache = decoder.read(ids)
    start, caches = int(logits[0, -1].argmax()), _copies(cache)
    return lambda call: decoder.advance(start, caches[call], decoder.settings.period, set())[0]


def _copies(cache: Any) -> list[Any]:
    return [deepcopy(cache) for _ in range(6 * ROUNDS + 2)]  # more than `measure` calls


def _per_token(call: Call, number: int) -> float:
    """Seconds of a call by each token that it gives."""
    given: list[Any] = []
    seconds = wall(lambda at: given.append(call(at)), number)
    return seconds / len(given[0])


def _formats(replaced: list[Replaced]) -> str | None:
    """``12 bitmap, 2 lists``; None where no linear layer was replaced."""
    counts = Counter(one.format for one in replaced)
    return ", ".join(f"{count} {format}" for format, count in sorted(counts.items())) or None


def _resident(sparse: SparseModel, replaced: list[Replaced]) -> int:
    """Bytes of all parameters while the model runs on its kernels."""
    whole = sum(parameter.numel() * parameter.element_size() for parameter in sparse.loaded.model.parameters())
    return whole - sum(one.dense_bytes - one.bytes for one in replaced)
