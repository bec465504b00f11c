"""What a scaling law declares: variables, parameters, its curve, the space of its residuals, where to start.

The estimator (``estimate``) does the rest for every law alike. A law in ten lines::

    LINE = Law(
        name="line",
        formula="y = E + c/x",
        variables={"x": "anything positive"},
        parameters={"E": Parameter(), "c": Parameter()},
        link="log",
        curve=lambda p, x: np.log(p["E"] + p["c"] / x["x"]),
        starts=grid(E=(0.1, 1.0), c=(0.1, 1.0)),
    )
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Values = Mapping[str, float]  # parameter -> value
Columns = Mapping[str, NDArray[Any]]  # variable -> (rows,) float64; a category's are str

LOSSES = ("huber", "ols", "lad", "binomial")


@dataclass(frozen=True)
class Parameter:
    """A parameter's range. ``positive``: searched as its logarithm (what "search space" means below).
    ``exponent``: withheld from tables when the data do not determine it."""

    low: float = 0.0
    high: float = math.inf
    positive: bool = True
    exponent: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.positive and self.low < 0):
            raise ValueError(f"a parameter cannot lie in ({self.low}, {self.high}) with positive={self.positive}")

    def to_search(self, value: float) -> float:
        if not self.positive:
            return value
        return math.log(value) if value > 0 else -math.inf

    def from_search(self, value: float) -> float:
        # Kept far from where a float64 over- or underflows, also once the variables' scale is multiplied in.
        return math.exp(min(max(value, -500.0), 500.0)) if self.positive else value


@dataclass(frozen=True)
class Link:
    """The space in which residuals are taken: ``to`` it, ``back`` from it."""

    to: Callable[[Array], Array]
    back: Callable[[Array], Array]


def _expit(z: Array) -> Array:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * z)))


LINKS: dict[str, Link] = {
    "log": Link(np.log, np.exp),
    "logit": Link(lambda y: np.log(y) - np.log1p(-y), _expit),
    "identity": Link(lambda y: y, lambda z: z),
}

Curve = Callable[[Values, Columns], Array]
Slopes = Callable[[Values, Columns], dict[str, Array]]
Starts = Callable[[Columns, Array], Iterable[dict[str, float]]]


@dataclass(frozen=True)
class Law:
    """One law. ``curve(p, x)``: the prediction of every row, IN THE SPACE OF ``link`` (log, logit, identity).

    ``slopes(p, x)``: its derivative by every parameter in search space, by the logarithm where the parameter is
    positive; None: differences. ``starts(x, y)``: points of a coarse grid, in reported constants. ``rescale(p, c)``:
    the constants of the same curve when variable v is multiplied by exp(c[v]); with it the fit centres the log
    variables, without which log A and alpha are almost collinear. ``floor``: the parameter that the curve tends to.
    ``categories``: variables that hold names; ``cluster``: the variables whose equal rows share samples, resampled
    together. ``bind``: the law for the data at hand, where its parameters depend on them. ``values``: what the
    fitted quantity can be. ``aliases``: other names for a variable.
    """

    name: str
    formula: str
    variables: Mapping[str, str]
    parameters: Mapping[str, Parameter]
    link: str
    curve: Curve
    starts: Starts
    slopes: Slopes | None = None
    rescale: Callable[[Values, Values], dict[str, float]] | None = None
    floor: str | None = None
    loss: str = "huber"
    categories: tuple[str, ...] = ()
    cluster: tuple[str, ...] = ()
    values: tuple[float, float] = (0.0, math.inf)
    aliases: Mapping[str, str] = field(default_factory=dict)
    bind: Callable[[Law, Columns], Law] | None = None

    def __post_init__(self) -> None:
        if self.link not in LINKS or self.loss not in LOSSES:
            raise ValueError(f"law {self.name}: link={self.link}, loss={self.loss}; valid: {[*LINKS]}, {LOSSES}")

    @property
    def numeric(self) -> list[str]:
        """The variables that hold numbers, all of them positive."""
        return [name for name in self.variables if name not in self.categories]

    def moved(self, parameters: Values, logs: Values) -> dict[str, float]:
        """``rescale`` where the law has one, else the parameters as they are."""
        return self.rescale(parameters, logs) if self.rescale else dict(parameters)


def grid(**values: Sequence[float]) -> Starts:
    """Starts at every combination of the values."""
    points = [dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())]
    return lambda x, y: points


def centre(x: Columns, names: Iterable[str]) -> dict[str, float]:
    """The mean logarithm of each variable."""
    return {name: float(np.mean(np.log(x[name]))) for name in names}
