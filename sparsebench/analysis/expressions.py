"""The small language of a claim's two sides: arithmetic over numbers that are looked up in records.

    (nll(method=magnitude) - nll(method=wanda)) / log(2)
    mean(acc(task=copy), acc(task=two_hop)) + 0.01
    fit.chinchilla.alpha

- numbers, ``+ - * /``, unary minus, parentheses, ``log(x)`` (natural), ``mean(...) min(...) max(...)``
- record calls ``score nll acc achieved drop cost.flops cost.bytes cost.ms tokens.mean tokens.correct tokens.wrong
  knee.<rule>``: each adds what it is given to the claim's ``select``
- ``fit.<law>.<parameter>``: a constant of a fitted law, written without a call

A record call takes keyword arguments only. Their values are numbers, ``true``, ``false``, ``null``, bare
words (``method=wanda``) or text in quotes, needed for anything that is no plain word
(``pattern="2:4"``, ``method="wanda+mustafar"``). A dotted key is written with two underscores, because a
keyword cannot hold a dot: ``model__outliers=true`` selects ``model.outliers: true``.

The text goes through ``ast.parse`` and a whitelist, and is never run as Python.
"""

from __future__ import annotations

import ast
import keyword
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from sparsebench.errors import UserError, closest

RECORD_CALLS = "score nll acc achieved drop".split()
COSTS = "flops bytes ms".split()
TOKENS = "mean correct wrong".split()  # tokens of an answer: of all, of right ones, of wrong ones
KNEES = "tolerance breakpoint hinge chord collapse".split()  # the rules by which a knee of a curve is found
_DOTTED = {"cost": ("a cost", COSTS), "tokens": ("a mean of tokens", TOKENS), "knee": ("a rule", KNEES)}
FUNCTIONS = "log mean min max".split()
MAX_LENGTH = 1000  # characters
MAX_DEPTH = 60  # levels of nesting; a sum of n terms has n levels

Value = str | int | float | bool | None
"""What one key of a select may be compared with."""

_ALLOWED = (
    "numbers, + - * /, parentheses, log, mean, min, max, score(...), nll(...), acc(...), achieved(...), drop(...), "
    "cost.flops|bytes|ms(...), tokens.mean|correct|wrong(...), knee.<rule>(...), fit.<law>.<parameter>"
)
_WORDS: dict[str, Value] = {"true": True, "false": False, "null": None}
_BINARY: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "neg": 3}
_ATOM = 4


class Expression(ABC):
    """One node of a parsed side, and all below it. ``str`` gives text that parses to an equal expression."""

    @abstractmethod
    def leaves(self) -> Iterator[Number | Call | Reference]:
        """Numbers, record calls and references, from left to right."""

    @abstractmethod
    def evaluate(self, lookup: Callable[[Call | Reference], float]) -> float:
        """The value, with ``lookup`` asked for every record call and reference (in the unit of its kind).

        Arithmetic is Python's own: ZeroDivisionError for a division by 0, ValueError for the log of a
        number that is not positive, OverflowError where a float cannot hold the result.
        """

    def calls(self) -> list[Call]:
        """The record calls from left to right, repeated ones too."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, Call)]

    def references(self) -> list[Reference]:
        """The references to fitted constants from left to right."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, Reference)]

    @property
    def smooth(self) -> bool:
        """Whether a small change of every record changes the value smoothly: no ``min``, ``max``, ``knee``.

        Expressions that are not smooth have no valid jackknife error; they are bootstrapped.
        """
        return not any(call.kind.startswith("knee.") for call in self.calls())


@dataclass(frozen=True)
class Number(Expression):
    """A number as written; never negative (a minus sign is an operation)."""

    value: float

    def leaves(self) -> Iterator[Number | Call | Reference]:
        yield self

    def evaluate(self, lookup: Callable[[Call | Reference], float]) -> float:
        return self.value

    def __str__(self) -> str:
        return _number(self.value)


@dataclass(frozen=True)
class Call(Expression):
    """A record call. ``kind``: its name as written, for example ``nll``, ``cost.ms`` or ``knee.hinge``;
    ``select``: its own keys, dots restored, without the claim's common ones."""

    kind: str
    select: dict[str, Value] = field(default_factory=dict, hash=False)

    def leaves(self) -> Iterator[Number | Call | Reference]:
        yield self

    def evaluate(self, lookup: Callable[[Call | Reference], float]) -> float:
        return float(lookup(self))

    def __str__(self) -> str:
        given = (f"{key.replace('.', '__')}={_written(value)}" for key, value in self.select.items())
        return f"{self.kind}({', '.join(given)})"


@dataclass(frozen=True)
class Reference(Expression):
    """A constant of a fitted law."""

    law: str
    parameter: str

    def leaves(self) -> Iterator[Number | Call | Reference]:
        yield self

    def evaluate(self, lookup: Callable[[Call | Reference], float]) -> float:
        return float(lookup(self))

    def __str__(self) -> str:
        return f"fit.{self.law}.{self.parameter}"


