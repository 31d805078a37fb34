"""Answers: how they are read, when they are the same, and what a function of the user's own may do."""

import importlib.util
import math
import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forktree import InvalidInput
from forktree.search.answers import (
    NO_ANSWER,
    Answers,
    answer_function,
    boxed,
    equality,
    last_number,
    normal_form,
    regex,
)
from forktree.search.math_equality import MathEquality, shared_math_equality

TEX = st.text(alphabet="0123456789 .,$-+{}()\\abcefrtx", max_size=24)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (" 12 ", "12"),
        ("$0012.0$", "12"),
        ("1,234.50", "1234.5"),
        ("1,23", "1,23"),
        (".5", "0.5"),
        ("-0.0", "0"),
        ("+7", "7"),
        ("−3", "-3"),
        ("5.", "5"),
        (r"\left( 2, 3 \right)", "(2,3)"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\leftarrow", r"\leftarrow"),
        (r"\text{ New   York }.", "New York"),
        (r"\(x + 1\)", "x+1"),
        ("", ""),
    ],
)
def test_normal_form(text: str, form: str) -> None:
    assert normal_form(text) == form


@settings(deadline=None, max_examples=60)
@given(TEX)
def test_a_normal_form_is_its_own(text: str) -> None:
    assert normal_form(normal_form(text)) == normal_form(text)


@settings(deadline=None, max_examples=60)
@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.booleans())
def test_a_number_has_one_form_however_it_is_written(value: Any, grouped: bool) -> None:
    found = normal_form(f"{value:,f}" if grouped else f"{value:f}")
    assert float(found) == float(value)
    assert found == normal_form(f"${value:f}000$")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12} and then \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1,2\}"),
        (r"\boxed{7} \boxed{8", "7"),
        (r"\boxed {x_{n}}", "x_{n}"),
        ("no box: 7", None),
        (r"\boxed{", None),
        (r"\boxed{}", ""),
    ],
)
def test_boxed(text: str, answer: str | None) -> None:
    assert boxed(text) == answer


@settings(deadline=None, max_examples=60)
@given(st.recursive(st.text(alphabet="ab1 ", max_size=4), lambda inner: inner.map(lambda t: f"{{{t}}}x"), max_leaves=6))
def test_a_box_holds_what_its_braces_enclose(inside: str) -> None:
    assert boxed(rf"1 \boxed{{z}} 2 \boxed{{{inside}}} 3 }}") == normal_form(inside)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12 + 3 = 15.", "15"),
        ("it costs $1,234.50 in all", "1234.5"),
        ("from 5-3", "3"),
        ("x = -3", "-3"),
        ("(−4)", "-4"),
        ("either 1,2,345", "2345"),
        ("a1b", "1"),
        (".25", "0.25"),
        ("none", None),
    ],
)
def test_last_number(text: str, answer: str | None) -> None:
    assert last_number(text) == answer


@settings(deadline=None, max_examples=60)
@given(st.integers(-(10**9), 10**9), st.text(alphabet="ab =\n", min_size=1, max_size=9))
def test_an_integer_at_the_end_is_the_last_number(value: int, before: str) -> None:
    assert last_number(f"7 {before}={value}") == str(value)


def test_regex_reads_the_first_group_of_the_last_match() -> None:
    assert regex(r"answer:\s*(\w+)")("answer: a answer: b!") == "b"
    assert regex(r"\d+")("1 22 3x") == "3"
    assert regex(r"(a)|b")("a b") is None, "the group is not part of the last match"
    assert regex("c")("ab") is None


def test_settings_that_mean_no_answer_are_named() -> None:
    assert answer_function("boxed") is boxed and answer_function("last-number") is last_number
    assert answer_function("regex:=(.)")("a=b") == "b"
    assert answer_function(len) is len
    for bad, part in [("box", "boxed, last-number or regex:PATTERN, got 'box'"), (3, "got 3"), ("regex:(", r"regex")]:
        with pytest.raises(InvalidInput, match="answer must be") as error:
            answer_function(bad)
        assert part in str(error.value)
    assert equality("exact") is None and equality(max) is max
    with pytest.raises(InvalidInput, match="equal must be a function of two answers, exact or math, got 'maths'"):
        equality("maths")


# ---------------------------------------------------------------- groups


def test_groups_are_numbered_as_their_answers_first_occur() -> None:
    found = Answers.read(["b", "", "a", "b", "c"], lambda text: text or None)
    assert found.values == ["b", "a", "c"] and found.group.tolist() == [0, NO_ANSWER, 1, 0, 2]
    assert found.errors == [None] * 5 and not found.failed.any() and found.said == ["'b'", None, "'a'", "'b'", "'c'"]


