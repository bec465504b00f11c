"""Which planned runs (or records) a select means, and how to say why none or several do.

A *point* is one run as a flat mapping, for example ``{"method": "wanda", "model": "tiny_1m",
"model.outliers": True, "task": "perplexity", "sparsity": 0.5, "seed": 0}``; a missing key means None. A
*select* is a flat mapping of the keys that must agree. The seed is never compared here: whoever asks pairs
the runs by it.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sparsebench.analysis.expressions import Value
from sparsebench.errors import closest

Point = Mapping[str, Any]

# What a dense run never has: it asks for no level, no pattern, no calibration and no method's own options.
NOT_OF_DENSE = re.compile(r"sparsity|pattern|calibration(\..*)?|method\..*")
CURVE_LEVELS = 3  # the fewest sparsities on which a knee means anything


def value_of(point: Point, key: str) -> Any:
    """The point's value; None where it has none."""
    value = point.get(key)
    if isinstance(value, list):
        return tuple(value)
    return None if isinstance(value, float) and math.isnan(value) else value  # pandas writes a gap as nan


def same(a: Any, b: Any) -> bool:
    """Equality of a selected and a planned value: numbers within 1e-9, true is not 1."""
    if isinstance(a, str) or isinstance(b, str):
        return bool(a == b)
    numeric = isinstance(a, numbers.Real) and isinstance(b, numbers.Real)
    if numeric and not isinstance(a, bool) and not isinstance(b, bool):
        return abs(float(a) - float(b)) <= 1e-9
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def order(value: Any) -> tuple[int, float, str]:
    """Sorts numbers by value before everything else by its text."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return (0, float(value), "")
    return (1, 0.0, str(value))


def matching(points: Iterable[Point], select: Mapping[str, Value]) -> list[Point]:
    """The points that have all of ``select``, whatever their seed."""
    keys = compared(select)
    return [point for point in points if all(same(value_of(point, key), value) for key, value in keys)]


def compared(select: Mapping[str, Value]) -> list[tuple[str, Value]]:
    """What of ``select`` is compared, the method first because it rules out most points."""
    dense = select.get("method") == "dense"
    keys = [item for item in select.items() if item[0] != "seed" and not (dense and NOT_OF_DENSE.fullmatch(item[0]))]
    return sorted(keys, key=lambda item: item[0] != "method")


def grouped(points: Iterable[Point], keys: list[str]) -> dict[int, list[Point]]:
    """The points in groups that agree in ``keys``; each group under the ``id`` of its first point."""
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        groups.setdefault(tuple(value_of(point, key) for key in keys), []).append(point)
    return {id(group[0]): group for group in groups.values()}


def distinct(rows: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The rows sorted, numbers before texts, each once; rows whose numbers agree within 1e-9 are one."""
    found: list[tuple[Any, ...]] = []
    for row in sorted(set(rows), key=lambda one: [order(value) for value in one]):
        if not any(all(map(same, row, other)) for other in found):
            found.append(row)
    return found


def pairing_problem(found: list[Point], pinned: Value, seeds: list[int], curve: bool) -> str:
    """What keeps the points ``found`` from being one per seed, empty when nothing does.

    ``pinned``: the only seed that is looked at, None for all of ``seeds``. ``curve``: one point per seed and
    sparsity is wanted instead, at ``CURVE_LEVELS`` or more of them.
    """
    wanted: list[Any] = [pinned] if pinned is not None or not seeds else list(seeds)
    missing: list[Any] = []
    for seed in wanted:
        chosen = [point for point in found if value_of(point, "seed") is None or same(value_of(point, "seed"), seed)]
        if not chosen:
            missing.append(seed)
            continue
        levels: dict[Any, list[Point]] = {}
        for point in chosen:
            levels.setdefault(value_of(point, "sparsity") if curve else None, []).append(point)
        several = next((points for points in levels.values() if len(points) > 1), None)
        if several:
            which = "" if seed is None else f" for seed {seed}"
            return f"{len(several)} planned runs{which}, one is needed: {differences(several)}"
        if curve and len(levels) < CURVE_LEVELS:
            return f"a knee needs runs at {CURVE_LEVELS} or more sparsities; leave sparsity out of its select"
    if not missing:
        return ""
    return "0 planned runs" + ("" if len(missing) == len(wanted) else f" for seed {', '.join(map(str, missing))}")


def differences(points: list[Point]) -> str:
    """The runs by the keys in which they differ, at most five of them."""
    keys = dict.fromkeys(key for point in points for key in point)
    differ = [key for key in keys if any(not same(value_of(point, key), value_of(points[0], key)) for point in points)]
    shown = ["(" + ", ".join(f"{key}={value_of(point, key)}" for key in differ) + ")" for point in points[:5]]
    return " ".join(shown) + (" ..." if len(points) > 5 else "") if differ else "identical points"


def nearest(points: list[dict[str, Any]], select: dict[str, Value]) -> str:
    """In which keys the closest planned run differs from what was selected."""
    if not points:
        return " (the plan is empty)"
    keys = compared(select)
    points = points[:5000]  # a hint is not worth a search through a plan of 100,000 runs
    known = {key for point in points for key in point}
    for key, value in keys:
        if key not in known and value is not None:
            return f" (no planned run has the key {key!r}{closest(key, known)})"
    amiss = min(([key for key, v in keys if not same(value_of(point, key), v)] for point in points), key=len)
    point = next(p for p in points if [key for key, v in keys if not same(value_of(p, key), v)] == amiss)
    return f" (the nearest run has {', '.join(f'{key}={value_of(point, key)}' for key in amiss)})" if amiss else ""
