"""Votes among samples by the answers that they give: plain, weighted by rewards, and best-of-n among or over votes."""

from abc import abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from forktree.checks import integer, number
from forktree.errors import InvalidInput
from forktree.search.algorithms.sample import RewardedSearch, SelectingSearch
from forktree.search.answers import Answers, answer_function, equality
from forktree.search.base import Hypothesis
from forktree.search.context import SearchContext
from forktree.search.registry import register
from forktree.search.selection import unit_interval
from forktree.search.steps import Walkers, check_any, judged
from forktree.search.votes import best_of_majority, frequent, majority_of_the_bests, ranked, vote, worth_of_answers
from forktree.types import Float64Array


@dataclass(frozen=True, kw_only=True)
class VotingSearch(SelectingSearch):
    r"""Samples whose answers are compared. Needs a Decoder with a tokenizer.

    Args:
        answer: how an answer is read: "boxed" (LaTeX's \boxed{...}), "last-number", "regex:PATTERN" (its first group),
            or a function of the text of a response that gives anything hashable, None if there is no answer. Responses
            without one win only if all are such. If it raises, or returns what cannot be counted, such as a list or
            NaN, its response has no vote and comes last.
        equal: when two answers are the same: "exact", "math" (by math-verify, with a limit of a second for each
            comparison; needs `pip install 'forktree[math]'`), or a function of two answers.
    """

    answer: str | Callable[[str], Hashable]
    equal: str | Callable[[Any, Any], bool] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        answer_function(self.answer)
        equality(self.equal)

    def read(self, samples: Walkers, context: SearchContext) -> Answers:
        """The answers of samples; those that could not be read have an error afterwards."""
        answers = Answers.read(texts_of(samples, context), answer_function(self.answer), equality(self.equal))
        samples.errors = list(answers.errors)
        check_any(answers.errors, np.where(answers.failed, np.nan, 0.0))
        return answers

    def returned(
        self, samples: Walkers, answers: Answers, shares: Float64Array, context: SearchContext, **facts: Any
    ) -> list[Hypothesis]:
        """Samples by the shares of their answers, which become their scores; by rewards within an answer.

        Args:
            samples: with their errors and rewards.
            answers: theirs.
            shares: of each sample that of its answer, `[n]`.
            context: that of the search.
            facts: what the shares were made from, for the trace.
        """
        rewards = samples.rewards
        shares = np.where(answers.failed, np.nan, shares)
        shown = dict(answers=answers.said, shares=shares, errors=samples.errors)
        context.trace.record("vote", nodes=samples.node, **shown, **facts)
        weights = np.where(answers.failed, np.nan, facts.get("weights", np.ones(len(samples))))
        order = ranked(answers.group, shares, weights=weights, worth=rewards)
        return samples.hypotheses(order, context, scores=shares)


@register("majority-vote")
@dataclass(frozen=True, kw_only=True)
class MajorityVote(VotingSearch):
    """Self-consistency (Wang et al. 2022): independent samples, the most frequent answer wins.

    Of answers that are equally frequent the one that comes first wins.
    """

    async def select(self, samples: Walkers, context: SearchContext) -> list[Hypothesis]:
        """Samples of the most frequent answer first; the score is the share of votes, NaN where `answer` failed."""
        answers = self.read(samples, context)
        return self.returned(samples, answers, vote(answers.group), context)


@dataclass(frozen=True, kw_only=True)
class RewardedVote(VotingSearch, RewardedSearch):
    """Samples that have answers and rewards: a subclass says which of them are rewarded, and what follows."""

    async def select(self, samples: Walkers, context: SearchContext) -> list[Hypothesis]:
        """Samples of the best answer first."""
        return await self.choose(samples, self.read(samples, context), context)

    @abstractmethod
    async def choose(self, samples: Walkers, answers: Answers, context: SearchContext) -> list[Hypothesis]:
        """Rewards samples whose answers are known, and ranks them."""


