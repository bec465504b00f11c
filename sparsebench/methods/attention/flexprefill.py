"""FlexPrefill (Lai et al. 2025, arXiv 2502.20766), and the form in which The Sparse Frontier simplified it.

``variant=original``, on blocks of ``block_size``: from A = softmax(causal(q_last k^T / sqrt d)) over the last block of
queries, the smallest sets of columns and of diagonals whose mass reaches ``gamma`` give each head its numbers of
vertical and slash blocks. Heads for which pooled keys predict the columns' mass (square root of the Jensen-Shannon
divergence below ``tau``) instead compute the blocks that pooled queries and keys put ``gamma`` of their mass on, all
rows together. As in the released code: a count is of tokens, one more than the entries with cumulated mass <= gamma;
divided by the block size (in the code by 128 for any block size: ``budget_divisor=128``), plus one, it is a number of
blocks. The divergence where a block has no mass is not a number, which leaves its head at verticals and slashes.

``variant=simplified`` (Nawrot et al. 2025, arXiv 2504.17768, code): the counts in tokens, at least ``min_budget``, give
columns and diagonals of ``vertical_slash``; neither blocks nor a test.

``sparsity`` searches gamma, and for the simplified form smaller budgets at gamma 0. Achieved counts causal pairs;
``sparsity_reported`` counts blocks of the triangle (original) or whole tiles (simplified). Blocks are at most a 64th of
a short prompt, 128 in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsebench.costs.flops import Attention
from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.attention.base import AttentionMethod, block_of, scaled
from sparsebench.methods.attention.block_sparse import pooled
from sparsebench.methods.attention.selections import Heads, Selection, block_sparsity, blocks, masked_softmax
from sparsebench.methods.attention.slashes import SlashScores, ranks, room, slash_scores, slash_tiles


@method(
    name="flexprefill",
    version=1,
    paper="Lai et al. 2025, arXiv 2502.20766",
    target="attention",
    phase="prefill",
    baseline="local_sink",
    taxonomy=Taxonomy(
        object="attention",
        granularity=("block", "column"),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        allocation="per_layer_search",
        benefit_realised_on=("flops",),
        kernel_required="block lists",
    ),
)
@dataclass(frozen=True)
class FlexPrefill(AttentionMethod):
    """Gives each head as many columns, diagonals or blocks as hold a share gamma of its attention."""

    variant: str = option("original", "the paper's, or The Sparse Frontier's", choices=("original", "simplified"))
    gamma: float | None = option(
        None,
        "share of the attention to hold (simplified: alpha), in place of sparsity",
        low=0.0,
        high=1.0,
        unit="instead of sparsity",
    )
    tau: float = option(
        0.1, "heads with a divergence below it take blocks; 0: none", low=0.0, high=1.0, only="variant=original"
    )
    min_budget: int | None = option(None, "fewest tokens; a block (original), 512 or a 16th (simplified)", low=1)
    max_budget: int | None = option(
        None, "most tokens of a head's columns and of its diagonals", low=1, only="variant=original"
    )
    block_size: int | None = option(
        None, "tokens of a block; 128, or less on short prompts", low=8, only="variant=original"
    )
    budget_divisor: int | None = option(
        None, "tokens per block of a count; the block size if null", low=1, only="variant=original"
    )
    approximation_size: int | None = option(
        None,
        "last queries that are looked at; 512, at most a 16th of the prompt (16 at least)",
        low=1,
        only="variant=simplified",
    )
    tile_size: int | None = option(
        None, "queries and keys of a tile; 64, or less on short prompts", low=1, only="variant=simplified"
    )

    knobs: ClassVar[tuple[str, ...]] = ("gamma",)
    within: ClassVar[tuple[str, ...]] = ("approximation_size",)
    sizes: ClassVar[tuple[str, ...]] = ("min_budget", "block_size", "tile_size")

    def check_model(self, model: Any) -> None:
        if self.max_budget is not None and self.max_budget < (self.min_budget or 1):
            raise UserError(f"{self.name('max_budget')}: must be >= min_budget={self.min_budget}")

    def leaves_out(self, tokens: int) -> bool:
        if self.variant == "original":
            size = block_of(self.block_size, 128, tokens)
            return not is_short(tokens, size, self.min_budget)
        least, size = self.min_budget or 1, block_of(self.tile_size, 64, tokens)  # least of both columns and diagonals
        return least < tokens and room(tokens, min(least, 4), min(least, size), size)  # so many have a fixed place

    def native(self, tokens: int) -> float | None:
        return self.gamma

    def estimate(self, heads: Heads) -> Any:
        return _Original(self, heads) if self.variant == "original" else _Simplified(self, heads)

    def span(self, heads: Heads, seen: Any) -> tuple[float, float]:
        # The Sparse Frontier's highest ratios have alpha 0 and smaller budgets: so do knobs below 0
        return (-1.0 if self.variant == "simplified" and self.min_budget is None else 0.0), 1.0

    def build(self, heads: Heads, seen: Any, knob: float) -> Selection:
        found: Selection = seen.build(knob)
        found.extra["gamma"] = max(0.0, knob)
        return found

    def index_flops(self, tokens: int, layer: Attention, learned: Mapping[str, Tensor]) -> float:
        if self.variant == "simplified":
            return 2.0 * layer.heads * self.rows(tokens) * tokens * layer.head_dim
        size = block_of(self.block_size, 128, tokens)
        return 2.0 * layer.heads * layer.head_dim * (size * tokens + (tokens / size) ** 2 / 2)

    def rows(self, tokens: int) -> int:
        """Simplified: the last queries that are looked at."""
        return min(tokens, scaled(self.approximation_size, 512, tokens, share=16, least=16))


def count(mass: Tensor, gamma: float) -> Tensor:
    """One more than the entries, largest first, whose cumulated mass is <= gamma: (H, N) -> (H,)."""
    return 1 + (mass.sort(dim=1, descending=True).values.cumsum(dim=1) <= gamma).sum(dim=1)


def is_short(tokens: int, size: int, least: int | None) -> bool:
    """Original: whether a prompt is dense, as it has no more than two blocks, or than the fewest tokens in blocks."""
    return tokens <= max(2, -(-(least or 1) // size)) * size


class _Simplified:
    def __init__(self, how: FlexPrefill, heads: Heads) -> None:
        self.tokens, rows = heads.tokens, how.rows(heads.tokens)
        self.size = block_of(how.tile_size, 64, heads.tokens)
        self.least = min(self.tokens, scaled(how.min_budget, 512, self.tokens, share=16, least=1))
        sums = slash_scores(heads, rows)
        self.masses = sums.vertical / rows, sums.slash / rows
        self.verticals = ranks(sums.vertical, 4)
        self.slashes = ranks(sums.slash, self.size)

    def counts(self, gamma: float) -> Tensor:
        """(H, 2): columns and diagonals of each head. Counted before any are forced. Below 0: only a budget, and a
        share 1 + gamma of it."""
        least = max(1, round(self.least * min(1.0, 1 + gamma)))
        both = [count(mass, gamma) if gamma >= 0 else torch.ones(len(mass)) for mass in self.masses]
        return torch.stack(both, dim=1).clamp(least, self.tokens).to(self.verticals.device)

    def build(self, gamma: float) -> Selection:
        counts = self.counts(gamma)
        return slash_tiles(self.verticals < counts[:, :1], self.slashes < counts[:, 1:], self.size)


class _Original:
    def __init__(self, how: FlexPrefill, heads: Heads) -> None:
        self.how, self.tokens = how, heads.tokens
        self.size = block_of(how.block_size, 128, heads.tokens)
        self.blocks = -(-self.tokens // self.size)
        self.least = -(-(how.min_budget or 1) // self.size)
        self.short = is_short(self.tokens, self.size, how.min_budget)
        if self.short:
            return
        sums = slash_scores(heads, self.size)
        self.scores = SlashScores(sums.vertical / self.size, sums.slash / self.size)
        self.vertical = _block_sums(self.scores.vertical, self.size)
        # slash blocks are cut from the far end, where the longest offset is index 0
        self.slash = _block_sums(self.scores.slash.flip(1), self.size)
        self.pooled_key = pooled_mean(heads.keys, self.size)
        self.aware = self._divergence(heads) < how.tau
        self.map = self._map(heads) if bool(self.aware.any()) else None

    def _divergence(self, heads: Heads) -> Tensor:
        """(H,) square root of the Jensen-Shannon divergence of pooled and true column masses; NaN where one is 0."""
        query = heads.query[:, -self.size :].float().mean(dim=1, keepdim=True) * heads.scaling
        predicted = (query @ self.pooled_key.transpose(1, 2))[:, 0].softmax(dim=1)
        middle = (predicted + self.vertical) / 2
        parts = (part * (part / middle).log() for part in (predicted, self.vertical))
        return (0.5 * torch.stack([part.sum(dim=1) for part in parts]).sum(dim=0)).sqrt()

    def _map(self, heads: Heads) -> Tensor:
        """(H, blocks, blocks): each row's softmax over causal blocks of pooled queries and keys."""
        query = pooled(heads.query.float(), self.size, -self.tokens % self.size)
        logits = query @ self.pooled_key.transpose(1, 2) * heads.scaling
        return masked_softmax(logits, torch.ones(self.blocks, self.blocks, dtype=torch.bool).tril().to(logits.device))

    def build(self, gamma: float) -> Selection:
        if self.short:
            return Selection(self.tokens)
        most = self.blocks if self.how.max_budget is None else max(1, self.how.max_budget // self.size)
        divisor = self.how.budget_divisor or self.size
        budgets = []
        for mass in (self.scores.vertical, self.scores.slash):
            kept = (count(mass, gamma) // divisor + 1).clamp(min(self.least, most), min(most, self.blocks))
            budgets.append(torch.where(self.aware, self.least, kept))
        mask = self._lines(*budgets)
        if self.map is not None:
            mask = mask | (self._mass(self.map, gamma) & self.aware[:, None, None])
        found = blocks(mask, self.size, self.tokens, reported=block_sparsity(mask))
        found.extra = {"query_aware_heads": float(self.aware.double().mean())}
        return found

    def _lines(self, verticals: Tensor, slashes: Tensor) -> Tensor:
        """(H, blocks, blocks) bool: so many block columns and block diagonals of each head, (H,) each."""
        columns = ranks(self.vertical, 1) < verticals[:, None]
        near = ranks(self.slash.flip(1), 1) < slashes[:, None]  # by block offset, 0: the diagonal
        place = torch.arange(self.blocks, device=columns.device)
        offset = place[:, None] - place
        diagonals = near[:, offset.clamp(min=0)]
        return (columns[:, None] | diagonals) & (offset >= 0)

    def _mass(self, weights: Tensor, gamma: float) -> Tensor:
        """(H, blocks, blocks) bool: of all rows together, the heaviest blocks up to gamma of the whole mass."""
        flat = weights.flatten(1)
        order = flat.argsort(dim=1, descending=True, stable=True)
        kept = flat.gather(1, order).cumsum(dim=1) <= gamma * self.blocks
        return torch.zeros_like(kept).scatter(1, order, kept).view_as(weights) & (weights > 0)


def _block_sums(mass: Tensor, size: int) -> Tensor:
    """Sums over blocks, zeros behind the last: (H, N) -> (H, blocks)."""
    return F.pad(mass, (0, -mass.shape[1] % size)).view(len(mass), -1, size).sum(dim=2)


def pooled_mean(vectors: Tensor, size: int) -> Tensor:
    """Means over blocks, the last of fewer tokens: (H, N, d) -> (H, blocks, d) float32."""
    tokens = vectors.shape[1]
    sums = pooled(vectors.float(), size, -tokens % size) * size
    starts = torch.arange(0, tokens, size, device=vectors.device)
    return sums / (tokens - starts).clamp(max=size)[:, None]
