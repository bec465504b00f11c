"""A paper's sentences as checkable inequalities over records: their schema, and what they select.

A claim compares two expressions (``expressions.py``). Its ``select`` is common to every record call in
them; the call's own keys win. ``for_each`` makes one component per combination of values that the sweep
planned for the named keys. A *point* is one planned run as a flat dict (``selection.py``).

Nothing here decides whether a claim holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsebench.analysis import fitted
from sparsebench.analysis.expressions import Call, Expression, Reference, Value, parse
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
from sparsebench.errors import UserError, closest

RELATIONS = "> < >= <= ~ monotone_up monotone_down".split()
QUANTIFIERS = "all any mean at_least".split()
UNITS = "samples seeds samples+seeds none".split()
TINY_SCALE = "yes no unsure".split()
CLAIM_KINDS = "main secondary sanity".split()

_REQUIRED = "id paper place sentence left relation tags".split()
_KEYS = [*_REQUIRED, *"select right margin for_each quantifier unit min kind published fit".split()]
_ID = re.compile(r"[a-z0-9_]+\.[a-z0-9_]+")
_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_PERCENT = re.compile(r"(\d+(?:\.\d*)?)\s*%")


@dataclass(frozen=True)
class Claim:
    """One claim, valid by construction through ``load_claims``.

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
            if _leaves_open(self, call):
                chosen = matching(known, self.select_of(call))
                found |= dict.fromkeys(tuple(value_of(point, key) for key in self.for_each) for point in chosen)
        combinations = [dict(zip(self.for_each, values, strict=True)) for values in distinct(found)]
        return [one for one in combinations if None not in one.values() and one.get("method") != "dense"]


def _leaves_open(claim: Claim, call: Call) -> bool:
    """Whether the call selects by every for_each key, so that its runs say which values there are."""
    dense = claim.select_of(call).get("method") == "dense"
    return not any(key in call.select or (dense and NOT_OF_DENSE.fullmatch(key)) for key in claim.for_each)


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
        asked = next(claim.select_of(call) for call in claim.record_calls if _leaves_open(claim, call))
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


def load_claims(items: Any, where: str) -> list[Claim]:
    """The claims of a YAML list (None is an empty one).

    ``where`` names the list in messages, for example ``sweeps/wanda.yaml: claims``. UserError with one line
    for every mistake in any of them: unknown or missing keys, wrong types or words, expressions that do not
    parse, ids that are not ``<paper>.<what>`` or not unique.
    """
    if items is None:
        return []
    if not isinstance(items, (list, tuple)):
        raise UserError(f"{where}: must be a list of claims, not {items!r}")
    errors: list[str] = []
    claims: list[Claim] = []
    first: dict[str, int] = {}
    for index, item in enumerate(items):
        at = f"{where}[{index}]"
        if not isinstance(item, Mapping):
            errors.append(f"{at}: a claim must be a mapping of keys to values, not {item!r}")
            continue
        loader = _Loader(item, at)
        claim = loader.claim()
        if isinstance(item.get("id"), str) and first.setdefault(item["id"], index) != index:
            loader.wrong("id", item["id"], f"{where}[{first[item['id']]}] has the same id")
        errors += loader.errors
        claims += [claim] if claim else []
    if errors:
        raise UserError("\n".join(errors))
    return claims


