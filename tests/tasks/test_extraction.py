"""How answers are read from generated texts: the rules of the four sets and their traps."""

from __future__ import annotations

import pytest

from sparsebench.tasks.reasoning import extraction


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("so 12 </think> The answer is 7.", " The answer is 7."),
        ("no closing tag at all", "no closing tag at all"),
        ("a </think> b </think> c", " c"),
        ("it was cut </think>", ""),
    ],
)
def test_only_what_follows_the_thought_is_read(text: str, said: str) -> None:
    assert extraction.final(text) == said


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("first \\boxed{3}, then 12 and \\boxed{025}. See page 7.", 25),
        ("</think> \\boxed{\\text{ 1,024 }}", 1024),
        ("\\boxed{\\frac{a}{b}} is no number, 41 is", 41),
        ("\\boxed{12", 12),
        ("we have 204 minutes.", 204),
        ("10-3 = 7", 7),
        ("x = -3", -3),
        ("1,2,3", 3),
        ("about 7.5, at most 7.25", None),
        ("exactly 7.0", 7),
        ("room B12 and 3rd place", None),
        ("33 in the thought </think> nothing after it", None),
        ("", None),
    ],
)
def test_integers(text: str, number: int | None) -> None:
    assert extraction.integer(text) == number
    assert extraction.score_integer(text, ["25"])["correct"] == float(number == 25)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("It is not false, so True.", "true"),
        ("true or false? </think> **Uncertain**", "uncertain"),
        ("untrue", None),
        ("it must be true", "true"),
    ],
)
def test_verdicts(text: str, said: str | None) -> None:
    assert extraction.verdict(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Not (A) but (C). A note on D", "C"),
        ("( B )", "B"),
        ("\\boxed{\\text{B}} and A", "B"),
        ("\\boxed{(D)}", "D"),
        ("The answer is C.", "C"),
        ("Anna's ABC", None),
        ("(A) in the thought </think> so D", "D"),
        ("(E)", None),
    ],
)
def test_letters(text: str, said: str | None) -> None:
    assert extraction.letter(text) == said


@pytest.mark.parametrize(
    ("text", "exact", "f1", "contains"),
    [
        ("</think> The answer is the Danube.", 1, 1, 1),
        ("**Final Answer:** \\boxed{Danube}", 1, 1, 1),
        ("**Answer**: Danube river", 0, 2 / 3, 1),
        ("It must have been the Danube, I think.", 0, 2 / 8, 1),
        ("I cannot answer this.", 0, 0, 0),
        ("Danubes", 0, 0, 0),
        ("Donau", 1, 1, 1),
        ("the Danube </think>", 0, 0, 0),
    ],
)
def test_short_answers(text: str, exact: float, f1: float, contains: float) -> None:
    found = extraction.score_text(text, ["Danube", "Donau"])
    assert found == {"correct": exact, "f1": pytest.approx(f1), "contains": contains}


def test_f1_counts_repeated_words() -> None:
    assert extraction.normalised(" The  Danube, a river!") == "danube river"
    assert extraction.token_f1("new new york", "new york") == pytest.approx(0.8)
    assert extraction.token_f1("the", "a") == 1
