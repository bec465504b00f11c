"""Sparsing Law's metrics of activation sparsity, as sparsifiers (Luo et al. 2024, arXiv 2411.02335).

Which neurons of a gated MLP a token can do without, by ``metric``:

    cett, pplp:  |h_i| ||W_down[:,i]||_2 below a threshold per layer, h = act(gate) * up (see ``cett``)
    topk:        all but the topk_ratio largest |act(gate)|
    fat:         |act(gate)| < eps, one eps for all layers
    relu:        act(gate) = 0

Levels: ``pplp`` takes ``p`` and finds the common cett at which calibration perplexity is 1 + p times the dense one
(0.01 in the paper); ``cett``, ``topk``, ``fat`` take ``cett``, ``topk_ratio``, ``fat_eps``, or ``sparsity``, for which
cett and eps are found by bisection, all layers gated at once; ``relu`` has no level and uses neither. Sparsity and
achieved are dropped neurons / all, over tokens and layers: 1 - activation ratio. What is skipped differs: h is known
only behind gate and up, so that cett and pplp spare columns of down alone, the others rows of up as well; the paper
counts (1 + 2A)/3 of the MLP at activation ratio A for all, as if a predictor knew the neurons. ``topk_scope``: the
released code ranks a whole batch at once; here ``tensor`` is one sequence, so that batches do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.activations.base import FittedMethod, Progress
from sparsebench.methods.activations.cett import Probe, Reached, Search, WeakNeurons, bisect
from sparsebench.methods.activations.gating import Gate, only, top_k
from sparsebench.methods.activations.sites import GatedBlock, walk

LEVEL_OF = {"pplp": "p", "cett": "cett", "topk": "topk_ratio", "fat": "fat_eps"}
SITES = ["gate_out"]
Measure = Callable[[Sequence[Gate]], Reached]  # gates -> what the calibration data costs under them
_MISSED = 0.01  # how far the calibration data may stay from what was asked before the record warns


class SmallGates(Gate):
    """Drops |act(gate)| < eps; exact zeros where eps is 0."""

    def __init__(self, block: GatedBlock, eps: float) -> None:
        super().__init__(block, None)
        self.eps = eps + 1e-18  # as in the released code: zeros are below an eps of 0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keep = ~(x.abs().float() < self.eps)
        return only(keep, x), keep


class LargestGates(Gate):
    """Keeps the share ``ratio`` of the largest |act(gate)|, of each token or of a sequence; zeros are never kept."""

    def __init__(self, block: GatedBlock, ratio: float, each_token: bool) -> None:
        super().__init__(block, None)
        self.ratio, self.each_token = ratio, each_token

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        score = x.abs() if self.each_token else x.abs().flatten(1)
        count = min(score.shape[-1], math.ceil(round(self.ratio * score.shape[-1], 9)))
        keep = top_k(score, count).view_as(x) & (x != 0)
        return only(keep, x), keep


@method(
    name="sparsing_law",
    version=1,
    paper="Luo et al. 2024, arXiv 2411.02335",
    target="activations",
    phase="prefill",
    uses=("calibration", "seed"),
    baseline="topk",
    taxonomy=Taxonomy(
        object="activations",
        granularity=("unstructured", "row", "column"),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        data_need="calibration",
        benefit_realised_on=("memory", "flops"),
        kernel_required="gathered gated MLP",
    ),
)
@dataclass(frozen=True)
class SparsingLaw(FittedMethod):
    """Drops MLP neurons that a token can do without: PPL-p% sparsity (CETT), and the paper's other metrics."""

    windows: int | None = option(8, "calibration sequences that are used: the first so many; all if null", low=1)
    metric: str = option(
        "cett", "which neurons are weak; pplp: cett with its level in perplexity",
        choices=("pplp", "cett", "topk", "fat", "relu"),
    )  # fmt: skip
    p: float | None = option(
        None, "metric=pplp: relative rise of perplexity", above=0.0, below=1.0, unit="instead of sparsity"
    )
    cett: float | None = option(
        None, "metric=cett: relative error of a layer's output", low=0.0, high=1.0, unit="instead of sparsity"
    )
    topk_ratio: float | None = option(
        None, "metric=topk: share of the neurons that is kept", above=0.0, high=1.0, unit="instead of sparsity"
    )
    fat_eps: float | None = option(
        None, "metric=fat: activations of the gate below it are dropped", low=0.0, unit="instead of sparsity"
    )
    topk_scope: str = option("tensor", "what is ranked: a sequence's tokens, or each by itself",
                             choices=("tensor", "token"), only="metric=topk")  # fmt: skip
    tol: float = option(1e-6, "width of the last interval of the bisection", low=1e-9, high=0.1)
    grid: int = option(65536, "thresholds that a layer chooses from", low=16, high=4_194_304)
    hi_quantile: float = option(0.99, "quantile of the magnitudes that is the highest threshold", above=0.0, high=1.0)

    @property
    def named(self) -> tuple[str, float] | None:
        """The level that was given instead of sparsity, with its option's name."""
        given = [(name, getattr(self, name)) for name in LEVEL_OF.values() if getattr(self, name) is not None]
        return given[0] if given else None

    @property
    def by_cett(self) -> bool:
        return self.metric in ("pplp", "cett")

    def check_model(self, model: nn.Module, blocks: Sequence[GatedBlock]) -> None:
        given, where = self.named, "method.sparsing_law"
        for name in LEVEL_OF.values():
            if getattr(self, name) is not None and (LEVEL_OF.get(self.metric) != name):
                owner = next(metric for metric, level in LEVEL_OF.items() if level == name)
                raise UserError(f"{where}.{name}={getattr(self, name):g}: goes with metric={owner}, not {self.metric}")
        if self.metric == "pplp" and given is None:
            raise UserError(f"{where}.metric=pplp: its level is p, not sparsity; give {where}.p=0.01 (the paper's)")
        negative = torch.tensor([-1.0], dtype=next(model.parameters()).dtype)
        if self.metric == "relu" and float(blocks[0].activation.to("cpu")(negative)) != 0:
            raise UserError(
                f"{where}.metric=relu: the MLP's {type(blocks[0].activation).__name__} is never exactly zero; "
                "take metric=cett, topk or fat"
            )

    def shapes(self, blocks: Sequence[GatedBlock]) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {f"{block.name}.threshold": () for block in blocks}
        return found | {self._key: (3,)}

    @property
    def _key(self) -> str:
        """The tensor of what was found, under the name of what was asked, so that no other level reads it."""
        return f"{self.metric}.{'.'.join(map(str, self.named)) if self.named else 'sparsity'}.found"

    def fit(self, model: nn.Module, windows: Tensor, seed: int, progress: Progress) -> dict[str, Tensor]:
        """A threshold for each block, and (cett, perplexity ratio, activation ratio) on the windows."""
        probe = Probe(model, windows, Search(self.tol, self.grid, self.hi_quantile))
        steps, done = math.ceil(math.log2(1 / self.tol)) + 1, 0

        def reached(gates: Sequence[Gate]) -> Reached:
            nonlocal done
            done += 1
            progress(done, steps)
            return probe.run(gates)

        place = math.nan
        thresholds = [0.0] * len(probe.blocks)
        if self.by_cett and not (self.named is None and self.level == 0):
            place = self._cett(probe, reached)
            thresholds = probe.thresholds(place)
        elif self.metric == "fat":
            eps = self._eps(model, windows, probe, reached) if self.fat_eps is None else self.fat_eps
            thresholds = [eps] * len(probe.blocks)
        tensors = {f"{b.name}.threshold": torch.tensor(t) for b, t in zip(probe.blocks, thresholds, strict=True)}
        final = reached(self.gates(probe.blocks, tensors))
        return tensors | {self._key: torch.tensor([place, final.ratio, final.mean], dtype=torch.float64)}

    def _cett(self, probe: Probe, reached: Measure) -> float:
        """The common cett of the level that is asked."""
        if self.cett is not None:
            return self.cett
        if self.p is not None:
            return bisect(lambda cett: reached(probe.gates(cett)).ratio, 1 + self.p, self.tol)
        return bisect(lambda cett: 1 - reached(probe.gates(cett)).mean, self.level, self.tol)

    def _eps(self, model: nn.Module, windows: Tensor, probe: Probe, reached: Measure) -> float:
        """The eps of a sparsity, among the quantiles of |act(gate)|, whose range says nothing of where they lie."""
        if self.level == 0:
            return 0.0
        magnitudes = torch.cat(
            [seen.values["gate_out"].abs().float().flatten() for seen in walk(model, windows, SITES)]
        )
        rising = magnitudes.sort().values

        def eps(quantile: float) -> float:
            return float(rising[min(len(rising) - 1, int(quantile * len(rising)))])

        def dropped(quantile: float) -> float:
            return 1 - reached([SmallGates(block, eps(quantile)) for block in probe.blocks]).mean

        return eps(bisect(dropped, self.level, self.tol))

    def gates(self, blocks: Sequence[GatedBlock], tensors: Mapping[str, Tensor]) -> list[Gate]:
        thresholds = [float(tensors[f"{block.name}.threshold"]) for block in blocks]
        if self.by_cett:
            return [WeakNeurons(block, t, watch=True) for block, t in zip(blocks, thresholds, strict=True)]
        if self.metric == "topk":
            ratio = 1 - self.level if self.topk_ratio is None else self.topk_ratio
            return [LargestGates(block, ratio, self.topk_scope == "token") for block in blocks]
        return [SmallGates(block, t) for block, t in zip(blocks, thresholds, strict=True)]

    def asked_of(self, blocks: Sequence[GatedBlock]) -> float | None:
        if self.topk_ratio is not None:
            return 1 - self.topk_ratio
        return None if self.named or self.metric == "relu" else self.level

    def columns(self, gates: Sequence[Gate], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """``cett``, ``ppl_ratio``, ``activation_ratio``: asked or found on the calibration data; ``cett_realised``:
        mean over layers while the model ran, where errors compound; ``fat_eps``."""
        place, ratio, activation = tensors[self._key].tolist()
        found = {"ppl_ratio": ratio, "activation_ratio": activation}
        weak = [gate for gate in gates if isinstance(gate, WeakNeurons) and gate.tokens]
        if weak and not math.isnan(place):
            found |= {"cett": place, "cett_realised": sum(gate.lost / gate.tokens for gate in weak) / len(weak)}
        if self.metric == "fat":
            found["fat_eps"] = max(gate.eps for gate in gates if isinstance(gate, SmallGates))
        return found

    def remarks(self, blocks: Sequence[GatedBlock], tensors: Mapping[str, Tensor]) -> list[str]:
        _, ratio, activation = tensors[self._key].tolist()
        if self.p is not None:
            what, asked, got = "perplexity ratio", 1 + self.p, ratio
        elif self.named is None and self.metric in ("cett", "fat"):
            what, asked, got = "sparsity", self.level, 1 - activation
        else:
            return []
        missed = abs(got - asked) > _MISSED
        return [f"asked {what} {asked:.6g}, found {got:.6g} on the calibration data"] if missed else []
