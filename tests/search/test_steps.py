"""Walkers, and the pure functions that searches choose and vote by."""

import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import tiny
from forktree import FunctionReward, Hypothesis, InvalidInput, RewardError
from forktree.search.answers import NO_ANSWER, Answers
from forktree.search.context import SearchContext
from forktree.search.selection import best_first, effective_sample_size, unit_interval
from forktree.search.steps import AGGREGATES, StepSearch, Walkers, grow, judged
from forktree.search.votes import vote


@dataclass
class Marked(Walkers):
    """Walkers with two fields of their own, and one that all share."""

    mark: np.ndarray = field(default_factory=lambda: np.arange(4) * 10)
    name: list[str] = field(default_factory=lambda: list("abcd"))
    shared: dict[str, int] = field(default_factory=dict)


def inside(script: Any, prompt: str = "12+3=", **settings: Any) -> Any:
    """What a coroutine function finds that is given a context and a search with steps."""
    found: list[Any] = []

    @dataclass(frozen=True, kw_only=True)
    class Scripted(StepSearch):
        async def run(self, context: SearchContext) -> list[Hypothesis]:
            found.append(await script(context, self))
            return []

    search = Scripted(**{"reward": FunctionReward(lambda p, r: len(r) / 100), "step_delimiter": "5", **settings})
    decoder = tiny.decoder()
    result = decoder.search([prompt], search, max_new_tokens=24, seed=4)[0]
    if result.error is not None:
        raise result.error
    tiny.assert_all_returned(decoder.worker)
    return found[0]


@pytest.mark.parametrize("ancestors", [[0, 1, 2, 3], [3, 3, 0, 0], [2], [1, 1, 1, 1, 1, 3], [3, 2, 1, 0]])
def test_everything_travels_with_a_walker(ancestors: list[int]) -> None:
    """Fields of subclasses too; the texts are those of the ancestors, and the rest is dropped."""

    async def script(context: SearchContext, search: StepSearch) -> Any:
        walkers = Marked.start(context, 4)
        await grow(walkers, np.arange(4), context, search)
        await judged(walkers, np.array([0, 2, 3]), search.reward)
        before = [b.tokens.tolist() for b in walkers.branches]
        old = {name: list(getattr(walkers, name)) for name in ("node", "mark", "name", "history", "reason", "rewards")}
        shared = walkers.shared
        walkers = walkers.taken(np.array(ancestors), why="a test")
        assert isinstance(walkers, Marked) and len(walkers) == len(ancestors) and walkers.shared is shared
        assert [b.tokens.tolist() for b in walkers.branches] == [before[a] for a in ancestors]
        for name, values in old.items():
            assert repr(list(getattr(walkers, name))) == repr([values[a] for a in ancestors]), name
        assert len({b.id for b in walkers.branches}) == len(ancestors)
        return True

    assert inside(script)


def test_split_forks_each_as_often_as_it_says() -> None:
    async def script(context: SearchContext, search: StepSearch) -> Any:
        walkers = Walkers.start(context, 3)
        await grow(walkers, np.arange(3), context, search)
        texts = [b.tokens.tolist() for b in walkers.branches]
        walkers = walkers.split(np.array([2, 0, 3]), why="a test")
        assert [b.tokens.tolist() for b in walkers.branches] == [texts[i] for i in (0, 0, 2, 2, 2)]
        return context.trace.events[-1]

    event = inside(script)
    assert event["ancestors"] == [0, 0, 2, 2, 2] and event["dropped"] == [1] and event["why"] == "a test"


def test_only_the_chosen_walkers_grow_and_are_judged() -> None:
    async def script(context: SearchContext, search: StepSearch) -> Any:
        walkers = Walkers.start(context, 4)
        await grow(walkers, np.array([3, 1]), context, search)
        assert walkers.steps.tolist() == [0, 1, 0, 1]
        assert [b.length > context.root.length for b in walkers.branches] == [False, True, False, True]
        await judged(walkers, np.array([1]), search.reward)
        assert np.isnan(walkers.rewards).tolist() == [True, False, True, True]
        assert [len(h) for h in walkers.history] == [0, 1, 0, 0]
        return True

    assert inside(script)


