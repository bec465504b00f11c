"""Vertical-slash attention, as harmonised by The Sparse Frontier (Nawrot et al. 2025, arXiv 2504.17768, section 3).

    A = softmax(causal(q[-m:] k^T / sqrt d));   column j scores sum_i A_ij;   offset o scores sum_i A_i,i-o

The best ``vertical_size`` columns (the first ones forced) and ``slash_size`` offsets (the nearest forced) of each head
are computed for all queries, slashes in whole tiles. The idea is MInference's (Jiang et al. 2024, arXiv 2407.02490).
``sparsity`` searches one number for both sizes. Paper: tiles and forced offsets 64, m = 256; here also less on short
prompts. ``sparsity_reported`` charges whole tiles, also their acausal half; achieved counts causal pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparsebench.costs.flops import Attention
from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.attention.base import AttentionMethod, block_of, scaled
from sparsebench.methods.attention.selections import Heads, Selection
from sparsebench.methods.attention.slashes import ranks, room, slash_scores, slash_tiles


@method(
    name="vertical_slash",
    version=1,
    paper="Nawrot et al. 2025, arXiv 2504.17768",
    target="attention",
    phase="prefill",
    baseline="local_sink",
    taxonomy=Taxonomy(
        object="attention",
        granularity=("column", "block"),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        benefit_realised_on=("flops",),
        kernel_required="tiles and single columns",
    ),
)
@dataclass(frozen=True)
class VerticalSlash(AttentionMethod):
    """Computes the columns and diagonals that the last queries attend to most, for every query."""

    vertical_size: int | None = option(None, "columns, in place of sparsity", low=1, unit="instead of sparsity")
    slash_size: int | None = option(None, "diagonals, in place of sparsity", low=1, unit="instead of sparsity")
    approximation_size: int | None = option(
        None, "last queries that are looked at; 256, at most a 32nd of the prompt (16 at least)", low=1
    )
    forced_verticals: int = option(4, "first columns that are always taken", low=0)
    forced_slashes: int | None = option(None, "nearest diagonals that are always taken; a tile", low=1)
    tile_size: int | None = option(None, "queries and keys of a tile; 64, or less on short prompts", low=1)

    knobs: ClassVar[tuple[str, ...]] = ("vertical_size", "slash_size")
    within: ClassVar[tuple[str, ...]] = ("approximation_size",)
    sizes: ClassVar[tuple[str, ...]] = ("forced_verticals", "forced_slashes", "tile_size")

    def check_model(self, model: Any) -> None:
        if (self.vertical_size is None) != (self.slash_size is None):
            given = "vertical_size" if self.slash_size is None else "slash_size"
            raise UserError(f"{self.name(given)}: give both vertical_size and slash_size, or sparsity")
        if self.vertical_size is not None and self.vertical_size < self.forced_verticals:
            raise UserError(f"{self.name('vertical_size')}: must be >= forced_verticals={self.forced_verticals}")
        if self.slash_size is not None and self.slash_size < (self.forced_slashes or self.tile_size or 8):
            least = self.forced_slashes or self.tile_size or 8
            raise UserError(f"{self.name('slash_size')}: must be >= the forced nearest diagonals ({least})")

    def check_tokens(self, tokens: int) -> None:
        super().check_tokens(tokens)
        if self.slash_size is not None and self.slash_size < self._forced(tokens):
            raise UserError(
                f"{self.name('slash_size')}: must be >= the forced nearest diagonals ({self._forced(tokens)} for a "
                f"prompt of {tokens} tokens; forced_slashes= changes that)"
            )

    def leaves_out(self, tokens: int) -> bool:
        if max(self.vertical_size or 0, self.slash_size or 0) >= tokens:
            return False
        size = block_of(self.tile_size, 64, tokens)
        return room(tokens, self.forced_verticals, self._forced(tokens), size)  # where others are is the prompt's

    def estimate(self, heads: Heads) -> Any:
        scores = slash_scores(heads, self._rows(heads.tokens))
        return ranks(scores.vertical, self.forced_verticals), ranks(scores.slash, self._forced(heads.tokens))

    def native(self, tokens: int) -> float | None:
        return self.slash_size

    def span(self, heads: Heads, seen: Any) -> tuple[float, float]:
        return min(heads.tokens, max(self.forced_verticals, self._forced(heads.tokens))), heads.tokens

    def build(self, heads: Heads, seen: Any, knob: float) -> Selection:
        verticals, slashes = seen
        wide = knob if self.vertical_size is None else self.vertical_size
        found = slash_tiles(verticals < wide, slashes < knob, block_of(self.tile_size, 64, heads.tokens))
        found.extra = {"vertical_size": float(wide), "slash_size": float(knob)}
        return found

    def index_flops(self, tokens: int, layer: Attention, learned: Mapping[str, Tensor]) -> float:
        return 2.0 * layer.heads * self._rows(tokens) * tokens * layer.head_dim

    def _rows(self, tokens: int) -> int:
        return min(tokens, scaled(self.approximation_size, 256, tokens, share=32, least=16))

    def _forced(self, tokens: int) -> int:
        return self.forced_slashes or block_of(self.tile_size, 64, tokens)
