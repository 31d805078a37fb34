"""Greedy decoding, independent samples, and the ways to pick among samples."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from forktree.checks import integer, shown
from forktree.errors import InvalidInput
from forktree.ops.sampling import Sampling
from forktree.rewards.base import Reward, check_reward
from forktree.search.answers import NO_ANSWER, Answers, vote
from forktree.search.base import ExtendingSearch, Hypothesis, SamplingSearch
from forktree.search.context import SearchContext
from forktree.search.registry import register
from forktree.search.selection import best_first
from forktree.search.steps import Walkers, check_any, complete, judged


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


@register("best-of-n")
@dataclass(frozen=True, kw_only=True)
class BestOfN(SamplingSearch):
    """Independent samples, ranked by the reward of the whole text.

    Args:
        reward: what a text is worth.
        num_samples: number of samples.
    """

    reward: Reward
    num_samples: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("num_samples", self.num_samples, 1)
        check_reward(self.reward)

    @property
    def rewards(self) -> Sequence[Reward]:
        """The reward."""
        return (self.reward,)

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """Best reward first; samples without one come last."""
        samples = Walkers.start(context, self.num_samples)
        await complete(samples, context, self)
        await judged(samples, np.arange(self.num_samples), self.reward)
        return samples.hypotheses(best_first(samples.rewards), context)


@register("majority-vote")
@dataclass(frozen=True, kw_only=True)
class MajorityVote(SamplingSearch):
    """Self-consistency (Wang et al. 2022): independent samples, the most frequent answer wins.

    Args:
        answer: text of a response -> its answer, anything hashable, or None if it has none; such responses win only
            if all are such. If it raises, or returns what cannot be counted, its response has no vote and comes last.
        num_samples: number of samples.
    """

    answer: Callable[[str], Hashable]
    num_samples: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("num_samples", self.num_samples, 1)
        if not callable(self.answer):
            raise InvalidInput(f"answer must be a function of the text, got {type(self.answer).__name__}")

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """Samples of the most frequent answer first; the score is the share of votes, NaN where `answer` failed."""
        if context.decode is None:
            raise InvalidInput("a majority vote reads text: expected a Decoder with a tokenizer, got tokenizer=None")
        samples = Walkers.start(context, self.num_samples)
        await complete(samples, context, self)
        texts = [context.decode(b.tokens[context.root.length :]) or "" for b in samples.branches]
        answers = Answers.read(texts, self.answer)
        samples.rewards, samples.errors = vote(answers), answers.errors
        said = [None if group == NO_ANSWER else shown(answers.values[group]) for group in answers.group]
        context.trace.record("vote", nodes=samples.node, answers=said, shares=samples.rewards, errors=answers.errors)
        check_any(answers.errors, samples.rewards)
        return samples.hypotheses(best_first(samples.rewards), context)


async def _sampled(context: SearchContext, search: ExtendingSearch, n: int) -> list[Hypothesis]:
    """`n` texts as they come; the score is the log-prob."""
    samples = Walkers.start(context, n)
    await complete(samples, context, search)
    return samples.hypotheses(np.arange(n), context, scores=samples.log_prob)