def test_rewards_fail_alone_until_none_is_left() -> None:
    calls: list[str] = []

    def reward(prompt: str, response: str) -> float:
        calls.append(response)
        if len(calls) > 3 or len(calls) == 2:
            raise RuntimeError(f"call {len(calls)}")
        return 0.5

    async def script(context: SearchContext, search: StepSearch) -> Any:
        walkers = Walkers.start(context, 3)
        await judged(walkers, np.arange(3), search.reward)
        assert np.isnan(walkers.rewards).tolist() == [False, True, False]
        assert [error is None for error in walkers.errors] == [True, False, True]
        await judged(walkers, np.array([0, 2]), search.reward)

    with pytest.raises(RewardError, match=r"no branch has a reward left.*call 4"):
        inside(script, reward=FunctionReward(reward))


def test_aggregates() -> None:
    rewards = [0.5, 0.25, 0.75]
    found = {name: aggregate(rewards) for name, aggregate in AGGREGATES.items()}
    assert found == pytest.approx({"last": 0.75, "min": 0.25, "prod": 0.09375, "mean": 0.5})


@pytest.mark.parametrize("seed", range(20))
def test_best_first_is_a_stable_sort_with_nan_last(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.choice([0.1, 0.5, 0.9, -np.inf, np.inf, np.nan], 12)
    expected = sorted(range(12), key=lambda i: -math.inf if math.isnan(values[i]) else values[i], reverse=True)
    assert best_first(values).tolist() == expected


def test_effective_sample_size() -> None:
    assert effective_sample_size(np.full(8, 1 / 8)) == pytest.approx(8)
    assert effective_sample_size(np.array([0.0, 1.0, 0.0])) == 1
    assert effective_sample_size(np.array([0.5, 0.25, 0.25])) == pytest.approx(8 / 3)


def test_unit_interval() -> None:
    np.testing.assert_array_equal(unit_interval(np.array([-1e-9, 0.5, np.nan, 1 + 1e-6])), [0, 0.5, np.nan, 1])
    with pytest.raises(InvalidInput, match=r"\[0, 1\], got 1.5"):
        unit_interval(np.array([0.5, np.nan, 1.5]))


class _Unhashable:
    __hash__ = None  # type: ignore[assignment]


class _Unequal:
    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        raise ArithmeticError("not comparable")


@pytest.mark.parametrize("seed", range(20))
def test_votes_are_those_of_a_counter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    answered: list[Hashable] = ["a", "b", None, 1, ("x", 1)]
    said = [answered[i] for i in rng.integers(0, len(answered), 15)]
    answers = Answers.read([str(i) for i in range(15)], lambda text: said[int(text)])
    counts = Counter(a for a in said if a is not None)
    assert vote(answers.group).tolist() == [counts[a] / 15 if a is not None else 0.0 for a in said]
    assert answers.values == list(dict.fromkeys(a for a in said if a is not None))
    assert [None if g == NO_ANSWER else answers.values[g] for g in answers.group] == said


def test_answers_that_cannot_be_read_have_an_error_and_no_vote() -> None:
    def answer(text: str) -> Any:
        if text == "raises":
            raise KeyError("gone")
        return {"list": [], "unhashable": _Unhashable(), "first": _Unequal(), "second": _Unequal()}.get(text, text)

    texts = ["raises", "list", "unhashable", "first", "second", "7", "7"]
    answers = Answers.read(texts, answer)
    errors = [str(e) if e else None for e in answers.errors]
    for i, part in enumerate(["KeyError: 'gone' (branch 0)", "unhashable", "unhashable"]):
        assert "answer" in errors[i] and part in errors[i]
    assert errors[3] is None and "not comparable (branch 4)" in errors[4] and errors[5:] == [None, None]
    share = np.where(answers.failed, np.nan, vote(answers.group))
    assert np.isnan(share).tolist() == [True, True, True, False, True, False, False]
    assert share[5] == share[6] == 2 / 7 and vote(Answers.read([], answer).group).shape == (0,)
