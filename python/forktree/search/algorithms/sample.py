"""Greedy decoding, independent samples, and the best of them by a reward."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forktree.checks import integer
from forktree.ops.sampling import Sampling
from forktree.rewards.base import Reward, check_reward
from forktree.search.base import ExtendingSearch, Hypothesis, SamplingSearch
from forktree.search.context import SearchContext
from forktree.search.registry import register
from forktree.search.selection import best_first
from forktree.search.steps import Walkers, complete, judged


@register("greedy")
@dataclass(frozen=True, kw_only=True)
class Greedy(ExtendingSearch):
    """The most likely token at every position."""

    @property
    def sampling(self) -> Sampling:
        """The most likely token."""
        return Sampling(temperature=0)

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """One hypothesis; its score is the log-prob."""
        return await _sampled(context, self, 1)


@register("sample")
@dataclass(frozen=True, kw_only=True)
class Sample(SamplingSearch):
    """Independent samples of one prompt, which is computed once.

    Args:
        num_return_sequences: number of samples.
    """

    num_return_sequences: int = 1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("num_return_sequences", self.num_return_sequences, 1)

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """Samples in the order in which they were begun; the score is the log-prob."""
        return await _sampled(context, self, self.num_return_sequences)


@dataclass(frozen=True, kw_only=True)
class SelectingSearch(SamplingSearch):
    """Independent samples of one prompt, which are then ranked: a subclass says by what.

    Args:
        num_samples: number of samples.
    """

    num_samples: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("num_samples", self.num_samples, 1)

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """Samples, best first."""
        return await self.select(await self.sample(context), context)

    async def sample(self, context: SearchContext) -> Walkers:
        """Finished samples."""
        samples = Walkers.start(context, self.num_samples)
        await complete(samples, context, self)
        return samples

    @abstractmethod
    async def select(self, samples: Walkers, context: SearchContext) -> list[Hypothesis]:
        """Ranks finished samples; the best comes first."""


@dataclass(frozen=True, kw_only=True)
class RewardedSearch(SelectingSearch):
    """A search that ranks finished samples by rewards.

    Args:
        reward: what a text is worth.
    """

    reward: Reward

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reward(self.reward)

    @property
    def rewards(self) -> Sequence[Reward]:
        """The reward."""
        return (self.reward,)


@register("best-of-n")
@dataclass(frozen=True, kw_only=True)
class BestOfN(RewardedSearch):
    """Independent samples, ranked by the reward of the whole text."""

    async def select(self, samples: Walkers, context: SearchContext) -> list[Hypothesis]:
        """Best reward first; samples without one come last."""
        await judged(samples, np.arange(len(samples)), self.reward, context)
        return samples.hypotheses(best_first(samples.rewards), context)


async def _sampled(context: SearchContext, search: ExtendingSearch, n: int) -> list[Hypothesis]:
    """`n` texts as they come; the score is the log-prob."""
    samples = Walkers.start(context, n)
    await complete(samples, context, search)
    return samples.hypotheses(np.arange(n), context, scores=samples.log_prob)