@dataclass(frozen=True)
class Operation(Expression):
    """``op``: one of ``+ - * /`` (two operands), ``neg`` and ``log`` (one), ``mean min max`` (one or more)."""

    op: str
    operands: tuple[Expression, ...]

    def leaves(self) -> Iterator[Number | Call | Reference]:
        for operand in self.operands:
            yield from operand.leaves()

    @property
    def smooth(self) -> bool:
        return self.op not in ("min", "max") and all(operand.smooth for operand in self.operands)

    def evaluate(self, lookup: Callable[[Call | Reference], float]) -> float:
        return _APPLY[self.op]([operand.evaluate(lookup) for operand in self.operands])

    def __str__(self) -> str:
        if self.op in FUNCTIONS:
            return f"{self.op}({', '.join(map(str, self.operands))})"
        mine = _PRECEDENCE[self.op]
        if self.op == "neg":
            return f"-{_inside(self.operands[0], mine)}"
        left, right = self.operands
        return f"{_inside(left, mine)} {self.op} {_inside(right, mine + 1)}"


_APPLY: dict[str, Callable[[list[float]], float]] = {
    "+": lambda x: x[0] + x[1],
    "-": lambda x: x[0] - x[1],
    "*": lambda x: x[0] * x[1],
    "/": lambda x: x[0] / x[1],
    "neg": lambda x: -x[0],
    "log": lambda x: math.log(x[0]),
    "mean": lambda x: sum(x) / len(x),
    "min": min,
    "max": max,
}


def _inside(operand: Expression, least: int) -> str:
    """The operand's text, in parentheses when it binds less strongly than ``least``."""
    binds = _PRECEDENCE.get(operand.op, _ATOM) if isinstance(operand, Operation) else _ATOM
    return str(operand) if binds >= least else f"({operand})"


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")


def _written(value: Value) -> str:
    """A value as it is written in a call."""
    for word, meaning in _WORDS.items():
        if value is meaning:
            return word
    if isinstance(value, str):
        plain = value.isidentifier() and not keyword.iskeyword(value) and value not in _WORDS
        return value if plain and value.isascii() else repr(value)
    return repr(value)


