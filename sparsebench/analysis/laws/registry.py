"""Which laws there are: the built-in ones, and those of other packages (entry points of the group
``sparsebench.laws``, each naming a ``Law`` object)."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from sparsebench.analysis.laws.base import Law
from sparsebench.analysis.laws.chinchilla import CHINCHILLA, CHINCHILLA_AVG
from sparsebench.analysis.laws.frontier import FRONTIER
from sparsebench.analysis.laws.power import POWER
from sparsebench.analysis.laws.sparsing import DECREASING, INCREASING
from sparsebench.errors import UserError, closest

GROUP = "sparsebench.laws"
BUILT_IN = {law.name: law for law in (CHINCHILLA, CHINCHILLA_AVG, POWER, INCREASING, DECREASING, FRONTIER)}


def names() -> list[str]:
    """The laws that ``get`` knows, the built-in ones first."""
    return list(dict.fromkeys([*BUILT_IN, *sorted(_foreign())]))


def get(name: str) -> Law:
    """The law of that name; of two with one name the built-in one. UserError for an unknown name and for an entry
    point that cannot be loaded or is no law."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    points = _foreign()
    if name not in points:
        raise UserError(f"law={name}: unknown law{closest(name, names())}")
    try:
        law = points[name].load()
    except Exception as error:  # whatever a stranger's module raises when it is imported
        raise UserError(f"law={name}: {points[name].value} cannot be loaded: {_one_line(error)}") from None
    if not isinstance(law, Law):
        raise UserError(f"law={name}: {points[name].value} is a {type(law).__name__}, not a Law")
    return law


def _foreign() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
