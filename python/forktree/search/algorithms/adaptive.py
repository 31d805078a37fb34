"""Self-consistency that stops sampling once its answer is settled."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from forktree.checks import integer, number
from forktree.search.algorithms.vote import MajorityVote, texts_of
from forktree.search.answers import NO_ANSWER, Answers, answer_function, equality
from forktree.search.base import Hypothesis
from forktree.search.context import SearchContext
from forktree.search.registry import register
from forktree.search.steps import Walkers, check_any, complete
from forktree.search.validation import check_choice
from forktree.search.votes import is_mode, stays_ahead, vote
from forktree.types import Int64Array


def agreement(groups: Int64Array, newest: Int64Array) -> float:
    """The share of all samples that give the most frequent answer."""
    return float(vote(groups).max())


def window(groups: Int64Array, newest: Int64Array) -> float:
    """The share of the newest samples that give the most frequent answer among them (Li et al. 2024)."""
    return float(vote(newest).max())


def beta(groups: Int64Array, newest: Int64Array) -> float:
    """The probability that the first of the two most frequent answers is the more likely one (Aggarwal et al. 2023)."""
    return stays_ahead(np.bincount(groups[groups != NO_ANSWER]))


def dirichlet(groups: Int64Array, newest: Int64Array) -> float:
    """The probability that the most frequent answer is the most likely one of those seen (Aggarwal et al. 2023)."""
    return is_mode(np.bincount(groups[groups != NO_ANSWER]))


STOPPING: dict[str, Callable[[Int64Array, Int64Array], float]] = {
    "beta": beta,
    "dirichlet": dirichlet,
    "agreement": agreement,
    "window": window,
}
"""How settled an answer is, in [0, 1]: from the answers of all samples `[n]`, and of the newest round's `[m]`."""


@register("adaptive-vote")
@dataclass(frozen=True, kw_only=True)
class AdaptiveVote(MajorityVote):
    """Adaptive self-consistency: samples come in rounds, until the most frequent answer is settled.

    Its samples are the first of those that `MajorityVote` takes at the same seed. Published forms, as settings:

    - Aggarwal et al. 2023, "Let's Sample Step by Step": as it stands, a sample at a time up to 40, `stopping` "beta" or
      "dirichlet", threshold 0.95.
    - doubling, as its_hub has it: `stopping` "agreement", `round_size` 2, `doubling`, threshold 0.75.
    - Li et al. 2024, "Escape Sky-high Cost": `stopping` "window", `round_size` 5 (of w), threshold 1.

    A larger `round_size` than 1 samples side by side what may turn out not to be needed.

    Args:
        num_samples: maximum number of samples.
        stopping: what is compared with the threshold after a round: the probability that the leader is more likely than
            the runner-up ("beta") or than all others ("dirichlet"), its share of all samples ("agreement"), or the
            largest share of an answer in the newest round ("window").
        threshold: at least so much ends the search.
        round_size: number of samples of a round.
        doubling: whether each round after the first has as many samples as all before it.
    """

    num_samples: int = 40
    stopping: str = "beta"
    threshold: float = 0.95
    round_size: int = 1
    doubling: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("stopping", self.stopping, STOPPING)
        number("threshold", self.threshold, "more than 0, at most 1", lambda t: 0 < t <= 1)
        integer("round_size", self.round_size, 1)

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """The samples that were taken, those of the most frequent answer first; the score is the share of votes."""
        # a text is read once, however many rounds there are
        answer, equal = cache(answer_function(self.answer)), equality(self.equal)
        equal = None if equal is None else cache(equal)
        samples = Walkers.start(context, 0)
        while True:
            count = max(len(samples), self.round_size) if self.doubling else self.round_size
            newest = Walkers.start(context, min(count, self.num_samples - len(samples)))
            await complete(newest, context, self)
            samples = Walkers.concatenated([samples, newest])
            answers = Answers.read(texts_of(samples, context), answer, equal)
            settled = STOPPING[self.stopping](answers.group, answers.group[-len(newest) :])
            if settled >= self.threshold or len(samples) == self.num_samples or context.budget.tokens_left == 0:
                break
        samples.errors = list(answers.errors)
        check_any(samples.errors, np.where(answers.failed, np.nan, 0.0))
        return self.returned(samples, answers, vote(answers.group), context, settled=settled)
