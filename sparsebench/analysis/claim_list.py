"""Claims as a sweep's YAML states them: every key checked, every mistake told in one line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from sparsebench.analysis import fitted
from sparsebench.analysis.claims import Claim
from sparsebench.analysis.expressions import Expression, Value, parse
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
        if claim.for_each and not any(claim.leaves_open(call) for call in calls):
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
