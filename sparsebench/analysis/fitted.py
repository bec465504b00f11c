"""``fit.<law>.<parameter>`` in a claim: the constant of a law that is fitted to the runs which the claim selects.

The claim's ``fit`` says which column each of the law's variables is, and what is fitted (``value``)::

    select: {method: dense, task: perplexity}
    left: fit.power.alpha
    relation: ">"
    right: 0.1
    fit: {x: parameters, value: nll}

A column is a key of the plan, a column of the record, ``parameters`` (of the dense model) or ``compression`` (1 / (1 -
achieved)). The error of a constant is that of its runs' samples and seeds: the law is fitted again to every
replicate, from where the fit to all data ended. How far the law itself is from the data is not in it; the verb
``fit`` says that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy

from sparsebench.analysis.expressions import Reference
from sparsebench.analysis.leaves import Leaf
from sparsebench.analysis.outcomes import Row, Untested
from sparsebench.analysis.selection import Point, value_of
from sparsebench.analysis.statistics import Array, Weights
from sparsebench.errors import UserError

if TYPE_CHECKING:
    from sparsebench.analysis.laws.base import Law
    from sparsebench.analysis.laws.estimate import Fit

VALUES = ("nll", "acc", "score", "achieved")
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
_EVALUATIONS = 40  # of a replicate, which begins near its optimum


def problems(references: Sequence[Reference], fit: Mapping[str, Any]) -> list[str]:
    """What is wrong with a claim's ``fit`` for its constants, in words; empty when nothing is."""
    if fit and not references:
        return ["neither side names fit.<law>.<parameter>"]
    return [problem for one in references if (problem := _problem(one, fit))]


def _problem(reference: Reference, fit: Mapping[str, Any]) -> str | None:
    from sparsebench.analysis.laws import registry

    try:
        law = registry.get(reference.law)
    except UserError as error:
        return str(error)
    if law.bind is None and reference.parameter not in law.parameters:
        return f"{reference}: the law's parameters are {', '.join(law.parameters)}"
    if fit.get("value") not in VALUES:
        return f"value={fit.get('value')}: must be one of {', '.join(VALUES)}"
    wanted, given = set(law.variables), set(fit) - {"value"}
    if wanted != given or not all(isinstance(one, str) for one in fit.values()):
        return f"{reference}: names a column for each of {', '.join(law.variables)}, and value"
    return None


def cell(column: str, point: Point, record: Row) -> Any:
    """What a run has in that column. Untested when it has nothing there."""
    if column == "parameters":
        size = BYTES.get(str(record.get("dtype")))
        found = record["bytes_weights_dense"] / size if size and record.get("bytes_weights_dense") else None
    elif column == "compression":
        achieved = record.get("achieved")
        found = None if achieved is None or achieved >= 1 else 1 / (1 - achieved)
    else:
        found = record.get(column) if value_of(point, column) is None else value_of(point, column)
    if found is None:
        raise Untested(f"fit: a run of {value_of(point, 'method')} on {value_of(point, 'model')} has no {column}")
    return found


@dataclass
class Fitted:
    """The constant under weights of seeds and samples. ``columns``: variable -> (rows,); ``rows``: the value of
    each run that is fitted."""

    reference: Reference
    law: Law
    columns: Mapping[str, Sequence[Any]]
    rows: Sequence[Leaf]
    _whole: list[Fit] = field(default_factory=list)  # the fit to all data, once it is made

    def at(self, weights: Weights) -> Array:
        """(B,); not a number where the fit has none."""
        values = numpy.stack(numpy.broadcast_arrays(*(row.at(weights) for row in self.rows)), axis=1)
        if not self._whole:
            self._whole.append(self._fit(values.mean(axis=0)))
        fit = self._whole[0]
        if self.reference.parameter not in fit.params:
            raise Untested(f"{self.reference}: the fit has {', '.join(fit.params)}")
        return numpy.array([self._again(fit, row) for row in values])

    def _again(self, fit: Fit, values: Array) -> float:
        """The constant of a replicate, from the optimum of all data."""
        problem = fit.problem.observing(values)
        found = problem.minimise(fit.theta, _EVALUATIONS)
        return float("nan") if found is None else problem.reported(found.theta)[self.reference.parameter]

    def _fit(self, values: Array) -> Fit:
        from pandas import DataFrame

        from sparsebench.analysis.laws.estimate import fit

        try:
            return fit(DataFrame({**self.columns, "value": values}), self.law)
        except UserError as error:
            raise Untested(f"{self.reference}: {error}") from None


def fitted(reference: Reference, columns: Mapping[str, Sequence[Any]], rows: Sequence[Leaf]) -> Fitted:
    """The leaf of a constant. Untested when the law cannot be fitted to so few or such rows."""
    from sparsebench.analysis.laws import registry

    law = registry.get(reference.law)
    if len(rows) < len(law.parameters) + 2:
        raise Untested(f"{reference}: {len(rows)} runs for a law of {len(law.parameters)} parameters")
    for name in law.numeric:
        if len(set(columns[name])) == 1:
            only = f"{columns[name][0]:g}"
            raise Untested(f"{reference}: the runs have one {name} only ({only}), which determines no constant")
    return Fitted(reference, law, columns, rows)