class _Loader:
    """Reads one claim and collects what is wrong with it."""

    def __init__(self, item: Mapping[Any, Any], at: str) -> None:
        self.item, self.errors = item, list[str]()
        self.where = f"{at} ({item['id']})" if isinstance(item.get("id"), str) else at

    def wrong(self, key: str, value: Any, problem: str) -> None:
        shown = "" if value is _MISSING else f"={value if isinstance(value, str) and value else repr(value)}"
        self.errors.append(" ".join(f"{self.where}: {key}{shown}: {problem}".split()))

    def claim(self) -> Claim | None:
        """The claim, or None when anything is wrong with it."""
        for key in self.item:
            if key not in _KEYS:
                self.wrong(str(key), _MISSING, f"unknown key{closest(str(key), _KEYS)}")
        relation = self.relation()
        monotone = relation.startswith("monotone_")
        for key in [*_REQUIRED, *([] if monotone else ["right"])]:
            if key not in self.item:
                self.wrong(key, _MISSING, "missing")
        margin, relative = self.margin()
        quantifier, at_least = self.quantifier()
        at_minimum = self.minimum()
        read: dict[str, Any] = {
            **{key: self.text(key) for key in ("id", "paper", "place", "sentence")},
            "left": self.side("left"),
            "relation": relation,
            "right": self.side("right"),
            "tiny_scale": self.tiny_scale(),
            "select": self.values("select"),
            "for_each": self.for_each(),
            "unit": self.word("unit", "samples+seeds", UNITS),
            "kind": self.word("kind", "main", CLAIM_KINDS),
            "published": self.values("published"),
            "fit": self.values("fit"),
        }
        self.identifier(read["id"], read["paper"])
        if self.errors:
            return None
        claim = Claim(
            **read,
            margin=margin,
            margin_relative=relative,
            quantifier=quantifier,
            at_least=at_least,
            min_samples=at_minimum["samples"],
            min_seeds=at_minimum["seeds"],
        )
        self.consistency(claim)
        return None if self.errors else claim

    def text(self, key: str) -> str:
        value = self.item.get(key, _MISSING)
        if value is not _MISSING and (not isinstance(value, str) or not value.strip()):
            self.wrong(key, value, "must be a text" + (" (put it in quotes)" if value not in (None, "") else ""))
        return " ".join(value.split()) if isinstance(value, str) else ""

    def identifier(self, name: str, paper: str) -> None:
        if name and (not _ID.fullmatch(name) or (paper and not name.startswith(f"{paper}."))):
            self.wrong("id", name, f"must be {paper or '<paper>'}.<what> in small letters, digits and underscores")

    def word(self, key: str, default: str, words: list[str]) -> str:
        value = self.item.get(key, default)
        if not isinstance(value, str) or value not in words:
            self.wrong(key, value, f"not a choice{closest(str(value), words)}")
            return default
        return value

    def relation(self) -> str:
        value = self.item.get("relation", _MISSING)
        if value is None or value == "" or (isinstance(value, str) and value.strip()[:1] in tuple("<>~")):
            if value in RELATIONS:
                return str(value)
            self.wrong("relation", value, 'put it in quotes, as in relation: ">" (YAML reads bare > and ~ otherwise)')
        elif value is not _MISSING and value not in RELATIONS:
            self.wrong("relation", value, f"not a choice{closest(str(value), RELATIONS)}")
        return value if isinstance(value, str) else ""

    def side(self, key: str) -> Expression | None:
        if key not in self.item:
            return None
        try:
            return parse(self.item[key], f"{self.where}: {key}")
        except UserError as error:
            self.errors.append(str(error))
            return None

    def margin(self) -> tuple[float, bool]:
        value = self.item.get("margin", 0.0)
        percent = _PERCENT.fullmatch(value.strip()) if isinstance(value, str) else None
        if percent:
            return float(percent[1]) / 100, True
        if not _is_number(value) or not value >= 0:
            self.wrong("margin", value, 'must be a number >= 0 in units of the expression, or "5%" of the right side')
            return 0.0, False
        return float(value), False

    def quantifier(self) -> tuple[str, int | None]:
        value = self.item.get("quantifier", "all")
        if isinstance(value, Mapping) and list(value) == ["at_least"] and _is_count(value["at_least"]):
            return "at_least", int(value["at_least"])
        if value not in ("all", "any", "mean"):
            self.wrong("quantifier", value, "must be all, any, mean or {at_least: k} with a whole number k >= 1")
            return "all", None
        return str(value), None

    def minimum(self) -> dict[str, int]:
        value = self.item.get("min", {})
        found = {"samples": 30, "seeds": 1}
        if not isinstance(value, Mapping):
            self.wrong("min", value, "must be such as {samples: 30, seeds: 1}")
            return found
        for key, count in value.items():
            if key not in found:
                self.wrong(f"min.{key}", _MISSING, f"unknown key{closest(str(key), found)}")
            elif not _is_count(count):
                self.wrong(f"min.{key}", count, "must be a whole number >= 1")
            else:
                found[key] = int(count)
        return found

    def tiny_scale(self) -> str:
        tags = self.item.get("tags", _MISSING)
        if tags is _MISSING:
            return ""
        if not isinstance(tags, Mapping) or "tiny_scale" not in tags:
            self.wrong("tags", tags, 'must be such as {tiny_scale: "yes"}')
            return ""
        for key in tags:
            if key != "tiny_scale":
                self.wrong(f"tags.{key}", _MISSING, f"unknown key{closest(str(key), ['tiny_scale'])}")
        value = tags["tiny_scale"]
        if isinstance(value, bool):
            meant = "yes" if value else "no"
            self.wrong("tags.tiny_scale", value, f'YAML reads a bare {meant} as a boolean: quote it, "{meant}"')
        elif value not in TINY_SCALE:
            self.wrong("tags.tiny_scale", value, f"not a choice{closest(str(value), TINY_SCALE)}")
        return str(value)

    def for_each(self) -> tuple[str, ...]:
        value = self.item.get("for_each", [])
        if not isinstance(value, (list, tuple)) or any(not isinstance(x, str) or not _KEY.fullmatch(x) for x in value):
            self.wrong("for_each", value, "must be a list of keys, for example [sparsity]")
            return ()
        if len(set(value)) < len(value) or "seed" in value:
            self.wrong("for_each", value, "every key once, and never seed: a test runs over the seeds")
        return tuple(value)

    def values(self, key: str) -> dict[str, Value]:
        value = self.item.get(key) or {}
        if not isinstance(value, Mapping):
            self.wrong(key, value, "must be a mapping, for example {model: tiny_1m, model.outliers: true}")
            return {}
        for name, one in value.items():
            if not isinstance(name, str) or not _KEY.fullmatch(name):
                self.wrong(f"{key}.{name}", _MISSING, "a key is a word, or words joined by dots")
            elif isinstance(one, Mapping):
                self.wrong(f"{key}.{name}", one, f"write nested keys with dots, for example {name}.outliers: true")
            elif not (one is None or isinstance(one, (str, bool)) or _is_number(one)):
                self.wrong(f"{key}.{name}", one, "must be one text, number, true, false or null")
        return dict(value)

    def consistency(self, claim: Claim) -> None:
        """What only several keys together can get wrong."""
        calls = claim.record_calls
        if not calls and not claim.references:
            self.wrong("left", str(claim.left), "neither side looks at a record")
        for problem in fitted.problems(claim.references, claim.fit):
            self.wrong("fit", claim.fit or _MISSING, problem)
        for key in claim.for_each:
            if key in claim.select:
                self.wrong("for_each", list(claim.for_each), f"{key} is fixed in select")
        if claim.for_each and not any(_leaves_open(claim, call) for call in calls):
            self.wrong("for_each", list(claim.for_each), "no record call leaves all of these keys open")
        if not claim.for_each and claim.quantifier != "all":
            self.wrong("quantifier", claim.quantifier, "needs for_each")
        if claim.monotone:
            if claim.right is not None:
                self.wrong("right", str(claim.right), f"{claim.relation} takes only left")
            if len(claim.for_each) != 1:
                self.wrong("for_each", list(claim.for_each), f"{claim.relation} needs one key: its axis")
            if claim.margin or claim.quantifier != "all":
                self.wrong("relation", claim.relation, "takes neither a margin nor a quantifier")
        elif claim.relation == "~" and not claim.margin and claim.unit != "none":
            self.wrong("margin", claim.margin, "~ needs a margin > 0, unless unit is none")


_MISSING = object()


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= 2**53 if isinstance(value, int) else math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
