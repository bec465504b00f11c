"""A paper's sentences as checkable inequalities over records: their schema, and what they select.

A claim compares two expressions (``expressions.py``). Its ``select`` is common to every record call in
them; the call's own keys win. ``for_each`` makes one component per combination of values that the sweep
planned for the named keys. A *point* is one planned run as a flat dict (``selection.py``).

Nothing here decides whether a claim holds, and nothing reads YAML (``claim_list.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsebench.analysis.expressions import Call, Expression, Reference, Value
from sparsebench.analysis.selection import (
    NOT_OF_DENSE,
    Point,
    compared,
    distinct,
    grouped,
    matching,
    nearest,
    pairing_problem,
    value_of,
)


@dataclass(frozen=True)
class Claim:
    """One claim, valid by construction through ``claim_list.load_claims``.

    ``margin`` is in units of the expression or, if ``margin_relative``, a fraction of the right side (5%
    is 0.05). ``at_least`` is the k of the quantifier of that name, else None. ``right`` is None for
    monotone relations, whose axis is the one key of ``for_each``. ``published`` is shown, never tested.
    ``fit`` maps the variables of ``fit.<law>.<parameter>`` (``fitted.py``).
    """

    id: str
    paper: str
    place: str
    sentence: str
    left: Expression
    relation: str
    right: Expression | None
    tiny_scale: str
    select: dict[str, Value] = field(default_factory=dict, hash=False)
    margin: float = 0.0
    margin_relative: bool = False
    for_each: tuple[str, ...] = ()
    quantifier: str = "all"
    at_least: int | None = None
    unit: str = "samples+seeds"
    min_samples: int = 30
    min_seeds: int = 1
    kind: str = "main"
    published: dict[str, Value] = field(default_factory=dict, hash=False)
    fit: dict[str, Value] = field(default_factory=dict, hash=False)

    @property
    def monotone(self) -> bool:
        return self.relation.startswith("monotone_")

    @property
    def record_calls(self) -> list[Call]:
        """The distinct record calls of both sides, in order of appearance."""
        return list(dict.fromkeys([*self.left.calls(), *(self.right.calls() if self.right else [])]))

    @property
    def references(self) -> list[Reference]:
        """The distinct fitted constants of both sides."""
        return list(dict.fromkeys(one for side in (self.left, self.right) if side for one in side.references()))

    def select_of(self, call: Call, values: Mapping[str, Value] | None = None) -> dict[str, Value]:
        """All keys that ``call`` selects by: the claim's, then ``values`` of for_each, then its own."""
        return {**self.select, **(values or {}), **call.select}

    def calls(self, values: Mapping[str, Value] | None = None) -> list[dict[str, Value]]:
        """``select_of`` every record call of both sides, under one combination of for_each values."""
        return [self.select_of(call, values) for call in self.record_calls]

    def leaves_open(self, call: Call) -> bool:
        """Whether the call selects by every for_each key, so that its runs say which values there are."""
        dense = self.select_of(call).get("method") == "dense"
        return not any(key in call.select or (dense and NOT_OF_DENSE.fullmatch(key)) for key in self.for_each)

    def components(self, points: Iterable[Point]) -> list[dict[str, Value]]:
        """The combinations of for_each values among ``points`` that any record call can select, sorted.

        ``[{}]`` without for_each. Only calls that leave every for_each key open name combinations, and
        only runs that have all these keys: a key that is None makes no component. Neither does the method
        ``dense``, which is what others are compared with.
        """
        if not self.for_each:
            return [{}]
        known = list(points)
        found: dict[tuple[Any, ...], None] = {}
        for call in self.record_calls:
            if self.leaves_open(call):
                chosen = matching(known, self.select_of(call))
                found |= dict.fromkeys(tuple(value_of(point, key) for key in self.for_each) for point in chosen)
        combinations = [dict(zip(self.for_each, values, strict=True)) for values in distinct(found)]
        return [one for one in combinations if None not in one.values() and one.get("method") != "dense"]


def check_selects(claim: Claim, points: list[dict[str, Any]], seeds: Iterable[int]) -> list[str]:
    """What is wrong with the runs a claim selects from a plan; empty when nothing is.

    ``points``: one flat dict per planned run; a point whose seed is None (nothing random in it) pairs with
    every one of ``seeds``. In every component each record call must select exactly one point per seed; a
    ``knee`` one per seed and sparsity, over at least three levels. ``drop`` and ``knee`` also need the dense
    run beside them. A call that names a seed itself is checked for that seed only. A dense run is found
    whatever sparsity, pattern, calibration and method options are selected.
    """
    components = claim.components(points)
    if not components:
        asked = next(claim.select_of(call) for call in claim.record_calls if claim.leaves_open(call))
        hint = nearest(points, asked)
        return [f"{claim.id}: for_each={list(claim.for_each)}: no planned run gives it a value{hint}"]
    problems, seeds = _shape_problems(claim, components), list(seeds)
    for call in claim.record_calls:
        curve = call.kind.startswith("knee.")
        for twin in (False, True) if curve or call.kind == "drop" else (False,):
            own: dict[str, Value] = {"method": "dense"} if twin else {}
            # The plan is read once per call; the components then look only at what tells them apart.
            subset = matching(points, {**claim.select_of(call), **own})
            groups = grouped(subset, [key for key in claim.for_each if key not in call.select and key not in own])
            firsts = [group[0] for group in groups.values()]
            seen = set()
            for values in components:
                select = {**claim.select_of(call, values), **own}
                if (key := tuple(compared(select))) in seen:
                    continue  # a dense run serves many components and is reported once
                seen.add(key)
                found = [point for one in matching(firsts, select) for point in groups[id(one)]]
                problem = pairing_problem(found, select.get("seed"), seeds, curve and not twin)
                if problem:
                    at = "".join(f" at {name}={value}" for name, value in values.items())
                    what = f"{call}{at}{', its dense run' if twin else ''}"
                    problems.append(f"{claim.id}: {what}: {problem}{'' if found else nearest(points, select)}")
    return problems


def _shape_problems(claim: Claim, components: list[dict[str, Value]]) -> list[str]:
    """What is wrong with the number and the kind of the components."""
    if claim.at_least is not None and claim.at_least > len(components):
        return [f"{claim.id}: quantifier at_least {claim.at_least}: only {len(components)} components are planned"]
    if claim.monotone:
        key = claim.for_each[0]
        axis = [component[key] for component in components]
        if len(axis) < 2 or any(isinstance(x, (str, bool)) for x in axis):
            shown = ", ".join(map(str, axis))
            return [f"{claim.id}: {claim.relation} needs at least two numbers along {key}, found {shown}"]
    return []
