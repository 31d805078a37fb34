"""Answers: how they are read from texts, when two are the same, and which texts agree."""

import re
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np

from forktree.checks import shown
from forktree.errors import InvalidInput, RewardError
from forktree.search.math_equality import shared_math_equality
from forktree.types import BoolArray, Int64Array

NO_ANSWER = -1

Answer = Callable[[str], Hashable]
Equal = Callable[[Any, Any], bool]

# ---------------------------------------------------------------- reading

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_LAST_NUMBER = re.compile(rf"(?:(?<![\w)\]}}.])[-−])?(?:{_NUMBER})")
_WHOLE_NUMBER = re.compile(rf"([-+−]?)({_NUMBER}|\d+\.)")
_NOISE = (
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[,;:! ]|^\$+|\$+$|^\\\(|\\\)$|\.$"), ""),
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"^\s+|\s+$|(?<=[^\w\s])\s+|\s+(?=[^\w\s])"), ""),
    (re.compile(r"\s+"), " "),
)


def normal_form(text: str) -> str:
    r"""An answer without what does not change it: spaces, dollar signs, LaTeX's sizes, ways to write a number.

    `\left( 2, 3 \right)` becomes `(2,3)`, `$1,234.50$` becomes `1234.5`, `\dfrac12` becomes `\frac12`.
    """
    while True:
        found = text
        for pattern, instead in _NOISE:
            found = pattern.sub(instead, found)
        number = _WHOLE_NUMBER.fullmatch(found)
        if number:
            found = _number(number[1], number[2])
        if found == text:
            return found
        text = found


def _number(sign: str, digits: str) -> str:
    whole, _, rest = digits.replace(",", "").partition(".")
    rest = rest.rstrip("0")
    found = (whole.lstrip("0") or "0") + (f".{rest}" if rest else "")
    return found if sign in ("", "+") or found == "0" else f"-{found}"


def boxed(text: str) -> str | None:
    r"""What the last complete `\boxed{...}` holds, in `normal_form`; None if there is none."""
    for begin in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[begin:], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return normal_form(text[begin : begin + brace.start()])
    return None


def last_number(text: str) -> str | None:
    """The last number of a text, such as 1,234.5 or -3, in `normal_form`; None if there is none."""
    found = _LAST_NUMBER.findall(text)
    return normal_form(found[-1]) if found else None


def regex(pattern: str) -> Answer:
    """A function that reads the first group of the last match of `pattern` (all if it has no group), in `normal_form`.

    Raises:
        InvalidInput: `pattern` is no regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise InvalidInput(f"answer must be regex: and a regular expression, got {shown(pattern)}: {error}") from None

    def answer(text: str) -> str | None:
        matches = list(compiled.finditer(text))
        found = matches[-1][min(1, compiled.groups)] if matches else None
        return None if found is None else normal_form(found)

    return answer


ANSWERS: dict[str, Answer] = {"boxed": boxed, "last-number": last_number}
"""Ways to read an answer by name; `regex:PATTERN` is another."""


def answer_function(answer: "str | Answer") -> Answer:
    """The function that a setting `answer` means.

    Raises:
        InvalidInput: it is neither a function, nor one of `ANSWERS`, nor `regex:` and a regular expression.
    """
    if isinstance(answer, str):
        if answer.startswith("regex:"):
            return regex(answer.removeprefix("regex:"))
        if answer in ANSWERS:
            return ANSWERS[answer]
    elif callable(answer):
        return answer
    expected = f"a function of the text, {', '.join(ANSWERS)} or regex:PATTERN"
    raise InvalidInput(f"answer must be {expected}, got {shown(answer)}")


# ---------------------------------------------------------------- equality

EQUALITIES = ("exact", "math")
"""When two answers are the same, by name: if they are equal in Python, or if math-verify says so."""


def equality(equal: "str | Equal") -> "Equal | None":
    """The function that a setting `equal` means; None if answers are compared as they are.

    Raises:
        InvalidInput: it is neither a function nor one of `EQUALITIES`, or math-verify is not installed.
    """
    if isinstance(equal, str):
        if equal == "math":
            return shared_math_equality()
        if equal == "exact":
            return None
    elif callable(equal):
        return equal
    raise InvalidInput(f"equal must be a function of two answers, {' or '.join(EQUALITIES)}, got {shown(equal)}")


def _merged(values: Sequence[Hashable], equal: Equal) -> list[int]:
    """Of each distinct value the first that is equal to it, directly or by others (union-find). `[G]`.

    A comparison that raises says that the two differ; the first such is warned of.
    """
    first, failed = list(range(len(values))), False
    for j in range(len(values)):
        for i in range(j):
            if first[i] == first[j]:
                continue
            try:
                same = bool(equal(values[i], values[j]))
            except Exception as error:  # the function is the user's own
                if not failed:
                    name, what = getattr(equal, "__qualname__", type(equal).__name__), type(error).__name__
                    warnings.warn(f"equal {name} raised {what}: {error}; such answers count as different", stacklevel=3)
                same, failed = False, True
            if same:
                low, high = sorted((first[i], first[j]))
                first = [low if f == high else f for f in first]
    return first


# ---------------------------------------------------------------- groups


@dataclass(frozen=True)
class Answers:
    """Which texts give the same answer.

    Args:
        values: the distinct answers, in the order in which they first occur. `[G]`.
        group: of each text the place of its answer in `values`, `NO_ANSWER` if it has none. int64 `[n]`.
        errors: of each text why its answer could not be read, None if it could. `[n]`.
    """

    values: list[Hashable]
    group: Int64Array
    errors: list[RewardError | None]

    @property
    def failed(self) -> BoolArray:
        """Of each text whether its answer could not be read. `[n]`."""
        return np.array([error is not None for error in self.errors], bool)

    @property
    def said(self) -> list[str | None]:
        """Of each text its answer as it can be shown, None if it has none. `[n]`."""
        return [None if group == NO_ANSWER else shown(self.values[group]) for group in self.group]

    @classmethod
    def read(cls, texts: Sequence[str], answer: Answer, equal: Equal | None = None) -> "Answers":
        """Reads the answer of every text.

        Args:
            texts: the texts, `[n]`.
            answer: text -> its answer, anything hashable, or None if there is none. If it raises, or returns something
                that cannot be counted, such as a list or NaN, that text alone has an error.
            equal: whether two answers that differ in Python are the same all the same. What is the same by way of a
                third is the same. If it raises, the two are not.
        """
        places: dict[Hashable, int] = {}
        group, errors = np.full(len(texts), NO_ANSWER, np.int64), [None] * len(texts)
        found = cls([], group, list(errors))
        for i, text in enumerate(texts):
            try:
                value = answer(text)
                if value is not None:
                    hash(value)
                    if isinstance(value, Number) and value != value:
                        raise ValueError(f"{shown(value)} is not equal to itself")
                    group[i] = places.setdefault(value, len(places))
            except (Exception, SystemExit) as error:  # the function is the user's own, and so is what it returns
                name = getattr(answer, "__qualname__", type(answer).__name__)
                found.errors[i] = RewardError(f"answer {name} raised {type(error).__name__}: {error} (branch {i})")
        found.values.extend(places)
        return found if equal is None else found._merged(equal)

    def _merged(self, equal: Equal) -> "Answers":
        """The same with fewer groups: those that `equal` joins."""
        first = _merged(self.values, equal)
        kept = sorted(set(first))
        place = np.array([*(kept.index(f) for f in first), NO_ANSWER])  # NO_ANSWER is the last
        return Answers([self.values[k] for k in kept], place[self.group], self.errors)
