"""DSnoT: training-free fine-tuning of a mask by swapping weights (Zhang et al. 2023, arXiv 2310.08915).

Starts from the mask of the pruner before it and, in every output row, regrows one pruned weight and
prunes one kept weight at a time, so that the row's expected output comes closer to the dense one.
With the statistics of input feature j over the calibration sequences (m_j: mean of the sum over
tokens of x_j; c_j: mean of the sum of x_j^2; v_j: variance of x_j within sequences), for row r

    D_rj = W_rj * m_j                        expected contribution
    err_r = sum of D_rj over the pruned j    dense minus sparse expected output
    regrow   g = largest D_rg / v_g^gamma among the pruned j with D > 0     if err_r > 0
    prune    p = smallest |W_rp| * sqrt(c_p) among the kept j with D < 0    if err_r > 0
    err_r <- err_r + D_rp - D_rg

and with the signs exchanged if err_r <= 0, until |err_r| <= update_threshold or max_cycle_time swaps.
Under n:m, p is the kept weight of g's own group with the smallest score of the selecting method
(without one: |W_rp| * sqrt(c_p)), whatever its sign. A row's list that runs out ends the row.

Sparsity is what it was: a swap is one in, one out. A layer whose mask changes has its dense values
at the kept entries (the update of SparseGPT is undone there: it made up for other pruned weights);
a layer that is skipped stays as its pruner left it. By default, as published, only the attention
projections are refined. The released code (zyxxmu/DSnoT) is followed, except that it runs on past
the end of a list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError, closest
from sparsebench.methods.weights.base import Layer, WeightMethod
from sparsebench.methods.weights.statistics import InputMoments, Statistic

_INPUTS_PER_CYCLE = 80  # the published effort: 50 cycles on 4096 inputs


@method(
    name="dsnot",
    version=1,
    paper="Zhang et al. 2023, arXiv 2310.08915",
    target="weights",
    phase="once",
    stage="refine",
    uses=("calibration",),
    taxonomy=Taxonomy(
        object="weights",
        granularity=("unstructured", "n:m"),
        when_mask_is_found="after_training",
        data_need="calibration",
    ),
)
@dataclass(frozen=True)
class DSnoT(WeightMethod):
    """Swaps pruned and kept weights of a row until its expected output is the dense one."""

    stage = "refine"

    max_cycle_time: str = option(
        "50", "most swaps of a row: a count >= 0, or auto: max(1, round(inputs / 80))", unit="swaps"
    )
    update_threshold: float = option(
        0.1, "rows whose |err| is not above it are left as they are", low=0.0, unit="outputs summed over a sequence"
    )
    pow_of_var_regrowing: float = option(
        1.0, "gamma: power of the input variance that divides the regrowing key (0: no division)", low=0.0
    )
    same_sign_rule: bool = option(
        False, "unstructured: a row also ends before the swap that would turn the sign of its err (n:m: always)"
    )
    skip_layer: str = option(
        "mlp",
        "layers that keep the pruner's mask: all but the attention projections, the attention projections, or none",
        choices=("mlp", "self_attn", "none"),
    )
    skip_sub_layer: str = option("none", "projection that keeps the pruner's mask, such as o_proj")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_cycle_time != "auto" and not self.max_cycle_time.isdecimal():
            raise UserError(f"method.dsnot.max_cycle_time={self.max_cycle_time}: must be a whole number >= 0, or auto")

    def statistic(self) -> Callable[[], Statistic] | None:
        return InputMoments

    def check(self, layers: Sequence[Layer]) -> None:
        projections = {layer.name.rpartition(".")[2] for layer in layers}
        if self.skip_sub_layer not in {"none", *projections}:
            raise UserError(
                f"method.dsnot.skip_sub_layer={self.skip_sub_layer}: no such projection"
                f"{closest(self.skip_sub_layer, {'none', *projections})}"
            )

    def skips(self, name: str) -> bool:
        """Whether the layer keeps the mask of its pruner. What lies in no attention module counts as mlp."""
        parts = name.split(".")
        attention = any("attn" in part or "attention" in part for part in parts)
        return self.skip_layer == ("self_attn" if attention else "mlp") or self.skip_sub_layer == parts[-1]

    def cycles(self, inputs: int) -> int:
        """Most swaps of a row of so many inputs."""
        if self.max_cycle_time == "auto":
            return max(1, round(inputs / _INPUTS_PER_CYCLE))
        return int(self.max_cycle_time)

    def refine(self, layer: Layer, mask: Tensor) -> Tensor:
        cycles = min(self.cycles(mask.shape[1]), mask.shape[1])  # no list is longer than the row
        if cycles == 0 or self.skips(layer.name):
            return mask
        seen: InputMoments = layer.statistic
        weight = (layer.weight if layer.dense is None else layer.dense).float()
        contribution = weight * seen.sums
        norm = weight.abs() * seen.squares.sqrt()
        key = contribution
        if self.pow_of_var_regrowing > 0:
            key = contribution / seen.variance**self.pow_of_var_regrowing
        usable = ~mask & key.isfinite()  # a feature that does not vary has no key: never regrown
        regrow = Ranking(cycles, (-key, usable & (key > 0)), (key, usable & (key < 0)))
        prune: Candidates
        if layer.n_of_m:
            prune = InGroup(norm if layer.score is None else layer.score, mask, layer.n_of_m[1])
        else:
            prune = Ranking(cycles, (norm, mask & (contribution < 0)), (norm, mask & (contribution > 0)))
        same_sign = self.same_sign_rule or layer.n_of_m is not None
        return swap(mask, contribution, regrow, prune, cycles, self.update_threshold, same_sign)


class Candidates(Protocol):
    """Where the columns to prune come from, for all rows at once."""

    def next(self, side: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        """side: (out,) 0 where err > 0, else 1; grown: (out,) columns about to be regrown -> the next
        column of every row, (out,), and whether there is one, (out,) bool."""
        ...

    def take(self, rows: Tensor, side: Tensor, columns: Tensor) -> None:
        """The rows (indices) that went through with their swap: its columns are gone; all (rows,)."""
        ...


class Ranking:
    """Two lists of columns for every row, one for each side of err, ascending by (keys, candidates) of
    (out, in), ties to the lower column; each is consumed from its front, ``length`` columns at most."""

    def __init__(self, length: int, *sides: tuple[Tensor, Tensor]) -> None:
        orders = [
            keys.masked_fill(~candidates, torch.inf).sort(dim=1, stable=True).indices[:, :length].clone()
            for keys, candidates in sides
        ]
        self.order = torch.stack(orders)  # (2, out, length)
        self.count = torch.stack([candidates.sum(dim=1) for _, candidates in sides]).clamp(max=length)
        self.used = torch.zeros_like(self.count)  # (2, out)
        self.rows = torch.arange(self.count.shape[1], device=self.count.device)

    def next(self, side: Tensor, grown: Tensor | None = None) -> tuple[Tensor, Tensor]:
        used = self.used[side, self.rows]
        return self.order[side, self.rows, used.clamp(max=self.order.shape[2] - 1)], used < self.count[side, self.rows]

    def take(self, rows: Tensor, side: Tensor, columns: Tensor) -> None:
        self.used[side, rows] += 1


class InGroup:
    """n:m: the column with the smallest score among those of the regrown column's group that were kept
    at the start and still are. scores, mask: (out, in); groups of ``size`` aligned columns."""

    def __init__(self, scores: Tensor, mask: Tensor, size: int) -> None:
        self.scores = scores.masked_fill(~mask, torch.inf)
        self.group = torch.arange(size, device=mask.device)

    def next(self, side: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        size = len(self.group)
        # rows without a column to regrow may point behind the last whole group; they do not swap
        columns = ((grown // size * size)[:, None] + self.group).clamp(max=self.scores.shape[1] - 1)
        lowest, place = self.scores.gather(1, columns).min(dim=1)
        return columns.gather(1, place[:, None])[:, 0], lowest.isfinite()

    def take(self, rows: Tensor, side: Tensor, columns: Tensor) -> None:
        self.scores[rows, columns] = torch.inf


def swap(
    mask: Tensor,
    contribution: Tensor,
    regrow: Ranking,
    prune: Candidates,
    cycles: int,
    threshold: float,
    same_sign: bool,
) -> Tensor:
    """The refined mask (out, in). A row that stops once (|err| not above the threshold, a list at its
    end, or with ``same_sign`` a swap that turns the sign of err) is never looked at again."""
    mask = mask.clone()
    err = (contribution * ~mask).sum(dim=1)
    initial = err.sign()
    going = torch.ones_like(err, dtype=torch.bool)
    for _ in range(cycles):
        side = (~(err > 0)).long()
        grown, grows = regrow.next(side)
        pruned, prunes = prune.next(side, grown)
        columns = torch.stack([pruned, grown], dim=1)
        pair = contribution.gather(1, columns)
        new = err + pair[:, 0] - pair[:, 1]
        going = going & grows & prunes & (err.abs() > threshold)
        if same_sign:
            going = going & (new.sign() == initial)
        rows = going.nonzero()[:, 0]
        if len(rows) == 0:
            break
        mask[rows, grown[rows]] = True
        mask[rows, pruned[rows]] = False
        regrow.take(rows, side[rows], grown[rows])
        prune.take(rows, side[rows], pruned[rows])
        err = torch.where(going, new, err)
    return mask
