"""What methods of inference time leave of a dense model's operations and bytes.

Pruned weights are counted on the weights themselves; what is skipped while the model runs is counted by
the method and told here as shares (1: all of it, as in the dense model). Stacked methods multiply: each share is
taken of what the others leave, as if they chose independently of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


def _nothing(length: int) -> float:
    return 0.0


@dataclass(frozen=True)
class Saving:
    """``linear``: name of a linear layer -> shares of its weights used by a prefill and by a decoded token;
    ``pairs_prefill``, ``pairs_decode``: shares of the query-key pairs that are computed; ``index_prefill``,
    ``index_decode``: FLOPs of finding them, for a prefill of ``length`` tokens in all and for one token decoded
    after ``length``; ``kv_stored``, ``kv_read``: shares of the KV cache's bytes that are kept, and that one decoded
    token reads (what finding them reads included)."""

    linear: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    pairs_prefill: float = 1.0
    pairs_decode: float = 1.0
    index_prefill: Callable[[int], float] = _nothing
    index_decode: Callable[[int], float] = _nothing
    kv_stored: float = 1.0
    kv_read: float = 1.0

    def __mul__(self, other: Saving) -> Saving:
        """Both at once."""
        names = {*self.linear, *other.linear}
        whole = (1.0, 1.0)
        shares = {name: (self.linear.get(name, whole), other.linear.get(name, whole)) for name in names}
        return Saving(
            {name: (a[0] * b[0], a[1] * b[1]) for name, (a, b) in shares.items()},
            self.pairs_prefill * other.pairs_prefill,
            self.pairs_decode * other.pairs_decode,
            lambda length: self.index_prefill(length) + other.index_prefill(length),
            lambda length: self.index_decode(length) + other.index_decode(length),
            self.kv_stored * other.kv_stored,
            self.kv_read * other.kv_read,
        )


NO_SAVING = Saving()
