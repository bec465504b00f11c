"""R-Sparse: rank-aware activation sparsity (Zhang et al. 2025, arXiv 2504.19449).

    m = |x| * ||W_:j|| > t;   y = W (x m) + U_r S_r V_r^T (x (1 - m))

Of the in * out * (1 - s) weights that a token may read of a layer, a share alpha buys input channels and the rest
the rank of the truncated SVD through which the dropped channels go. One t per layer: the int(n p)-th smallest score
of the calibration tokens, p = 1 - (1 - s) alpha. alpha = 1 is channels alone, scored by |x|; alpha = 0 rank alone.
``alpha`` holds for all layers, or a ``recipe`` gives each its own, or ``search`` finds them by evolution (the paper's
search, by ``groups`` of layers; details that it does not give are in ``evolution``; that a group is a run of
neighbouring blocks, searched behind the one before it, is ours). The released code (VITA-Group/R-Sparse) is followed:
calibration is one window of 512 tokens, and only the last 10% of a prompt's tokens are sparse, which published
scores rest on; here ``sparse_tail=1`` gates all of them, and 0 leaves prompts dense (there: 1). ``compat`` keeps its
budget of k and v. Sparsity and achieved count weights read by acted tokens, factors included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.activations import evolution
from sparsebench.methods.activations.base import FittedMethod, Progress
from sparsebench.methods.activations.gating import Acting, Gate
from sparsebench.methods.activations.low_rank import Budget, Factors, LowRankGate, budget, factors
from sparsebench.methods.activations.sites import READER, SITE_OF, GatedBlock, Linear, gated_blocks, walk

Place = tuple[GatedBlock, Linear]
Scores = dict[str, tuple[Tensor, Tensor]]  # by layer: |x| and |x| * scale over calibration data, sorted


def threshold(ascending: Tensor, dropped: float) -> float:
    """The int(n p)-th smallest of sorted scores; 0 where that is none."""
    place = int(len(ascending) * dropped)
    return float(ascending[place - 1]) if place else 0.0


def places(blocks: Sequence[GatedBlock]) -> list[Place]:
    """All layers in the order of a recipe: block by block, q, k, v, o, gate, up, down."""
    return [(block, block.linears[kind]) for block in blocks for kind in SITE_OF]


@method(
    name="r_sparse",
    version=1,
    paper="Zhang et al. 2025, arXiv 2504.19449",
    target="activations",
    phase="prefill",
    uses=("calibration", "seed"),
    baseline="teal",
    taxonomy=Taxonomy(
        object="activations",
        granularity=("unstructured", "column"),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        data_need="calibration",
        allocation="per_layer_search",
        benefit_realised_on=("flops",),
        kernel_required="gathered matrix-vector product with low-rank factors",
    ),
)
@dataclass(frozen=True)
class RSparse(FittedMethod):
    """Sends important input channels through the weight, the others through its truncated SVD."""

    sparse_tail: float = option(
        0.1, "share of a prompt's tokens, at its end, that are acted on; decoded tokens always are", low=0.0, high=1.0
    )
    windows: int | None = option(16, "calibration sequences that are used: the first so many; all if null", low=1)
    tokens: int = option(512, "calibration tokens that thresholds are read off: the first so many", low=1)
    alpha: float = option(1.0, "share of each layer's weights spent on input channels, not rank", low=0.0, high=1.0)
    recipe: str | None = option(
        None, "a text file of alpha and sparsity for every layer, by block: q k v o gate up down", unit="file"
    )
    search: bool = option(False, "find each layer's alpha by evolution: lowest loss on the calibration windows")
    population: int = option(32, "vectors of a generation", low=2, high=10_000, only="search=true")
    generations: int = option(5, "generations", low=1, high=10_000, only="search=true")
    groups: int = option(
        1, "groups of neighbouring blocks; each is searched while the others stay", low=1, only="search=true"
    )
    score: str = option("scaled", "|x| times the column's norm, or plain |x|", choices=("scaled", "plain"))
    store: str = option("float16", "precision in which factors and norms are kept", choices=("float16", "float32"))
    compat: bool = option(True, "count k and v as large as q in the budget, as the release does")

    def sparse_tokens(self, tokens: int) -> int:
        return tokens - int(tokens * (1 - self.sparse_tail))

    def check_model(self, model: nn.Module, blocks: Sequence[GatedBlock]) -> None:
        if self.groups > len(blocks):
            raise UserError(f"method.r_sparse.groups={self.groups}: this model has {len(blocks)} blocks")
        if self.recipe is None:
            return
        if self.search:
            raise UserError("method.r_sparse.search=true: a recipe was given; it says every alpha")
        rows, layers = self._recipe(), places(blocks)
        where = f"method.r_sparse.recipe={self.recipe}"
        if len(rows) != len(layers):
            raise UserError(f"{where}: {len(rows)} pairs of alpha and sparsity; this model has {len(layers)} layers")
        weights = [linear.weights for _, linear in layers]
        mean = sum(w * level for w, (_, level) in zip(weights, rows, strict=True)) / sum(weights)
        if abs(mean - self.level) > 0.005:
            raise UserError(f"{where}: its layers have sparsity {mean:.4g} together; run it with sparsity={mean:.4g}")

    def _recipe(self) -> list[tuple[float, float]]:
        """(alpha, sparsity) of every layer. UserError for a file of anything else."""
        where = f"method.r_sparse.recipe={self.recipe}"
        try:
            numbers = [float(word) for word in Path(str(self.recipe)).expanduser().read_text("utf-8").split()]
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: not a text file of numbers ({error})") from None
        rows = list(zip(numbers[::2], numbers[1::2], strict=False))
        if len(numbers) % 2 or not all(0 <= alpha <= 1 and 0 <= level < 1 for alpha, level in rows):
            raise UserError(f"{where}: must hold pairs of alpha (0 to 1) and sparsity (0 to below 1)")
        return rows

    def shapes(self, blocks: Sequence[GatedBlock]) -> dict[str, tuple[int, ...]]:
        names = [linear.name for _, linear in places(blocks)]
        found: dict[str, tuple[int, ...]] = {
            f"{name}.{what}": () for name in names for what in ("alpha", "level", "threshold")
        }
        return found | ({"search.nll": (2,)} if self.search else {})

    def fit(self, model: nn.Module, windows: Tensor, seed: int, progress: Progress) -> dict[str, Tensor]:
        """alpha, level and threshold of every layer; ``search.nll``: losses on the windows of the best vector and
        of channels alone."""
        blocks = gated_blocks(model)
        layers = places(blocks)
        scores = self._scores(model, windows)
        rows = self._recipe() if self.recipe else [(self.alpha, self.level)] * len(layers)
        levels = [level for _, level in rows]
        if not self.search:
            return self._tensors(layers, scores, [alpha for alpha, _ in rows], levels)
        known = {linear.name: self._factors(linear) for _, linear in layers}

        def loss(alphas: Tensor) -> float:
            gates = self._gates(layers, self._tensors(layers, scores, alphas.tolist(), levels), known)
            with Acting(self.sparse_tokens).on(model, gates):
                return _nll(model, windows)

        ones = torch.ones(len(layers), dtype=torch.float64)
        best, value = self._search(loss, [ones, ones * self.alpha], len(blocks), seed, progress)
        found = self._tensors(layers, scores, best.tolist(), levels)
        return found | {"search.nll": torch.tensor([value, loss(ones)])}

    def _search(
        self, loss: Callable[[Tensor], float], first: list[Tensor], blocks: int, seed: int, progress: Progress
    ) -> tuple[Tensor, float]:
        """The best vector of alphas, and its loss."""
        size, generations = self.population, self.generations
        if self.groups == 1:
            return evolution.search(
                loss, first, population=size, generations=generations, seed=seed, progress=progress
            )  # fmt: skip
        entries = torch.arange(len(first[0])).view(blocks, -1)
        groups = [part.flatten() for part in entries.tensor_split(self.groups)]
        return evolution.search_in_groups(
            loss, first, groups, population=size, generations=generations, seed=seed, progress=progress
        )  # fmt: skip

    def _scores(self, model: nn.Module, windows: Tensor) -> Scores:
        found: Scores = {}
        rows = max(1, -(-self.tokens // windows.shape[1]))
        for seen in walk(model, windows[:rows], list(READER)):
            for kind, site in SITE_OF.items():
                linear = seen.block.linears[kind]
                x = seen.values[site].flatten(0, 1)[: self.tokens].abs()
                scaled = x * linear.module.weight.norm(dim=0)
                found[linear.name] = (x.float().flatten().sort().values, scaled.float().flatten().sort().values)
        return found

    def _tensors(
        self, layers: Sequence[Place], scores: Scores, alphas: Sequence[float], levels: Sequence[float]
    ) -> dict[str, Tensor]:
        found = {}
        for (_, linear), alpha, level in zip(layers, alphas, levels, strict=True):
            plain, scaled = scores[linear.name]
            known = scaled if self._scaled(alpha) else plain
            found[f"{linear.name}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
            found[f"{linear.name}.level"] = torch.tensor(level, dtype=torch.float64)
            found[f"{linear.name}.threshold"] = torch.tensor(threshold(known, 1 - (1 - level) * alpha))
        return found

    def _scaled(self, alpha: float) -> bool:
        return alpha != 1 and self.score == "scaled"

    def _factors(self, linear: Linear) -> Factors:
        return factors(linear.module.weight.detach(), getattr(torch, self.store))

    def _budget(self, linear: Linear, tensors: Mapping[str, Tensor]) -> Budget:
        level, alpha = (float(tensors[f"{linear.name}.{what}"]) for what in ("level", "alpha"))
        least = 1 if self.recipe or self.search else 0
        return budget(linear, level, alpha, compat=self.compat, least=least)

    def _gates(
        self, layers: Sequence[Place], tensors: Mapping[str, Tensor], known: Mapping[str, Factors]
    ) -> list[Gate]:
        found: list[Gate] = []
        for block, linear in layers:
            alpha = float(tensors[f"{linear.name}.alpha"])
            rank = self._budget(linear, tensors).rank
            weight = linear.module.weight
            left, right, scale = weight[:, :0], weight.T[:, :0], None
            if alpha != 1:
                parts = known[linear.name] if linear.name in known else self._factors(linear)
                left, right = parts.left[:, :rank].contiguous(), parts.right[:, :rank].contiguous()
                scale = parts.scale if self._scaled(alpha) else None
            cut = float(tensors[f"{linear.name}.threshold"]) if alpha else None
            found.append(LowRankGate(block, linear.kind, cut, scale, left.detach(), right.detach()))
        return found

    def gates(self, blocks: Sequence[GatedBlock], tensors: Mapping[str, Tensor]) -> list[Gate]:
        return self._gates(places(blocks), tensors, {})

    def expected(self, blocks: Sequence[GatedBlock], tensors: Mapping[str, Tensor]) -> dict[str, float]:
        return {linear.name: float(tensors[f"{linear.name}.level"]) for _, linear in places(blocks)}

    def columns(self, gates: Sequence[Gate], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        alphas = [float(value) for name, value in tensors.items() if name.endswith(".alpha")]
        found = {"alpha_mean": sum(alphas) / len(alphas), "alpha_least": min(alphas)}
        if "search.nll" in tensors:
            found["search_nll"], found["search_nll_channels"] = tensors["search.nll"].tolist()
        return found

    def remarks(self, blocks: Sequence[GatedBlock], tensors: Mapping[str, Tensor]) -> list[str]:
        capped = [linear.name for _, linear in places(blocks) if self._budget(linear, tensors).capped]
        if not capped:
            return []
        which = f"{', '.join(capped[:3])}{f' and {len(capped) - 3} more' if len(capped) > 3 else ''}"
        return [f"the budget gives a rank larger than the layer, which is used whole: {which}"]


def _nll(model: nn.Module, windows: Tensor) -> float:
    """Mean loss (nats per token) of the windows (sequences, tokens)."""
    device = next(model.parameters()).device
    total = 0.0
    for row in windows.split(4):
        ids = row.to(device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        total += float(F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return total / (windows.shape[0] * (windows.shape[1] - 1))
