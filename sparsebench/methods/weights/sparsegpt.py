"""SparseGPT: one-shot pruning as layer-wise sparse regression (Frantar, Alistarh 2023, arXiv 2301.00774).

With H = (2 / sequences) * sum x x^T over the calibration tokens, damped, and U the upper Cholesky
factor of its inverse (H^-1 = U^T U), columns are visited left to right; the saliency of a weight is

    score S_ij = W_ij^2 / U_jj^2

(the optimal-brain-surgeon saliency once all columns to the left are frozen), the mask is chosen on the
already updated weights - per block of ``blocksize`` columns when unstructured (non-strict threshold,
so slightly above the asked level), every m columns when n:m - and the error of each column is pushed
into the columns to its right. With ``wbits`` below 16 the kept weights are rounded to a per-row grid in
the same sweep. Sparsity counts zeros over the linear layers of the decoder blocks. The released code
(IST-DASLab/sparsegpt) is followed, except that within a column block updates are gathered into matrix
products, and layers with the same inputs pass through one sweep: the same numbers up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.weights.base import Layer, Pruner
from sparsebench.methods.weights.hessian import Hessian
from sparsebench.methods.weights.masks import clear, keep_largest, value_at
from sparsebench.methods.weights.statistics import Statistic

_STRIP = 32  # columns after which the rest of the block is brought up to date
_GROUP = 4  # columns that are brought up to date together, when unstructured


@method(
    name="sparsegpt",
    version=1,
    paper="Frantar and Alistarh 2023, arXiv 2301.00774",
    target="weights",
    phase="once",
    stage="select",
    uses=("calibration", "seed"),
    baseline="magnitude",
    taxonomy=Taxonomy(
        object="weights",
        granularity=("unstructured", "n:m"),
        when_mask_is_found="after_training",
        weights_updated_after_mask="closed_form",
        data_need="calibration",
    ),
)
@dataclass(frozen=True)
class SparseGPT(Pruner):
    """Removes weights by optimal-brain-surgeon saliency and updates the others to make up for it."""

    blocksize: int = option(128, "columns that share one mask decision (and one threshold)", low=1)
    percdamp: float = option(0.01, "damping of the Hessian, as a share of its mean diagonal", above=0.0, high=1.0)
    wbits: int = option(16, "bits of the kept weights (16: not quantised)", choices=(2, 3, 4, 5, 6, 7, 8, 16))
    true_sequential: bool = option(False, "measure every layer with the earlier layers of its block pruned")
    sequential: str = option(
        "block",
        "what calibration sees pruned: earlier blocks, or nothing (one Hessian then serves every level)",
        choices=("block", "none"),
    )

    def statistic(self) -> Callable[[], Statistic] | None:
        return Hessian

    @property
    def order(self) -> str:
        return "layer" if self.true_sequential else self.sequential

    def check(self, layers: Sequence[Layer]) -> None:
        super().check(layers)
        if self.n_of_m and self.blocksize % self.n_of_m[1]:
            raise UserError(
                f"method.sparsegpt.blocksize={self.blocksize}: must be a multiple of {self.n_of_m[1]} "
                f"for pattern={self.pattern}"
            )
        if self.true_sequential and self.sequential == "none":
            raise UserError("method.sparsegpt.sequential=none: contradicts true_sequential=true; give one")
        if self.wbits < 16 and self.level == 0:
            raise UserError(f"method.sparsegpt.wbits={self.wbits}: quantises what is kept; it needs sparsity above 0")

    def score(self, layer: Layer) -> Tensor:
        hessian: Hessian = layer.statistic
        weight = (layer.weight if layer.dense is None else layer.dense).float().masked_fill(hessian.dead, 0.0)
        return weight**2 / hessian.factor(self.percdamp).diag() ** 2

    def solve(self, layer: Layer) -> tuple[Tensor, Tensor]:
        return self.solve_together([layer])[0]

    def solve_together(self, layers: Sequence[Layer]) -> list[tuple[Tensor, Tensor]]:
        """One pass over the columns for all of them; what is chosen, and by what threshold, stays each layer's own."""
        level = {layer.name: self.level_of(layer) for layer in layers}
        at_work = [layer for layer in layers if level[layer.name] or self.wbits < 16]
        found: dict[str, tuple[Tensor, Tensor]] = {}
        if at_work:
            hessian: Hessian = at_work[0].statistic
            factor = hessian.factor(self.percdamp)
            dense = [layer.weight.float() for layer in at_work]
            grid = Grid.of(torch.cat(dense), self.wbits) if self.wbits < 16 else None
            weights = [weight.masked_fill(hessian.dead, 0.0) for weight in dense]
            levels = [level[layer.name] for layer in at_work]
            swept = sweep(weights, factor, levels, self.n_of_m, self.blocksize, grid)
            for layer, weight in zip(at_work, swept, strict=True):
                updated = weight.to(layer.weight.dtype)
                mask = updated != 0
                found[layer.name] = (mask, updated)
                self._remark(layer, hessian, mask.numel() - int(mask.count_nonzero()))
        whole = [layer for layer in layers if layer.name not in found]
        found |= {layer.name: (torch.ones_like(layer.weight, dtype=torch.bool), layer.weight) for layer in whole}
        return [found[layer.name] for layer in layers]

    def _remark(self, layer: Layer, hessian: Hessian, zeros: int) -> None:
        """What the record should say of a layer that was pruned."""
        if hessian.damping_used != self.percdamp:
            layer.warnings.append(
                f"Hessian not positive definite with percdamp={self.percdamp:g}, damped by {hessian.damping_used:g}"
            )
        if bool(hessian.dead.any()):
            layer.warnings.append("inputs that were zero in all calibration data lost their weights")
        layer.surplus = max(0, zeros - self.count(layer))

    def count(self, layer: Layer) -> int:
        """The zeros that the rule asks for; ties, dead inputs and rounding to a grid may add to them."""
        rows, columns = layer.weight.shape
        level = self.level_of(layer)
        if self.n_of_m:
            return rows * (columns // self.n_of_m[1]) * (self.n_of_m[1] - self.n_of_m[0])
        widths = (min(self.blocksize, columns - start) for start in range(0, columns, self.blocksize))
        return sum(int(rows * width * level) + 1 for width in widths) if level else 0

    def tolerance(self, layers: Sequence[Layer]) -> float:
        zeros = sum(self.count(layer) + layer.surplus for layer in layers)
        asked = sum(self.level_of(layer) * layer.weight.numel() for layer in layers)
        return 1e-9 + abs(zeros - asked) / sum(layer.weight.numel() for layer in layers)


@dataclass(frozen=True)
class Grid:
    """A per-row asymmetric grid of 2^bits levels that holds 0 exactly. scale, zero: (out, 1)."""

    scale: Tensor
    zero: Tensor
    levels: int

    @classmethod
    def of(cls, weight: Tensor, bits: int) -> Grid:
        """The min/max grid of the dense weight (out, in); an all-zero row gets [-1, 1]."""
        low = weight.amin(dim=1, keepdim=True).clamp(max=0)
        high = weight.amax(dim=1, keepdim=True).clamp(min=0)
        empty = (low == 0) & (high == 0)
        low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
        scale = (high - low) / (2**bits - 1)
        return cls(scale, torch.round(-low / scale), 2**bits - 1)

    def round(self, column: Tensor) -> Tensor:
        """column: (out, 1) -> the nearest grid values."""
        steps = torch.clamp(torch.round(column / self.scale) + self.zero, 0, self.levels)
        return self.scale * (steps - self.zero)


def sweep(
    weights: Sequence[Tensor],
    factor: Tensor,
    levels: Sequence[float],
    n_of_m: tuple[int, int] | None,
    blocksize: int,
    grid: Grid | None,
) -> list[Tensor]:
    """Layers with the same inputs, pruned and updated: each (out, in) float32, with its own level; factor U: (in, in)
    upper; ``grid``: of all rows. Works on the transpose, in which a column of the weights lies together."""
    turned = torch.cat([weight.t() for weight in weights], dim=1).contiguous()
    rows = [len(weight) for weight in weights]
    columns = len(turned)
    for start in range(0, columns, blocksize):
        end = min(start + blocksize, columns)
        block, upper = turned[start:end], factor[start:end, start:end]
        pruned = torch.zeros_like(block, dtype=torch.bool)
        if n_of_m is None:
            score = block**2 / upper.diag()[:, None] ** 2
            for its, chosen, level in zip(score.split(rows, 1), pruned.split(rows, 1), levels, strict=True):
                if level:
                    torch.le(its, value_at(its.reshape(1, -1), int(its.numel() * level)), out=chosen)
        errors = _sweep_block(block, upper, pruned, n_of_m, grid)
        turned[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return [weight.t().contiguous() for weight in turned.split(rows, 1)]


def _sweep_block(
    block: Tensor, upper: Tensor, pruned: Tensor, n_of_m: tuple[int, int] | None, grid: Grid | None
) -> Tensor:
    """One block of columns, in place: block (b, out), upper (b, b) -> the scaled errors (b, out).

    A column is brought up to date when its turn comes, not each time that one before it is done: in products with the
    errors of the strip, then of the group of columns that it stands in."""
    errors = torch.empty_like(block)
    width = len(block)
    diagonal, kept = upper.diag(), ~pruned
    squares = diagonal[:, None] ** 2
    divisor = diagonal[:, None] / pruned  # infinity where it is kept: no error
    columns, its_errors, divisors = block.unbind(), errors.unbind(), divisor.unbind()  # an index costs as much as a sum
    above = upper.t().unbind()
    size = _GROUP if n_of_m is None else n_of_m[1]
    strip = size * max(1, _STRIP // size)
    for first in range(0, width, strip):
        last = min(first + strip, width)
        for start in range(first, last, size):
            group = slice(start, min(start + size, last))
            block[group].addmm_(upper[first:start, group].t(), errors[first:start], alpha=-1)
            if n_of_m and start + size <= width:
                kept[group] = keep_largest(block[group] ** 2 / squares[group], n_of_m[0])
                divisor[group] = diagonal[group, None] / ~kept[group]
            for j in range(group.start, group.stop):
                column = columns[j]
                if j > start:
                    column.addmv_(errors[start:j].t(), above[j][start:j], alpha=-1)
                if grid is None:
                    torch.div(column, divisors[j], out=its_errors[j])
                else:
                    rounded = grid.round(column.masked_fill(~kept[j], 0.0)[:, None])[:, 0]
                    torch.div(column - rounded, diagonal[j], out=its_errors[j])
                    column.copy_(rounded)
        block[last:].addmm_(upper[first:last, last:].t(), errors[first:last], alpha=-1)
    if grid is None:
        clear(block, kept)
    return errors
