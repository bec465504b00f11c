"""MInference (Jiang, Li et al. 2024, arXiv 2407.02490): each head its own pattern, found once on one sample.

Search, per head: the recall of a candidate is the mean, over late query rows, of the attention mass inside its mask;
the best candidate wins, the first on ties. Candidates (released code): A-shape (100, 800); vertical-slash (30, 800),
(100, 750), (500, 700), (3500, 100); block-sparse with an 8th of the blocks of 32 by pooled q k. Then, on each prompt, a
head's vertical-slash indices come from the last 64 queries (``slashes.py``), its blocks of 64 from pooled q k without
any that are forced.

``assign=paper`` gives heads what won. The released code does something else: a winning A-shape is stored as
vertical-slash (100, 800), a winning block-sparse as vertical-slash (1000, 6096), so that no head uses either
(``assign=released``).

``search=output`` is the released code's second search: each candidate as it is computed on a prompt, on all rows, with
(100, 800) and (1000, 4096) more; the one with the fewest output entries that are off by more than 5e-3 wins. The
patterns are written by ``save=`` and read back by ``fitted_from=``.

The sizes are tokens, for prompts from 3500 on; on shorter ones candidates, forced entries and tiles are shares of the
prompt: A-shape (N/32, N/8); (N/128, N/8), (N/32, 7N/64), (N/8, N/32). ``sparsity`` searches one factor on all sizes.
Achieved counts causal pairs, of tiles as the kernel computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsebench.costs.flops import Attention, attention_of
from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.attention.base import block_of, extents, heads_of, scaled
from sparsebench.methods.attention.block_sparse import pooled
from sparsebench.methods.attention.fitted import FittedMethod
from sparsebench.methods.attention.selections import Band, Heads, PerHead, Selection, blocks, causal, masked_softmax
from sparsebench.methods.attention.slashes import Lines, ranks, slash_scores, slash_tiles
from sparsebench.methods.base import Surroundings
from sparsebench.models.plug import Allowed, Call, Handler, plugged

A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE = range(3)
Pattern = tuple[int, int, int]  # kind and two sizes; block-sparse: (kind, share of the blocks, unused)

_LONG = 3500  # tokens that the paper's candidates need
_LARGEST = 2**20  # size of a pattern that was saved
_ROWS_AT_ONCE = 2**24  # logits
_OFF = 5e-3  # from which an entry of the output is wrong


@method(
    name="minference",
    version=1,
    paper="Jiang et al. 2024, arXiv 2407.02490",
    target="attention",
    phase="prefill",
    uses=("calibration", "seed"),
    baseline="local_sink",
    taxonomy=Taxonomy(
        object="attention",
        granularity=("column", "block"),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        data_need="calibration",
        allocation="per_layer_search",
        benefit_realised_on=("flops",),
        kernel_required="tiles and single columns",
    ),
)
@dataclass(frozen=True)
class MInference(FittedMethod):
    """Gives each head the pattern that holds most of its attention on a sample: sinks, lines, or blocks."""

    ratio: float | None = option(
        None,
        "factor on every head's sizes, in place of sparsity",
        above=0.0,
        high=1_048_576.0,
        unit="instead of sparsity",
    )
    search: str = option(
        "recall", "what a pattern is chosen by: the attention it holds, or the error of its output",
        choices=("recall", "output"), only="fitted_from=none")  # fmt: skip
    assign: str = option(
        "paper",
        "heads get what won, or what the released code stores",
        choices=("paper", "released"),
        only="fitted_from=none",
    )
    samples: int = option(1, "calibration sequences that the search looks at", low=1, only="fitted_from=none")
    starting_layer: int = option(0, "earlier layers are dense", low=0)
    last_q: int | None = option(None, "last queries that are looked at; 64, at most a 32nd of the prompt", low=1)
    forced_verticals: int | None = option(None, "first columns always taken; 30, a 128th of short prompts", low=0)
    forced_slashes: int | None = option(None, "nearest diagonals always taken; 100, a 32nd of short prompts", low=0)
    block_size: int | None = option(None, "tokens of tiles and blocks; 64, or less on short prompts", low=1)
    block_topk: int | None = option(None, "block-sparse heads: blocks per row; 100, at most an 8th of them", low=1)

    knobs: ClassVar[tuple[str, ...]] = ("ratio",)
    within: ClassVar[tuple[str, ...]] = ("last_q",)

    def check_model(self, model: PreTrainedModel) -> None:
        layers = len(attention_of(model))
        if self.starting_layer >= layers:
            raise UserError(f"{self.name('starting_layer')}: must be below the {layers} layers of the model")
        super().check_model(model)

    def shapes(self, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        layers = attention_of(model)
        return {"patterns": (len(layers), layers[0].heads, 3)}

    @torch.no_grad()
    def learn(self, around: Surroundings) -> dict[str, Tensor]:
        windows = around.calibration()[: self.samples].to(around.loaded.device)
        scores = Search(recall if self.search == "recall" else self.exactness)
        with plugged(around.loaded.model, scores):
            for done, window in enumerate(windows):
                around.loaded.model(input_ids=window[None], use_cache=False)
                around.progress(done + 1, len(windows))
        tokens = windows.shape[1]
        tried = candidates(tokens) if self.search == "recall" else more_candidates(tokens)
        found = [[self.stored(tried[int(best)], tokens) for best in layer.argmax(0)] for layer in scores]
        return {"patterns": torch.tensor(found)}

    def fault(self, learned: Mapping[str, Tensor], model: PreTrainedModel) -> str | None:
        patterns = learned["patterns"]
        kinds, sizes = patterns[..., 0], patterns[..., 1:]
        if patterns.is_floating_point() or patterns.is_complex():
            return f"patterns are {patterns.dtype}, not whole numbers"
        if not bool(((kinds >= A_SHAPE) & (kinds <= BLOCK_SPARSE)).all()):
            return f"patterns has kinds from {int(kinds.min())} to {int(kinds.max())}; they go from 0 to {BLOCK_SPARSE}"
        wild = sizes[(sizes < 0) | (sizes > _LARGEST)]
        return f"patterns has a size of {int(wild[0])}; must be >= 0 and <= {_LARGEST}" if len(wild) else None

    def stored(self, best: Pattern, tokens: int) -> Pattern:
        """What a head is given whose best candidate this is."""
        if self.assign == "paper" or best[0] == VERTICAL_SLASH:
            return best
        if best[0] == A_SHAPE:
            return (VERTICAL_SLASH, best[1], best[2])
        return (VERTICAL_SLASH, 1000, 6096) if tokens >= _LONG else (VERTICAL_SLASH, tokens // 8, tokens // 4)

    def native(self, tokens: int) -> float | None:
        return None if self.ratio is None else log2(self.ratio)

    def span(self, heads: Heads, seen: Any) -> tuple[float, float]:
        return -8.0, log2(heads.tokens) + 1

    def estimate(self, heads: Heads) -> Any:
        tokens = heads.tokens
        first, near = _forced(tokens, self.forced_verticals, self.forced_slashes)
        sums = slash_scores(heads, min(tokens, scaled(self.last_q, 64, tokens, share=32, least=16)))
        return ranks(sums.vertical, first), ranks(sums.slash, near)

    def build(self, heads: Heads, seen: Any, knob: float) -> Selection:
        if heads.layer < self.starting_layer:
            return Selection(heads.tokens)
        patterns = heads.learned["patterns"][heads.layer]
        parts = []
        for pattern in patterns.unique(dim=0):
            where = (patterns == pattern).all(dim=1).nonzero()[:, 0]
            kind, one, other = pattern.tolist()
            parts.append((where, self._part(heads, seen, where, (kind, one, other), 2.0**knob)))
        return PerHead(heads.tokens, parts, extra={"ratio": 2.0**knob})

    def _part(self, heads: Heads, seen: Any, where: Tensor, pattern: Pattern, ratio: float) -> Selection:
        """What the heads ``where``, all of one pattern, compute."""
        tokens, (kind, one, other) = heads.tokens, pattern
        size = block_of(self.block_size, 64, tokens)
        if kind == A_SHAPE:
            return Band(tokens, min(one, tokens), min(tokens, int(other * ratio)), tokens, heads.query.device)
        if kind == VERTICAL_SLASH:
            verticals, slashes = (places[where] for places in seen)
            least = 30, 50  # the released code's, in the spirit of the forced ones
            if tokens < _LONG:
                least = _forced(tokens, self.forced_verticals, self.forced_slashes)
            wide, near = (max(int(number * ratio), few) for number, few in zip((one, other), least, strict=True))
            return slash_tiles(verticals < wide, slashes < near, size)
        count = -(-tokens // size)
        kept = scaled(self.block_topk, 100, count, share=8, least=1)
        mask = pooled_blocks(heads.query[where], heads.keys[where], size, max(1, int(kept * ratio)))
        return blocks(mask, size, tokens)

    def exactness(self, heads: Heads) -> Tensor:
        """(candidates, H): minus the output entries that are off by more than 5e-3 under each of ``more_candidates``,
        as it is computed on a prompt."""
        tokens, everyone, seen = heads.tokens, torch.arange(len(heads.query)), self.estimate(heads)
        parts = [self._part(heads, seen, everyone, pattern, 1.0) for pattern in more_candidates(tokens)]
        values = heads.value.repeat_interleave(len(heads.query) // len(heads.value), dim=0).float()
        total = torch.zeros(len(parts), len(heads.query), dtype=torch.float64)
        for begin, end, logits, visible in _rows(heads, 0):
            whole = masked_softmax(logits, visible) @ values
            for place, part in enumerate(parts):
                found = masked_softmax(logits, visible & part.rows(begin, end).to(visible.device)) @ values
                total[place] -= ((found - whole).abs() > _OFF).sum(dim=(1, 2)).double().cpu()
        return total

    def index_flops(self, tokens: int, layer: Attention, learned: Mapping[str, Tensor]) -> float:
        """As if every head looked for verticals and slashes."""
        return 2.0 * layer.heads * scaled(self.last_q, 64, tokens, share=32, least=16) * tokens * layer.head_dim

    def index_flops_of(self, tokens: int, layers: Sequence[Attention], learned: Mapping[str, Tensor]) -> float:
        return super().index_flops_of(tokens, layers[self.starting_layer :], learned)

    def columns(self) -> dict[str, Any]:
        return {"minference_assign": self.assign}


def candidates(tokens: int) -> list[Pattern]:
    """The patterns that are tried on a sample of so many tokens."""
    if tokens >= _LONG:
        lines = [(30, 800), (100, 750), (500, 700), (3500, 100)]
        return [(A_SHAPE, 100, 800), *((VERTICAL_SLASH, *sizes) for sizes in lines), (BLOCK_SPARSE, 8, 1)]
    lines = [(tokens // 128, tokens // 8), (tokens // 32, 7 * tokens // 64), (tokens // 8, tokens // 32)]
    return [
        (A_SHAPE, tokens // 32, tokens // 8),
        *((VERTICAL_SLASH, *sizes) for sizes in lines),
        (BLOCK_SPARSE, 8, 1),
    ]


def more_candidates(tokens: int) -> list[Pattern]:
    """The patterns that the search by output error tries, in its order."""
    lines = [(30, 800), (100, 800), (100, 750), (500, 700), (3500, 100), (1000, 4096)]
    if tokens < _LONG:
        lines = [(tokens // 128, tokens // 8), (tokens // 32, tokens // 8), (tokens // 32, 7 * tokens // 64),
                 (tokens // 8, tokens // 32), (tokens // 8, tokens // 4)]  # fmt: skip
    first, *_, last = candidates(tokens)
    return [*((VERTICAL_SLASH, *sizes) for sizes in lines), first, last]


def _forced(tokens: int, first: int | None = None, near: int | None = None) -> tuple[int, int]:
    """Columns and diagonals that are always taken on a prompt."""
    short = tokens < _LONG
    return (
        first if first is not None else tokens // 128 if short else 30,
        near if near is not None else tokens // 32 if short else 100,
    )


def pooled_blocks(query: Tensor, key: Tensor, size: int, kept: int) -> Tensor:
    """(H, blocks, blocks) bool: each row's best causal blocks by q k of means (zero padded), none forced."""
    padding = -query.shape[1] % size
    scores = pooled(query, size, padding) @ pooled(key, size, padding).transpose(1, 2)
    seen = torch.ones_like(scores[0], dtype=torch.bool).tril()
    best = scores.masked_fill(~seen, -torch.inf).topk(min(kept, len(seen)), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(2, best, True) & seen


class Search(Handler, list[Tensor]):
    """Per layer (candidates, H): the ``score`` of each candidate, the larger the better, summed over samples."""

    def __init__(self, score: Callable[[Heads], Tensor]) -> None:
        super().__init__()
        self.score = score

    def allow(self, call: Call) -> Allowed | None:
        for row, (first, last) in enumerate(extents(call.real)):
            found = self.score(heads_of(call, row, first, last, {}))
            if call.index == len(self):
                self.append(found)
            else:
                self[call.index] += found
        return None


def recall(heads: Heads) -> Tensor:
    """(candidates, H): mean over late rows of the attention mass inside each candidate's mask."""
    tokens = heads.tokens
    masks = [_searched(heads, pattern) for pattern in candidates(tokens)]
    total = torch.zeros(len(masks), len(heads.query), dtype=torch.float64, device=heads.query.device)
    start = 2500 if tokens >= _LONG else tokens // 8
    for begin, end, logits, visible in _rows(heads, start):
        weights = masked_softmax(logits, visible)
        for place, mask in enumerate(masks):
            total[place] += (weights * mask.rows(begin, end)).sum(dim=(1, 2)).double()
    return total.cpu() / (tokens - start)


def _rows(heads: Heads, start: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """The queries from ``start`` on in pieces: first and last + 1, logits (H, rows, N) float32, causal mask."""
    tokens = heads.tokens
    step = max(1, _ROWS_AT_ONCE // (len(heads.query) * tokens))
    for begin in range(start, tokens, step):
        end = min(begin + step, tokens)
        logits = heads.query[:, begin:end].float() @ heads.keys.float().transpose(1, 2) * heads.scaling
        yield begin, end, logits, causal(tokens, tokens, logits.device)[begin:end]


def _searched(heads: Heads, pattern: Pattern) -> Selection:
    """A candidate's mask in the search: single lines instead of tiles, blocks of 32, 30 entries forced."""
    tokens, (kind, one, other) = heads.tokens, pattern
    if kind == A_SHAPE:
        return Band(tokens, one, other, tokens, heads.query.device)
    if kind == VERTICAL_SLASH:
        forced = 30 if tokens >= _LONG else tokens // 128
        sums = slash_scores(heads, min(64, tokens))
        return Lines(tokens, ranks(sums.vertical, forced) < one, ranks(sums.slash, forced) < other)
    size = block_of(None, 32, tokens)
    kept = max(1, -(-tokens // size) // one)
    return blocks(pooled_blocks(heads.query, heads.keys, size, kept), size, tokens)
