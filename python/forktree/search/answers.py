"""Answers that are read from texts, and votes among them."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from forktree.errors import RewardError
from forktree.types import Float64Array, Int64Array

NO_ANSWER = -1


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

    @classmethod
    def read(cls, texts: Sequence[str], answer: Callable[[str], Hashable]) -> "Answers":
        """Reads the answer of every text.

        Args:
            texts: the texts, `[n]`.
            answer: text -> its answer, anything hashable, or None if there is none. If it raises, or returns something
                that cannot be counted, that text alone has an error.
        """
        places: dict[Hashable, int] = {}
        group, errors = np.full(len(texts), NO_ANSWER, np.int64), [None] * len(texts)
        found = cls([], group, list(errors))
        for i, text in enumerate(texts):
            try:
                value = answer(text)
                group[i] = NO_ANSWER if value is None else places.setdefault(value, len(places))
            except Exception as error:  # the function is the user's own, and so is what it returns
                name = getattr(answer, "__qualname__", type(answer).__name__)
                found.errors[i] = RewardError(f"answer {name} raised {type(error).__name__}: {error} (branch {i})")
        found.values.extend(places)
        return found


def vote(answers: Answers) -> Float64Array:
    """The share of all texts that agree with each one; 0 where there is no answer, NaN where reading it failed. `[n]`.

    With every answer counted once this is self-consistency (Wang et al. 2022).
    """
    counts = np.bincount(answers.group[answers.group >= 0], minlength=1)
    share = np.where(answers.group >= 0, counts[answers.group], 0) / max(1, len(answers.group))
    return np.where([error is None for error in answers.errors], share, np.nan)
