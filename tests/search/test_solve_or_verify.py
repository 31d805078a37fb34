"""Budgets are split as an exhaustive search over what was measured splits them."""

import itertools

import numpy as np
import pytest

from forktree import InvalidInput
from forktree.search.solve_or_verify import solve_verify_split


@pytest.mark.proves(127)
@pytest.mark.parametrize("cost", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("budget", [1, 4, 17, 64, 1000])
def test_the_split_is_the_best_one_within_the_budget(budget: float, cost: float) -> None:
    """On synthetic curves: votes rise early and flatten, verification pays with many samples."""
    sizes, votes = [1, 2, 4, 8, 16, 32, 64], [0, 1, 2, 4, 8, 16, 32]
    accuracy = {
        (s, v): 0.3 + 0.08 * np.log2(min(s, 16)) + (0.05 * np.log2(1 + v) * np.log2(s) / 3 if v else 0)
        for s, v in itertools.product(sizes, votes)
    }
    s, v = solve_verify_split(accuracy, budget, cost)
    within = {(a, b): x for (a, b), x in accuracy.items() if a * (1 + cost * b) <= budget}
    assert s * (1 + cost * v) <= budget and accuracy[s, v] == max(within.values())
    ties = [a * (1 + cost * b) for (a, b), x in within.items() if x == accuracy[s, v]]
    assert s * (1 + cost * v) == min(ties)
    if budget == 1:
        assert (s, v) == (1, 0), "nothing but a solution"


def test_what_cannot_be_split_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"within the budget of 3, the cheapest costs 4"):
        solve_verify_split({(4, 0): 0.5, (8, 2): 0.9}, 3, 1.0)
    with pytest.raises(InvalidInput, match="budget must be more than 0"):
        solve_verify_split({(1, 0): 0.5}, 0, 1.0)
