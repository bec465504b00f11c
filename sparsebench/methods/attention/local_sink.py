"""Sinks and a local window: A-shape (Xiao et al. 2023, arXiv 2309.17453) and Tri-shape.

    query i computes key j  iff  j <= i and (j < n_init or i - j <= n_local)

Nothing is looked at: every head of every layer has the same pattern. Tri-shape (SCBench, Li et al. 2024, arXiv
2412.10319) is A-shape plus dense last ``n_last`` queries, where a question stands. SCBench's sizes for 128k tokens are
n_init 128 and n_local 3968, with n_last 100; MInference's are 100 and 800. Here the sinks and the last rows are at most
a 64th and a 32nd of the prompt, so that short prompts have a middle to leave out. Achieved sparsity counts the pairs
of the causal triangle that are left out; papers mean the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sparsebench.declare import Taxonomy, method, option
from sparsebench.methods.attention.base import AttentionMethod, scaled
from sparsebench.methods.attention.selections import Band, Heads, Selection, band_pairs


@method(
    name="local_sink",
    version=1,
    paper="Xiao et al. 2023, arXiv 2309.17453",
    target="attention",
    phase="prefill",
    taxonomy=Taxonomy(
        object="attention",
        granularity=("token",),
        when_mask_is_found="at_inference",
        benefit_realised_on=("flops",),
        kernel_required="banded attention",
    ),
)
@dataclass(frozen=True)
class LocalSink(AttentionMethod):
    """Computes the first tokens and a window of each query (A-shape); for the last queries all (Tri-shape)."""

    shape: str = option("a_shape", "tri_shape adds dense last rows", choices=("a_shape", "tri_shape"))
    n_init: int | None = option(None, "first tokens that all see; 128, at most a 64th of the prompt", low=0)
    n_local: int | None = option(
        None, "tokens before itself that a query sees, in place of sparsity", low=0, unit="instead of sparsity"
    )
    n_last: int | None = option(
        None,
        "last queries that see all; 100, at most a 32nd of the prompt",
        low=1,
        unit="tokens",
        only="shape=tri_shape",
    )

    knobs: ClassVar[tuple[str, ...]] = ("n_local",)
    within: ClassVar[tuple[str, ...]] = ("n_init", "n_last")
    sizes: ClassVar[tuple[str, ...]] = ("n_init", "n_last")

    def leaves_out(self, tokens: int) -> bool:
        first, dense_from = self._edges(tokens)
        return first + 1 < dense_from  # a query with a key between the sinks and itself

    def native(self, tokens: int) -> float | None:
        if self.n_local is not None:
            return self.n_local
        first, dense_from = self._edges(tokens)
        target = (1 - (self.asked or 0.0)) * tokens * (tokens + 1) / 2
        return min(range(tokens), key=lambda window: abs(band_pairs(tokens, first, window, dense_from) - target))

    def build(self, heads: Heads, seen: Any, knob: float) -> Selection:
        first, dense_from = self._edges(heads.tokens)
        window = min(int(knob), heads.tokens)
        return Band(heads.tokens, first, window, dense_from, heads.query.device, extra={"n_local": float(window)})

    def _edges(self, tokens: int) -> tuple[int, int]:
        """The sinks, and the first query that sees all."""
        first = scaled(self.n_init, 128, tokens, share=64, least=1)
        last = min(tokens, scaled(self.n_last, 100, tokens, share=32, least=1)) if self.shape == "tri_shape" else 0
        return first, tokens - last
