"""Searches written in tests, and what of a result does not depend on rounding."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

import tiny
from forktree import (
    BestOfN,
    Decoder,
    FunctionReward,
    Greedy,
    Hypothesis,
    ParticleFilter,
    Reward,
    RewardError,
    Sample,
    Sampling,
    SearchResult,
    TokenProbability,
    ValueHead,
)
from forktree.engine.task import Task
from forktree.kv import Branch
from forktree.rewards.base import PendingReward, RewardInput, Rewards
from forktree.search import Search, SearchContext
from forktree.search.request import extend
from forktree.search.trace import SearchTrace


def finished(task: Task) -> SearchResult:
    """What `Decoder.search` would give for a task that is done."""
    return SearchResult(0, "", task.result or [], task.counters, SearchTrace(), task.error)


def digits(prompt: str, response: str) -> float:
    """A reward in (0, 1) that depends on the whole response."""
    return (1 + sum(ord(c) * (i + 3) for i, c in enumerate(response)) % 17) / 19


def value_head(seed: int = 0) -> ValueHead:
    torch.manual_seed(seed)
    return ValueHead([(torch.randn(1, 32), torch.zeros(1))])


def mixed() -> list[Search]:
    """One search of every kind, all with randomness of their own."""
    return [
        Sample(num_return_sequences=4),
        ParticleFilter(
            reward=FunctionReward(digits), num_particles=6, step_delimiter="5", max_step_tokens=4, max_steps=5
        ),
        Greedy(),
        ParticleFilter(reward=value_head(), num_particles=5, step_delimiter="\n", max_step_tokens=3, max_steps=6),
        BestOfN(reward=TokenProbability([4, 7], suffix=[2, 9, 2]), num_samples=5, top_k=8),
        ParticleFilter(
            reward=TokenProbability([4, 7], suffix=[3]),
            num_particles=7,
            step_delimiter="",
            max_step_tokens=2,
            resampling="multinomial",
            max_steps=7,
        ),
        Sample(num_return_sequences=2, temperature=0.6, top_p=0.9, stop=("-", "c1")),
    ]


def outcome(result: SearchResult) -> list[tuple[str | None, str, int]]:
    """Everything about a result's candidates that does not depend on rounding."""
    return [(c.text, c.hypothesis.finish_reason, len(c.hypothesis.step_rewards)) for c in result.candidates]


def alone(prompts: Sequence[str], searches: Sequence[Search], **options: Any) -> list[Any]:
    """The outcome of each search on a decoder of its own with plenty of everything."""
    found = []
    for prompt, search in zip(prompts, searches, strict=True):
        found.append(outcome(tiny.decoder(prefix_cache=False).search([prompt], search, **options)[0]))
    assert all(found)
    return found


MIXED_PROMPTS = tiny.prompts(4, seed=8)


def random_mix(seed: int) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """Numbers of searches of `mixed` and of `MIXED_PROMPTS`, and options of a decoder with little room for them."""
    rng = np.random.default_rng(seed)
    picks = [(int(rng.integers(len(mixed()))), int(rng.integers(4))) for _ in range(rng.integers(2, 9))]
    slots, budget = int(rng.integers(30, 120)), int(rng.choice([2, 5, 17, 512]))
    return picks, dict(num_slots=slots, max_batch_tokens=budget, prefix_cache=bool(rng.integers(2)))


@cache
def with_plenty(search: int, prompt: int) -> SearchResult:
    """What one search of a mix finds alone, with plenty of everything. Computed once."""
    decoder = tiny.decoder(prefix_cache=False)
    return decoder.search([MIXED_PROMPTS[prompt]], mixed()[search], max_new_tokens=9, seed=1)[0]


def together(
    decoder: Decoder, prompts: Sequence[str], searches: Sequence[Search], **options: Any
) -> list[SearchResult]:
    return sorted(decoder.search_iter(prompts, searches, **options), key=lambda r: r.index)


@dataclass(frozen=True)
class Scripted(Search):
    """A search written in a test."""

    script: Callable[[SearchContext], Awaitable[Any]]

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        found = await self.script(context)
        return [Hypothesis(b.tokens[context.root.length :], 0.0, 0.0, "length") for b in found or []]


def need(prompt: str, search: Search, max_new_tokens: int) -> int:
    """Slots that a search is sure to manage with: its branches' own tokens and probes beside the prompt."""
    names = ("num_particles", "num_samples", "num_return_sequences")
    branches = next((getattr(search, name) for name in names if hasattr(search, name)), 1)
    probe = 3 if isinstance(getattr(search, "reward", None), TokenProbability) else 0
    return len(prompt) + branches * (max_new_tokens + probe)


async def endless(context: SearchContext) -> list[Branch]:
    while True:
        branches = context.root.fork(3)
        await extend(branches, Sampling(), max_tokens=5)


POISON = 11


class Rewarding(PendingReward):
    """A reading whose parts may be replaced by what breaks."""

    def __init__(self, count: int, read: Any = None, close: Any = None) -> None:
        self._count, self._read, self._close, self.closed = count, read, close, 0

    def read(self, hidden: Any) -> Any:
        return self._read() if self._read is not None else Rewards(np.ones(self._count), [None] * self._count)

    def close(self) -> None:
        self.closed += 1
        assert self.closed == 1, "closed twice"
        if self._close is not None:
            self._close()


class Custom(Reward):
    """What a user may write: `begin(given)` is any function."""

    def __init__(self, begin: Callable[[RewardInput], Any]) -> None:
        self._begin = begin

    def start(self, given: RewardInput) -> Any:
        return self._begin(given)


def over_seeds(
    decoder: Decoder, prompt: str, search: Search, count: int, *, max_new_tokens: int
) -> list[SearchResult]:
    """What a search finds at seeds 0, 1, …, all side by side; raises the error of one that failed."""
    tasks = [decoder.submit(prompt, search, seed=seed, max_new_tokens=max_new_tokens) for seed in range(count)]
    while not all(task.done for task in tasks):
        decoder.engine.step()
    found = [finished(task) for task in tasks]
    assert all(result.best for result in found)
    return found


def by_text(value: Callable[[str], float]) -> Reward:
    """The reward of a response is what a function says of its text, at once, in the same thread; NaN is a failure."""

    def begin(given: RewardInput) -> PendingReward:
        values = np.array([value(text) for text in given.responses()], float)
        errors = [RewardError(f"no reward (branch {i})") if np.isnan(v) else None for i, v in enumerate(values)]
        return Rewarding(len(values), read=lambda: Rewards(values, errors))

    return Custom(begin)


def traced_tokens(trace: SearchTrace, node: int) -> list[int]:
    """The tokens of a text of which the newest step is `node`, from the events alone."""
    grown: dict[int, list[int]] = {}
    parent: dict[int, int] = {}
    for event in trace.events:
        if event["event"] == "grow":
            grown |= dict(zip(event["nodes"], event["tokens"], strict=True))
            parent |= dict(zip(event["nodes"], event["parents"], strict=True))
    tokens: list[int] = []
    while node != -1:
        tokens, node = [*grown[node], *tokens], parent[node]
    return tokens


def alike(last: str, characters: str, count: int) -> list[str]:
    """Different prompts after which a Markov chain goes on alike: all end with `last`."""
    rng = np.random.default_rng(count)
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(list(characters), 12)) + last] = None
    return list(found)
