"""Measured milliseconds of a sparse model: on sparse kernels, side by side with the same model run densely.

Quality is always measured on the masked model; here the same model runs with every layer that can on a sparse kernel,
in turn with the dense one, and the largest difference between the two models' logits is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import median_high
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsebench.costs.paired import measure
from sparsebench.errors import UserError
from sparsebench.kernels import build
from sparsebench.kernels.skipping import skipping
from sparsebench.kernels.swap import Swap, installed, plan

if TYPE_CHECKING:
    from sparsebench.making import SparseModel

ROUNDS = 7  # pairs of a dense and a sparse call
_REALISED = ("weights", "activations")  # targets whose savings a kernel here turns into time


@dataclass
class _Kernels:
    """What the sparse model runs on: swapped layers, and layers that skip zero inputs."""

    swap: Swap | None = None
    skips: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@torch.no_grad()
def columns(sparse: SparseModel, kernel: str, length: int) -> dict[str, Any]:
    """The record's columns. ``kernel``: auto or reference; ``length``: tokens of the prefill, and cached in decoding.

    A model with nothing to speed up is timed against itself, and a warning says why. Milliseconds are medians."""
    kernels = _choose(sparse, kernel)
    model = sparse.loaded.model
    plain = deepcopy(model)  # the two take turns, so that both must be ready
    ids = (torch.arange(length) * 7919 % model.config.get_text_config().vocab_size)[None].to(sparse.loaded.device)
    with sparse.running():
        masked = model(input_ids=ids, use_cache=False).logits
    with _running(sparse, kernels):
        swapped = model(input_ids=ids, use_cache=False).logits
        found = {
            "prefill": measure({"dense": _prefill(plain, ids)}, {"sparse": _prefill(model, ids)}, ROUNDS),
            "decode": measure({"dense": _decode(plain, ids)}, {"sparse": _decode(model, ids)}, ROUNDS),
        }
    scale = float(masked.abs().max()) or 1.0
    left = sorted({one.target for one in sparse.applied.attachments if one.target not in _REALISED})
    result: dict[str, Any] = {
        "kernel": kernels.swap.kernel if kernels.swap else build.status() if kernels.skips else "none",
        "kernel_layers": len(kernels.swap.layers) if kernels.swap else len(kernels.skips),
        "kernel_error": float((masked - swapped).abs().max()) / scale,
        "latency": f"measured, but {', '.join(left)} by the reference" if left else "measured",
        "bytes_resident": _resident(sparse, kernels.swap),
    }
    for phase, measured in found.items():
        ratio = measured.ratio("dense", "sparse")
        result |= {f"ms_{phase}": 1000 * median_high(measured.seconds["sparse"])}
        result |= {f"ms_{phase}_dense": 1000 * median_high(measured.seconds["dense"]), f"speedup_{phase}": ratio.median}
    if kernels.warnings:
        result["warnings"] = "; ".join([*sparse.warnings, *kernels.warnings])
    return result


def _choose(sparse: SparseModel, kernel: str) -> _Kernels:
    """Zero inputs are skipped where a method makes them; else zero weights are."""
    model, attachments = sparse.loaded.model, sparse.applied.attachments
    names = sorted({name for one in attachments if one.target == "activations" for name in one.counted().saving.linear})
    if names and kernel == "auto":
        return _Kernels(skips=names)
    try:
        return _Kernels(plan(model, kernel))
    except UserError as error:
        return _Kernels(warnings=[str(error)] if sparse.achieved.scope else [])


@contextmanager
def _running(sparse: SparseModel, kernels: _Kernels) -> Iterator[None]:
    with ExitStack() as stack:
        if kernels.swap is not None:
            stack.enter_context(installed(sparse.loaded.model, kernels.swap))
        if kernels.skips:
            stack.enter_context(skipping(sparse.loaded.model, kernels.skips))
        stack.enter_context(sparse.running())
        yield


def _prefill(model: Any, ids: Tensor) -> Callable[[int], Any]:
    return lambda call: model(input_ids=ids, use_cache=False).logits


def _decode(model: Any, ids: Tensor) -> Callable[[int], Any]:
    """One token behind a cache of all of ``ids``: each call has its own copy, made ahead."""
    cache = model(input_ids=ids, use_cache=True).past_key_values
    caches = [deepcopy(cache) for _ in range(6 * ROUNDS + 2)]  # more than `measure` calls
    return lambda call: model(input_ids=ids[:, :1], past_key_values=caches[call], use_cache=True).logits


def _resident(sparse: SparseModel, swap: Swap | None) -> int:
    """Bytes of all parameters while the model runs on its kernels."""
    whole = sum(parameter.numel() * parameter.element_size() for parameter in sparse.loaded.model.parameters())
    return whole - (swap.dense_bytes - swap.bytes if swap else 0)