def parse(text: Any, where: str) -> Expression:
    """``text`` (or a plain number) as an expression.

    ``where`` begins every message: the claim and which side. UserError for all that the whitelist does
    not hold, with the position (characters from 1) and what is allowed.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        text = repr(text)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: must be an expression such as nll(method=wanda), not {text!r}; allowed: {_ALLOWED}")
    # A YAML block may hold line breaks; one space for each keeps the positions.
    text = "".join(" " if mark in "\t\r\n" else mark for mark in text).strip()
    if len(text) > MAX_LENGTH:
        raise UserError(f"{where}: {len(text)} characters long; at most {MAX_LENGTH} are allowed")
    for position, mark in enumerate(text, 1):
        # Comments would swallow what a folded line holds; escapes could smuggle any character into a text.
        if mark in "#\\" or not mark.isprintable():
            raise UserError(f"{where}: character {position}: {mark!r} has no place in an expression; {_rule()}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of spellings such as `1if x`, which are refused below anyway
            tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError) as error:
        offset = getattr(error, "offset", None) or 1
        reason = getattr(error, "msg", None) or str(error)
        hint = '; a pattern is written in quotes: pattern="2:4"' if ":" in text else ""
        raise UserError(f"{where}: character {offset} of {_short(text)}: {reason}{hint}; {_rule()}") from None
    except (MemoryError, RecursionError):
        raise UserError(f"{where}: nested too deeply; at most {MAX_DEPTH} levels are allowed") from None
    return _Reader(text, where).expression(tree.body, 1)


def _rule() -> str:
    return f"allowed: {_ALLOWED}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


class _Reader:
    """Turns Python's syntax tree into ours, refusing whatever is not listed."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where = text, where

    def refuse(self, node: ast.AST, problem: str, rule: str | None = None) -> NoReturn:
        # Python counts columns in bytes of UTF-8.
        column = len(self.text.encode()[: getattr(node, "col_offset", 0)].decode()) + 1
        raise UserError(f"{self.where}: character {column} of {_short(self.text)}: {problem}; {rule or _rule()}")

    def expression(self, node: ast.expr, depth: int) -> Expression:
        if depth > MAX_DEPTH:
            raise UserError(f"{self.where}: nested too deeply; at most {MAX_DEPTH} levels are allowed")
        if isinstance(node, ast.Constant):
            return Number(float(self.number(node)))
        if isinstance(node, ast.BinOp):
            op = _BINARY.get(type(node.op))
            if op is None:
                self.refuse(node, f"the operator {_operator(node.op)} is not allowed")
            return Operation(op, (self.expression(node.left, depth + 1), self.expression(node.right, depth + 1)))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return Operation("neg", (self.expression(node.operand, depth + 1),))
        if isinstance(node, ast.Call):
            return self.call(node, depth)
        if isinstance(node, ast.Attribute):
            return self.reference(node)
        if isinstance(node, ast.Name):
            hint = f"; did you mean {node.id}(...)?" if node.id in (*RECORD_CALLS, *FUNCTIONS) else ""
            self.refuse(node, f"the bare word {node.id!r} has no value here{hint}")
        self.refuse(node, f"{_SYNTAX.get(type(node), type(node).__name__)} is not allowed")

    def number(self, node: ast.Constant) -> int | float:
        value = node.value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(node, f"{_short(str(value))} is not a number")
        # An integer beyond 2**53 has no exact float, and records are compared as floats.
        if value > 2**53 if isinstance(value, int) else not math.isfinite(value):
            self.refuse(node, "the number is too large")
        return value

    def reference(self, node: ast.Attribute) -> Reference:
        parts = _dotted(node)
        if len(parts) == 3 and parts[0] == "fit":
            return Reference(parts[1], parts[2])
        if parts and parts[0] in _DOTTED:
            self.refuse(node, f"{'.'.join(parts)} must be called: {'.'.join(parts)}(method=...)")
        self.refuse(node, f"{'.'.join(parts) or 'an attribute of a value'} is not fit.<law>.<parameter>")

    def call(self, node: ast.Call, depth: int) -> Expression:
        parts = _dotted(node.func)
        name = ".".join(parts)
        if name in FUNCTIONS:
            return self.function(name, node, depth)
        dotted = len(parts) == 2 and parts[0] in _DOTTED
        if dotted:
            what, known = _DOTTED[parts[0]]
            if parts[1] not in known:
                self.refuse(node, f"{name} is not {what}{closest(parts[1], known)}")
        if name in RECORD_CALLS or dotted:
            return Call(name, self.select(name, node))
        if parts[:1] == ["fit"]:
            self.refuse(node, "fit.<law>.<parameter> is written without parentheses")
        if not name:
            self.refuse(node, "only a name can be called")
        self.refuse(node, f"{name}(...) is not known{closest(name, [*RECORD_CALLS, *FUNCTIONS, 'cost.ms'])}")

    def function(self, name: str, node: ast.Call, depth: int) -> Operation:
        if node.keywords:
            self.refuse(node, f"{name} takes values, not keywords", f"for example {name}(nll(method=wanda))")
        if not node.args or (name == "log" and len(node.args) != 1):
            count = "exactly one value" if name == "log" else "at least one value"
            self.refuse(node, f"{name} takes {count}, {len(node.args)} given")
        return Operation(name, tuple(self.expression(argument, depth + 1) for argument in node.args))

    def select(self, name: str, node: ast.Call) -> dict[str, Value]:
        example = f"for example {name}(method=wanda, sparsity=0.5, model__outliers=true)"
        if node.args:
            self.refuse(node.args[0], f"{name} takes key=value only", example)
        found: dict[str, Value] = {}
        for item in node.keywords:
            parts = (item.arg or "").split("__")
            if not all(parts) or not item.arg:
                what = f"the key {item.arg!r} has an empty part" if item.arg else "** is not allowed"
                self.refuse(item, what, "a dotted key is written with two underscores, " + example)
            key = ".".join(parts)
            if key in found:
                self.refuse(item, f"the key {item.arg} is given twice", example)
            found[key] = self.value(item.value, item.arg)
        return found

    def value(self, node: ast.expr, key: str) -> Value:
        rule = 'allowed: a number, true, false, null, a bare word, or text in quotes, for example pattern="2:4"'
        if isinstance(node, ast.Name):
            return _WORDS.get(node.id, node.id)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            return -self.number(node.operand)
        if isinstance(node, ast.Constant):
            if node.value is None or isinstance(node.value, bool):
                return node.value
            if isinstance(node.value, str):
                if "'" in node.value or '"' in node.value:
                    self.refuse(node, f"{key}: a text may not hold quotes", rule)
                return node.value
            if isinstance(node.value, (int, float)):
                return self.number(node)
        self.refuse(node, f"{key}: {_short(ast.get_source_segment(self.text, node) or '')} is not a value", rule)


_SYNTAX: dict[type[ast.expr], str] = {
    ast.Compare: "a comparison",
    ast.Subscript: "a subscript",
    ast.Lambda: "a lambda",
    ast.BoolOp: "and/or",
    ast.IfExp: "if/else",
    ast.UnaryOp: "this sign",
    ast.JoinedStr: "an f-string",
    ast.NamedExpr: "an assignment",
    ast.Tuple: "a comma outside a call",
    ast.Starred: "an asterisk before a value",
}


def _operator(op: ast.operator) -> str:
    names: dict[type[ast.operator], str] = {ast.Pow: "**", ast.Mod: "%", ast.FloorDiv: "//", ast.MatMult: "@"}
    return names.get(type(op), type(op).__name__)


def _dotted(node: ast.expr) -> list[str]:
    """``['a', 'b']`` of ``a.b``; empty for anything that is not a chain of names."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []
