"""The claim language: what it computes, how it prints, and that nothing but UserError leaves it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebench.analysis.expressions import (
    KNEES,
    MAX_DEPTH,
    MAX_LENGTH,
    TOKENS,
    Call,
    Expression,
    Number,
    Operation,
    Reference,
    parse,
)
from sparsebench.errors import UserError

WHERE = "claims[0] (wanda.x): left"


def test_record_calls_and_their_values() -> None:
    call = parse(
        'nll(method="wanda+mustafar", sparsity=.5, pattern="2:4", model__outliers=true, seed=-1, a__b__c=null, '
        "task=copy, on=False)",
        WHERE,
    )
    assert call == Call(
        "nll",
        {
            "method": "wanda+mustafar",
            "sparsity": 0.5,
            "pattern": "2:4",
            "model.outliers": True,
            "seed": -1,
            "a.b.c": None,
            "task": "copy",
            "on": False,
        },
    )


def test_quoted_words_stay_texts() -> None:
    call = parse("score(a='true', b=\"0.5\", c=true)", WHERE)
    assert isinstance(call, Call)
    assert call.select == {"a": "true", "b": "0.5", "c": True}
    assert parse(str(call), WHERE) == call


def test_all_kinds() -> None:
    kinds = ["score", "nll", "acc", "achieved", "drop", "cost.flops", "cost.bytes", "cost.ms"]
    kinds += [*(f"tokens.{mean}" for mean in TOKENS), *(f"knee.{rule}" for rule in KNEES)]
    text = " + ".join(f"{kind}(method=m)" for kind in kinds) + " + fit.chinchilla.alpha"
    found = parse(text, WHERE)
    assert [call.kind for call in found.calls()] == kinds
    assert found.references() == [Reference("chinchilla", "alpha")]
    assert str(found) == text


def test_arithmetic_follows_python_precedence() -> None:
    values = {"a": 3.0, "b": 5.0}
    text = "-nll(method=a) * 2 - log(nll(method=b)) / (1 - mean(1, nll(method=a), 0.5)) + min(1, 2) - max(1, 2, 7)"
    found = parse(text, WHERE)
    expected = -3.0 * 2 - math.log(5.0) / (1 - (1 + 3.0 + 0.5) / 3) + 1 - 7
    assert found.evaluate(lambda leaf: values[leaf.select["method"]]) == pytest.approx(expected, rel=1e-15)  # type: ignore[union-attr,index]
    assert not found.smooth


def test_fitted_constants_are_looked_up() -> None:
    found = parse("fit.chinchilla.alpha / fit.chinchilla.beta", WHERE)
    values = {"alpha": 0.3, "beta": 0.6}
    assert found.evaluate(lambda leaf: values[leaf.parameter]) == 0.5  # type: ignore[union-attr]


def test_smoothness() -> None:
    assert parse("log(nll(method=a)) / mean(1, 2)", WHERE).smooth
    assert not parse("1 + max(nll(method=a), 0)", WHERE).smooth
    assert not parse("knee.hinge(method=a) - 0.1", WHERE).smooth


@pytest.mark.parametrize("text", ["1 / 0", "1 / (score(method=a) - 2)"])
def test_division_by_zero_is_python_s(text: str) -> None:
    with pytest.raises(ZeroDivisionError):
        parse(text, WHERE).evaluate(lambda leaf: 2.0)


@pytest.mark.parametrize("given", [0, 0.5, -3, 1e-12])
def test_a_plain_number(given: float) -> None:
    assert parse(given, WHERE).evaluate(lambda leaf: math.nan) == given


def test_line_breaks_of_a_yaml_block() -> None:
    assert parse("nll(method=a)\n  - nll(method=b)\n", WHERE) == parse("nll(method=a) - nll(method=b)", WHERE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 ** 3", "character 1 of '2 ** 3': the operator ** is not allowed"),
        ("1 + 7 % 2", "character 5 of '1 + 7 % 2': the operator % is not allowed"),
        ("1 < 2", "a comparison is not allowed"),
        ("score(method=a)[0]", "a subscript is not allowed"),
        ("(lambda: 1)()", "only a name can be called"),
        ("lambda: 1", "a lambda is not allowed"),
        ("1 if 2 else 3", "if/else is not allowed"),
        ("1 and 2", "and/or is not allowed"),
        ("+1", "this sign is not allowed"),
        ("not 1", "this sign is not allowed"),
        ("1, 2", "a comma outside a call is not allowed"),
        ("mean(*x)", "an asterisk before a value is not allowed"),
        ("[1]", "List is not allowed"),
        ("wanda", "the bare word 'wanda' has no value here"),
        ("nll", "did you mean nll(...)?"),
        ("'text'", "'text' is not a number"),
        ("true", "the bare word 'true'"),
        ("True", "'True' is not a number"),
        ("1j", "is not a number"),
        ("...", "is not a number"),
        ("f'{1}'", "an f-string is not allowed"),
        ("1e999", "the number is too large"),
        ("9" * 400, "the number is too large"),
        ("__import__('os')", "__import__(...) is not known"),
        ("nlll(method=a)", "did you mean 'nll'?"),
        ("().__class__", "an attribute of a value is not fit.<law>.<parameter>"),
        ("fit.chinchilla", "fit.chinchilla is not fit.<law>.<parameter>"),
        ("fit.chinchilla.alpha.real", "is not fit.<law>.<parameter>"),
        ("fit.chinchilla.alpha()", "is written without parentheses"),
        ("score.real", "score.real is not fit.<law>.<parameter>"),
        ("cost.ms", "cost.ms must be called"),
        ("cost.flop(method=a)", "cost.flop is not a cost; did you mean 'flops'?"),
        ("knee.hing(method=a)", "knee.hing is not a rule; did you mean 'hinge'?"),
        ("cost.ms.real()", "cost.ms.real(...) is not known"),
        ("nll(wanda)", "nll takes key=value only; for example nll(method=wanda"),
        ("nll(**a)", "** is not allowed"),
        ("nll(__a=1)", "has an empty part"),
        ("nll(a__=1)", "has an empty part"),
        ("nll(a=1, a=2)", "character 10 of 'nll(a=1, a=2)': the key a is given twice"),
        ("nll(a=1+2)", "a: '1+2' is not a value"),
        ("nll(a=[1])", "a: '[1]' is not a value"),
        ("nll(method=wanda+mustafar)", "text in quotes"),
        ("nll(pattern=2:4)", 'a pattern is written in quotes: pattern="2:4"'),
        ("nll(a=1e999)", "too large"),
        ("nll(a=-True)", "is not a number"),
        ("nll(a=b'x')", "is not a value"),
        ('nll(a="it\'s")', "may not hold quotes"),
        ("log(1, 2)", "log takes exactly one value, 2 given"),
        ("log()", "log takes exactly one value, 0 given"),
        ("mean()", "mean takes at least one value"),
        ("max(1, key=2)", "max takes values, not keywords"),
        ("1 +", "allowed: numbers"),
        ("1 # 2", "'#' has no place"),
        (r"nll(a='\x41')", "has no place"),
        ("1\0", "has no place"),
        ("", "must be an expression"),
        ("  \n", "must be an expression"),
        ("1" + " + 1" * MAX_LENGTH, "characters long; at most 1000"),
        ("1" + " + 1" * (MAX_DEPTH + 1), "nested too deeply"),
        ("-" * 500 + "1", "nested too deeply"),
        ("(" * 400 + "1" + ")" * 400, "allowed"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, WHERE)
    shown = str(caught.value)
    assert shown.startswith(f"{WHERE}: ")
    assert message in shown
    assert "allowed" in shown or "for example" in shown
    assert "\n" not in shown


@pytest.mark.parametrize("given", [None, True, [], {}, b"1", math.inf, math.nan])
def test_other_types_are_refused(given: Any) -> None:
    with pytest.raises(UserError, match="left"):
        parse(given, WHERE)


def test_positions_count_characters_not_bytes() -> None:
    with pytest.raises(UserError, match=r"character 14 of"):
        parse("nll(a='é') - 2**3", WHERE)


_words = st.sampled_from(["wanda", "dense", "kjv", "true", "null", "2:4", "a+b", "naïve", "class", "None", "", "a  b"])
_scalars = st.one_of(
    _words,
    st.booleans(),
    st.none(),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
)
_calls = st.builds(
    Call,
    st.sampled_from(["nll", "acc", "cost.ms", "knee.hinge"]),
    st.dictionaries(st.sampled_from(["method", "model.outliers", "task.a.b", "x_1"]), _scalars, max_size=3),
)
_leaves = st.one_of(
    st.floats(0, 1e6).map(Number), _calls, st.sampled_from([Reference("power", "alpha"), Reference("power", "E")])
)


def _grow(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    two = st.builds(lambda op, a, b: Operation(op, (a, b)), st.sampled_from("+-*/"), inner, inner)
    one = st.builds(lambda op, a: Operation(op, (a,)), st.sampled_from(["neg", "log"]), inner)
    many = st.lists(inner, min_size=1, max_size=3).map(tuple)
    return st.one_of(two, one, st.builds(Operation, st.sampled_from(["mean", "min", "max"]), many))


@settings(deadline=None)
@given(st.recursive(_leaves, _grow, max_leaves=8))
def test_text_round_trips(expression: Expression) -> None:
    text = str(expression)
    if len(text) <= MAX_LENGTH:
        assert parse(text, WHERE) == expression
        assert str(parse(text, WHERE)) == text


_numbers = st.one_of(st.integers(0, 1000).map(str), st.floats(0, 1e3).map(repr))


def _texts(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("{} {} {}".format, inner, st.sampled_from("+-*/"), inner),
        st.builds("({})".format, inner),
        st.builds("-{}".format, inner),
        st.builds("log({})".format, inner),
        st.builds("{}({}, {})".format, st.sampled_from(["mean", "min", "max"]), inner, inner),
    )


@settings(deadline=None)
@given(st.recursive(st.one_of(_numbers, st.just("nll(method=a)")), _texts, max_leaves=10))
def test_evaluates_like_python(text: str) -> None:
    names = {"log": math.log, "mean": lambda *x: sum(x) / len(x), "min": min, "max": max, "nll": lambda method: 2.5}

    def outcome(compute: Any) -> Any:
        try:
            return float(compute())
        except (ArithmeticError, ValueError) as error:
            return type(error)

    expected = outcome(lambda: eval(text, {"__builtins__": {}}, {**names, "a": "a"}))
    found = outcome(lambda: parse(text, WHERE).evaluate(lambda leaf: 2.5))
    # Whole numbers are floats here, so only the last digits of large products may differ.
    assert found == expected or found == pytest.approx(expected, rel=1e-12, nan_ok=True)


_pieces = st.lists(
    st.sampled_from(
        "nll score ( ) [ ] { } , = == : := . ... ** * / // + - ~ @ lambda x if else for in not and await yield "
        "1 0x 1e9 1_0 'a' \" ' f' b' fit cost knee __ \n \\ # é ﬁt 0777 1if ; import print(1)".split(" ")
    ),
    max_size=20,
).map("".join)


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(max_size=60), _pieces))
def test_garbage_raises_only_user_errors(text: str) -> None:
    try:
        found = parse(text, WHERE)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert parse(str(found), WHERE) == found
