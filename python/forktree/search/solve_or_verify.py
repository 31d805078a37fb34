"""How a budget is split between solutions and their verification, by what was measured on a validation set."""

from collections.abc import Mapping

from forktree.checks import number
from forktree.errors import InvalidInput


def solve_verify_split(
    accuracy: Mapping[tuple[int, int], float], budget: float, verification_cost: float
) -> tuple[int, int]:
    """The best number of solutions S, and of verifications V of each, within a budget.

    Singhi et al. 2025, "When To Solve, When To Verify": S solutions with V verifications each cost S (1 + λ V), in
    solutions. V = 0 is a vote among the solutions (`MajorityVote`); otherwise the best one by the mean of its verdicts
    wins (`BestOfN` with `CritiqueVotes`). They find that votes win at small budgets.

    Args:
        accuracy: the share of validation problems solved, by (S, V).
        budget: B, in solutions' lengths.
        verification_cost: λ, the length of a verification over that of a solution.

    Returns:
        The affordable (S, V) of the highest accuracy; of equal ones the cheapest.

    Raises:
        InvalidInput: nothing that was measured is affordable.
    """
    number("budget", budget, "more than 0", lambda b: b > 0)
    number("verification_cost", verification_cost, "not negative", lambda c: c >= 0)
    costs = {(s, v): s * (1 + verification_cost * v) for s, v in accuracy}
    affordable = [split for split, cost in costs.items() if cost <= budget]
    if not affordable:
        least = min(costs.values(), default=None)
        raise InvalidInput(f"accuracy must have a split within the budget of {budget}, the cheapest costs {least}")
    return max(affordable, key=lambda split: (accuracy[split], -costs[split]))
