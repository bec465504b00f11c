"""The values of an expression's record calls under weights of seeds and samples, many replicates at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy

from sparsebench.analysis import curves
from sparsebench.analysis.expressions import Call, Expression, Number, Operation, Reference
from sparsebench.analysis.statistics import Array, Population, Weights, mean

# The same arithmetic as Expression.evaluate, over arrays: a bootstrap evaluates an expression 10,000 times.
_APPLY: dict[str, Callable[[list[Any]], Any]] = {
    "+": lambda x: x[0] + x[1],
    "-": lambda x: x[0] - x[1],
    "*": lambda x: x[0] * x[1],
    "/": lambda x: numpy.divide(x[0], x[1]),
    "neg": lambda x: -x[0],
    "log": lambda x: numpy.log(x[0]),
    "mean": lambda x: sum(x) / len(x),
    "min": lambda x: numpy.minimum.reduce(numpy.broadcast_arrays(*x)),
    "max": lambda x: numpy.maximum.reduce(numpy.broadcast_arrays(*x)),
}


def evaluated(side: Expression, columns: Mapping[Call | Reference, Array]) -> Array:
    """``side`` with a column (B,) or (1,) for each of its calls and fitted constants; not finite where it fails."""

    def value(node: Expression) -> Any:
        if isinstance(node, Number):
            return numpy.array([node.value])
        if isinstance(node, Operation):
            return _APPLY[node.op]([value(operand) for operand in node.operands])
        if isinstance(node, (Call, Reference)):
            return columns[node]
        raise TypeError(f"{node} has no column")

    with numpy.errstate(all="ignore"):
        return numpy.asarray(value(side), numpy.float64)


class Leaf(Protocol):
    """The value of one record call under weights of seeds and samples: (B,) or (1,)."""

    def at(self, weights: Weights) -> Array: ...


@dataclass(frozen=True)
class Mean:
    """``values``: (seeds, samples) outcomes of the population with that index."""

    values: Array
    population: Population
    index: int

    def at(self, weights: Weights) -> Array:
        return mean(self.values, self.population, weights.seeds, weights.items[self.index])


@dataclass(frozen=True)
class Quotient:
    """A mean over some of the samples: that of an outcome which is 0 elsewhere, over the share of those samples. Not
    a number where there are none."""

    above: Leaf
    below: Leaf

    def at(self, weights: Weights) -> Array:
        with numpy.errstate(all="ignore"):
            return numpy.divide(self.above.at(weights), self.below.at(weights))


@dataclass(frozen=True)
class Constant:
    """``values``: (seeds,) numbers that depend on no sample."""

    values: Array

    def at(self, weights: Weights) -> Array:
        averaged: Array = weights.seeds @ self.values / weights.seeds.sum(axis=1)
        return averaged


@dataclass(frozen=True)
class Drop:
    """Dense minus method, signed so that a loss is positive."""

    dense: Leaf
    method: Leaf
    sign: int

    def at(self, weights: Weights) -> Array:
        return self.sign * (self.dense.at(weights) - self.method.at(weights))


@dataclass(frozen=True)
class Knee:
    """The knee of the curve through dense (sparsity 0) and the levels. ``achieved``: (levels,) with the 0."""

    rule: str
    achieved: Array
    levels: tuple[Leaf, ...]
    sign: int
    logarithmic: bool

    def at(self, weights: Weights) -> Array:
        levels = numpy.broadcast_arrays(*(level.at(weights) for level in self.levels))
        rows: Array = self.sign * numpy.stack(levels, axis=1)
        if self.rule == "hinge" and len(rows) > 1:  # resamples: whether there is a knee was asked of all data
            knees = curves.hinge_grid(self.achieved)
            return numpy.asarray(knees[curves.hinge_errors(self.achieved, rows, knees).argmin(axis=1)])
        return numpy.array([self._knee(row) for row in rows])

    def _knee(self, row: Array) -> float:
        """Not a number where there is none."""
        if not numpy.isfinite(row).all():
            return float("nan")
        if self.rule == "tolerance":
            tolerance = curves.LOG_TOLERANCE if self.logarithmic else curves.TOLERANCE
            return curves.tolerance_knee(self.achieved, row, tolerance)
        if self.rule == "collapse":
            found = curves.collapse(self.achieved, row)
            return 1.0 if found is None else found  # beyond the last level: at most where nothing is left
        if self.rule == "chord":
            return curves.chord_knee(self.achieved, row)
        if self.rule == "breakpoint":
            return curves.breakpoint_knee(self.achieved, row).at
        hinge = curves.hinge_knee(self.achieved, row)
        return hinge.at if hinge.accepted else float("nan")
