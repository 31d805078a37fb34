"""Greedy decoding, independent samples, and the ways to pick among samples."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forktree.checks import integer
from forktree.errors import InvalidInput, ScorerError
from forktree.kv import Branch
from forktree.ops.sampling import Sampling
from forktree.search.base import (
    Hypothesis,
    SamplingSearch,
    Search,
    SearchContext,
    first_failure,
    needs_scorer,
    several_texts,
)
from forktree.search.processors import Processor, check_processors
from forktree.search.request import Extension, extend, score


@dataclass(frozen=True, kw_only=True)
class Greedy(Search):
    """The most likely token at every position. stop: texts that end the hypothesis (they stay part of it).
    logits_processor: see `forktree.search.processors`."""

    stop: tuple[str, ...] = ()
    logits_processor: Sequence[Processor] = ()

    def __post_init__(self) -> None:
        several_texts("stop", self.stop)
        check_processors("logits_processor", self.logits_processor)

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """One hypothesis; its score is the log-prob."""
        branches = context.root.fork(1)
        done = await _to_the_end(branches, Sampling(temperature=0), context, self)
        return [_hypothesis(branches[0], context, done, 0, float(done.log_prob[0]))]


@dataclass(frozen=True, kw_only=True)
class Sample(SamplingSearch):
    """`num_return_sequences` independent samples of one prompt, which is computed once."""

    num_return_sequences: int = 1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("num_return_sequences", self.num_return_sequences, 1)

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """Samples in the order of their draws; the score is the log-prob."""
        branches = context.root.fork(self.num_return_sequences)
        done = await _to_the_end(branches, self.sampling, context, self)
        return [_hypothesis(b, context, done, i, float(done.log_prob[i])) for i, b in enumerate(branches)]


@dataclass(frozen=True, kw_only=True)
class BestOfN(SamplingSearch):
    """`num_samples` samples, ranked by the scorer's reward of the whole text."""

    scorer: Any
    num_samples: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("num_samples", self.num_samples, 1)
        needs_scorer(self.scorer)

    @property
    def scorers(self) -> Sequence[Any]:
        """The reward."""
        return (self.scorer,)

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """Best reward first; samples whose scorer failed come last."""
        branches = context.root.fork(self.num_samples)
        done = await _to_the_end(branches, self.sampling, context, self)
        rewards = await score(branches, self.scorer)
        if all(rewards.errors):
            raise first_failure(rewards.errors)
        ranked = [
            _hypothesis(b, context, done, i, float(rewards.values[i]), rewards.errors[i])
            for i, b in enumerate(branches)
        ]
        return sorted(ranked, key=lambda h: -np.inf if h.error else h.score, reverse=True)


@dataclass(frozen=True, kw_only=True)
class MajorityVote(SamplingSearch):
    """Self-consistency (Wang et al. 2022): `num_samples` samples, the most frequent answer wins.

    answer: text of a response -> its answer, anything hashable, or None if it has none; such responses win only if all
        are such. Where it raises, or returns what cannot be counted, its response has no vote and comes last.
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
        branches = context.root.fork(self.num_samples)
        done = await _to_the_end(branches, self.sampling, context, self)
        texts = [context.decode(b.tokens[context.root.length :]) or "" for b in branches]
        answers, errors = zip(*(self._answer(i, text) for i, text in enumerate(texts)), strict=True)
        if all(errors):
            raise first_failure(errors)
        share = np.where([error is None for error in errors], vote(answers), np.nan).tolist()
        ranked = [_hypothesis(b, context, done, i, share[i], errors[i]) for i, b in enumerate(branches)]
        return sorted(ranked, key=lambda h: -np.inf if h.error else h.score, reverse=True)

    def _answer(self, i: int, text: str) -> tuple[Hashable, ScorerError | None]:
        """The answer of response `i`, or why there is none."""
        try:
            found = self.answer(text)
            hash(found)
        except Exception as error:  # the function is the user's own
            name = getattr(self.answer, "__qualname__", type(self.answer).__name__)
            return None, ScorerError(f"answer {name} raised {type(error).__name__}: {error} (branch {i})")
        return found, None


def vote(answers: Sequence[Hashable]) -> list[float]:
    """Share of all votes that each response's answer has, 0 for no answer. `[n] -> [n]`."""
    counts = Counter(a for a in answers if a is not None)
    return [counts[a] / len(answers) if a is not None else 0.0 for a in answers]


async def _to_the_end(
    branches: Sequence[Branch], sampling: Sampling, context: SearchContext, search: Greedy | SamplingSearch
) -> Extension:
    return await extend(
        branches,
        sampling,
        max_tokens=context.max_new_tokens,
        eos_token_ids=context.eos_token_ids,
        stop=context.stop_at(*search.stop),
        processors=search.logits_processor,
        pad_token_id=context.pad_token_id,
    )


def _hypothesis(
    branch: Branch, context: SearchContext, done: Extension, i: int, value: float, error: ScorerError | None = None
) -> Hypothesis:
    return Hypothesis(
        token_ids=branch.tokens[context.root.length :],
        score=value,
        log_prob=float(done.log_prob[i]),
        finish_reason=done.reason[i],
        error=error,
    )