def test_what_cannot_be_counted_costs_its_text_only() -> None:
    values = {"a": [1], "b": math.nan, "c": np.float64("nan"), "d": np.zeros(2), "e": 1, "f": True, "g": "1"}

    def answer(text: str) -> Any:
        if text == "raises":
            raise LookupError("no")
        if text == "exits":
            raise SystemExit(3)
        return values[text]

    texts = [*values, "raises", "exits"]
    found = Answers.read(texts, answer)
    assert found.failed.tolist() == [True, True, True, True, False, False, False, True, True]
    assert found.values == [1, "1"] and found.group[4:7].tolist() == [0, 0, 1]
    assert (found.group[found.failed] == NO_ANSWER).all()
    reasons = ["TypeError", "ValueError: nan is not equal", "ValueError", "TypeError", "LookupError", "SystemExit: 3"]
    for i, part in zip(np.flatnonzero(found.failed), reasons, strict=True):
        assert f"raised {part}" in str(found.errors[i]) and f"(branch {i})" in str(found.errors[i])
        assert "answer test_what" in str(found.errors[i])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 9), max_size=10), st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=8))
def test_groups_are_the_connected_components_of_equal(values: list[int], pairs: set[tuple[int, int]]) -> None:
    """Against a flood over the graph; asked in whatever order the texts come in."""
    found = Answers.read([str(v) for v in values], int, lambda a, b: (a, b) in pairs or (b, a) in pairs)
    for v in values:
        component, new = {v}, {v}
        while new:
            new = {w for w in values for c in component if (c, w) in pairs or (w, c) in pairs} - component
            component |= new
        same = {w for w, g in zip(values, found.group, strict=True) if g == found.group[values.index(v)]}
        assert same == component
    firsts = [values[found.group.tolist().index(g)] for g in range(len(found.values))]
    assert found.values == firsts, "a group is named by the first of its answers"


def test_a_comparison_that_raises_says_that_two_differ_and_warns_once() -> None:
    def equal(a: str, b: str) -> bool:
        if "c" in (a, b):
            raise ValueError("no c")
        return a.lower() == b.lower()

    with pytest.warns(UserWarning, match="equal .*equal raised ValueError: no c") as caught:
        found = Answers.read(["a", "c", "A", "d"], str, equal)
    assert len(caught) == 1 and found.group.tolist() == [0, 1, 0, 2]


# ---------------------------------------------------------------- mathematics


needs_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")


def test_math_verify_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    shared_math_equality.cache_clear()
    with pytest.raises(InvalidInput, match=r"equal='math' needs math-verify: pip install 'forktree\[math\]'"):
        equality("math")


@needs_math_verify
@pytest.mark.slow
def test_expressions_are_the_same_in_any_form_from_any_thread() -> None:
    same = MathEquality(time_limit=20.0)
    for a, b in [("1/2", "0.5"), (r"\frac{1}{2}", "0.5"), ("x+1", "1+x"), (r"\sqrt{8}", r"2\sqrt{2}"), ("50", "50")]:
        assert same(a, b) and same(b, a), (a, b)
    for a, b in [("1", "2"), ("x", "y"), (r"\frac{", "{{"), ("", "0"), (3, 4)]:
        assert not same(a, b), (a, b)
    assert same(3, 3)
    found = []
    thread = threading.Thread(target=lambda: found.append(same("2+2", "4")))  # where signals cannot be had
    thread.start()
    thread.join(60)
    assert found == [True]
    grouped = Answers.read(["0.5", "1/2", "2", r"\frac{4}{2}"], str, same)
    assert grouped.group.tolist() == [0, 0, 1, 1] and grouped.values == ["0.5", "2"]


@needs_math_verify
@pytest.mark.slow
def test_an_expression_that_never_ends_is_different_after_its_time_limit() -> None:
    """In C, where neither a signal nor a thread could end it. The next comparison is made by a new process."""
    same = MathEquality(time_limit=2.0)
    assert same("1+1", "2"), "the process has begun"
    process, begin = same._process, time.monotonic()
    assert not same("9^{9^{9^{9}}}", "9^{9^{9^{9}}}+1")
    assert time.monotonic() - begin < 6
    assert same("1+1", "2")
    assert (same._process is process) == (process.poll() is None)
    process = same._process
    del same
    assert process.wait(5) is not None, "nobody asks any more: the process is gone"


@needs_math_verify
@pytest.mark.slow
def test_a_process_that_died_is_begun_anew() -> None:
    same = MathEquality(time_limit=20.0)
    assert same("1+1", "2")
    same._process.kill()
    same._process.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same("1+1", "2")