@register("weighted-vote")
@dataclass(frozen=True, kw_only=True)
class WeightedVote(RewardedVote):
    """Weighted self-consistency (Li et al. 2023, weighted best-of-n): the answer with the largest sum of rewards wins.

    Rewards must lie in [0, 1]: a sum of negative ones would punish an answer for being frequent. A sample whose reward
    failed has no weight.
    """

    async def choose(self, samples: Walkers, answers: Answers, context: SearchContext) -> list[Hypothesis]:
        """Samples of the winning answer first, best reward first; the score is the share of all weight."""
        await judged(samples, np.flatnonzero(~answers.failed), self.reward, context, valid=unit_interval)
        return self.returned(samples, answers, vote(answers.group, samples.rewards), context, weights=samples.rewards)


@register("best-of-majority")
@dataclass(frozen=True, kw_only=True)
class BestOfMajority(RewardedVote):
    """Best-of-Majority (Di et al. 2025): of the frequent answers the k with the best rewards, for pass@k.

    Only samples of frequent answers are rewarded. An answer is worth the mean reward of its samples. The paper's
    threshold for a coverage C is 3 / (4 C); it tunes .003 to .015 for 500 to 2000 samples. Reconstructed: that all
    answers are frequent if fewer than k would be, and the default threshold, the larger of 0.01 and 2 / num_samples.

    Args:
        num_return_sequences: k, the number of answers to return.
        alpha: smallest share of the samples that a frequent answer has; 0 is best-of-n over answers.
        highest: whether an answer is worth the highest reward of its samples instead.
    """

    num_return_sequences: int = 1
    alpha: float | None = None
    highest: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("num_return_sequences", self.num_return_sequences, 1, self.num_samples)
        if self.alpha is not None:
            number("alpha", self.alpha, "a share, from 0 to 1", lambda a: 0 <= a <= 1)

    async def choose(self, samples: Walkers, answers: Answers, context: SearchContext) -> list[Hypothesis]:
        """One sample of each answer, at most k, best answer first; the score is what the answer is worth.

        If no sample has an answer, the first is returned.
        """
        alpha = max(2 / self.num_samples, 0.01) if self.alpha is None else self.alpha
        k, groups = self.num_return_sequences, answers.group
        kept = np.flatnonzero(frequent(groups, alpha, k=k))
        if len(kept):
            await judged(samples, kept, self.reward, context)
        chosen = best_of_majority(groups, samples.rewards, alpha, k, highest=self.highest)
        worth = worth_of_answers(groups, samples.rewards, highest=self.highest)
        if not len(kept):
            chosen, worth = np.flatnonzero(~answers.failed)[:1], np.zeros(len(samples))
        facts = dict(answers=answers.said, shares=vote(groups), errors=samples.errors)
        context.trace.record("vote", nodes=samples.node, **facts)
        return samples.hypotheses(chosen, context, scores=worth)


@register("majority-of-the-bests")
@dataclass(frozen=True, kw_only=True)
class MajorityOfTheBests(RewardedVote):
    """Majority of the Bests (Rakhsha et al. 2025): the answer that best-of-m gives most often on resampled samples.

    The distribution over resamples is computed exactly. Reconstructed: the default size of a resample,
    sqrt(num_samples).

    Args:
        subset_size: m; 1 is majority, many is best-of-n. Default: the square root of the number of samples.
    """

    subset_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subset_size is not None:
            integer("subset_size", self.subset_size, 1)

    async def choose(self, samples: Walkers, answers: Answers, context: SearchContext) -> list[Hypothesis]:
        """Samples of the winning answer first, best reward first; the score is the probability that it is best."""
        await judged(samples, np.flatnonzero(~answers.failed), self.reward, context)
        m = max(1, round(self.num_samples**0.5)) if self.subset_size is None else self.subset_size
        shares = majority_of_the_bests(answers.group, samples.rewards, m)
        return self.returned(samples, answers, shares, context)


def texts_of(samples: Walkers, context: SearchContext) -> list[str]:
    """The texts of samples, without their prompt.

    Raises:
        InvalidInput: the decoder has no tokenizer.
    """
    if context.decode is None:
        raise InvalidInput("answers are read from text: expected a Decoder with a tokenizer, got tokenizer=None")
    return [context.decode(b.tokens[context.root.length :]) or "" for b in samples.branches]
