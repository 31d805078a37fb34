"""A search that does something wrong: it alone ends, its error says what, and the others give what they give alone."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import tiny
from forktree import (
    Decoder,
    Hypothesis,
    InvalidInput,
    ParticleFilter,
    RewardError,
    RewardModel,
    Sample,
    Sampling,
    TokenRequest,
)
from forktree.engine.worker import ModelWorker
from forktree.kv import Branch, append, reassign
from forktree.rewards.base import PendingReward, RewardInput
from forktree.search import Search, SearchContext
from forktree.search.request import Extend, RewardBranches, extend, next_logits, reward_branches, score_tokens
from searches import Custom, Rewarding, Scripted, outcome, together, value_head

OTHER = tiny.decoder(num_slots=64)
FOREIGN = OTHER.worker.tree.root([3, 4, 5])
SAMPLING = Sampling()


def scoring(begin: Callable[[RewardInput], Any]) -> Callable[[SearchContext], Any]:
    async def script(context: SearchContext) -> list[Branch]:
        branches = context.root.fork(3)
        await extend(branches, SAMPLING, max_tokens=2)
        await reward_branches(branches, Custom(begin))
        return branches

    return script


def asking(request: Callable[[SearchContext, list[Branch]], Any]) -> Callable[[SearchContext], Any]:
    async def script(context: SearchContext) -> list[Branch]:
        branches = context.root.fork(3)
        await extend(branches, SAMPLING, max_tokens=2)
        await request(context, branches)
        return branches

    return script


def stopping(stop: Callable[..., Any]) -> Callable[[SearchContext], Any]:
    """`stop(branches)` is called at the third token."""

    async def script(context: SearchContext) -> list[Branch]:
        branches = context.root.fork(3)

        def at_third(token: int, tokens: Sequence[int]) -> bool:
            return bool(stop(branches)) if len(tokens) == 3 else False

        await extend(branches, SAMPLING, max_tokens=9, stop=at_third)
        await next_logits(branches)
        return branches

    return script


def processing(process: Callable[..., Any]) -> Callable[[SearchContext], Any]:
    async def script(context: SearchContext) -> list[Branch]:
        branches = context.root.fork(3)
        await extend(branches, SAMPLING, max_tokens=9, processors=[lambda ids, scores: process(branches, ids, scores)])
        await next_logits(branches)
        return branches

    return script


def fail(*_: Any) -> Any:
    raise LookupError("no such thing")


def end(*_: Any) -> Any:
    raise StopIteration("too early")


def leave(branches: Sequence[Branch]) -> Any:
    for branch in branches:
        branch.drop()


def lengthen(branches: Sequence[Branch]) -> Any:
    branches[0].append([1] * 400)


def misspell(branches: Sequence[Branch]) -> Any:
    branches[0].append([tiny.VOCAB + 5])


def shorten(branches: Sequence[Branch]) -> Any:
    for branch in branches:
        branch.rewind(1)


def on_own_worker(given: RewardInput, branches: Sequence[Branch]) -> PendingReward:
    reading = Rewarding(len(given.branches))
    reading.worker, reading.branches = given.worker, branches
    return reading


SCRIPTS: dict[str, tuple[Callable[[SearchContext], Any], type[Exception] | tuple[type[Exception], ...], str]] = {
    "2^62 tokens": (asking(lambda j, b: extend(b, SAMPLING, max_tokens=2**62)), InvalidInput, "max_tokens"),
    "half a token": (asking(lambda j, b: extend(b, SAMPLING, max_tokens=1.5)), InvalidInput, "max_tokens"),
    "limits too few": (asking(lambda j, b: extend(b, SAMPLING, max_tokens=[3])), InvalidInput, "max_tokens"),
    "no tokens": (asking(lambda j, b: extend(b, SAMPLING, max_tokens=0)), InvalidInput, "max_tokens"),
    "past the last position": (
        asking(lambda j, b: extend(b, SAMPLING, max_tokens=[1, 256, 1])),
        InvalidInput,
        "branch 1 .*max_tokens = 256.*256 positions",
    ),
    "no sampling": (asking(lambda j, b: extend(b, None, max_tokens=3)), InvalidInput, "sampling.*None"),
    "no sampling, made by hand": (
        asking(lambda j, b: Extend(tuple(b), None, np.ones(3, int), frozenset(), None, (), 0, None)),
        InvalidInput,
        "sampling.*None",
    ),
    "a sampling that lies": (
        asking(lambda j, b: extend(b, broken_sampling(), max_tokens=3)),
        (TypeError, ValueError),
        "",
    ),
    "no eos": (asking(lambda j, b: extend(b, SAMPLING, max_tokens=3, eos_token_ids=["x"])), InvalidInput, "eos"),
    "no stop": (asking(lambda j, b: extend(b, SAMPLING, max_tokens=3, stop="x")), InvalidInput, "stop.*'x'"),
    "no processor": (
        asking(lambda j, b: extend(b, SAMPLING, max_tokens=3, processors=[3])),
        InvalidInput,
        "processors",
    ),
    "no request": (asking(lambda j, b: score_tokens(b, None)), InvalidInput, "TokenRequest.*None"),
    "no reward": (asking(lambda j, b: reward_branches(b, None)), InvalidInput, "reward.*NoneType"),
    "a function": (asking(lambda j, b: RewardBranches(b, len)), InvalidInput, "reward.*FunctionReward"),
    "foreign, extend": (
        asking(lambda j, b: extend([b[0], FOREIGN], SAMPLING, max_tokens=1)),
        InvalidInput,
        "belongs to",
    ),
    "foreign, score": (asking(lambda j, b: reward_branches([FOREIGN], value_head())), InvalidInput, "belongs to tree"),
    "foreign, score_tokens": (
        asking(lambda j, b: score_tokens([FOREIGN], TokenRequest(lse=True))),
        InvalidInput,
        "tree",
    ),
    "foreign, next_logits": (asking(lambda j, b: next_logits([FOREIGN])), InvalidInput, "belongs to tree"),
    "foreign, append": (asking(lambda j, b: append([b[0], FOREIGN], [1, 2])), InvalidInput, "belongs to tree"),
    "foreign, reassign": (asking(lambda j, b: reassign([b[0], FOREIGN], [0])), InvalidInput, "belongs to tree"),
    "no branches": (asking(lambda j, b: next_logits(["x"])), InvalidInput, "must be a Branch, got str"),
    "a branch twice": (asking(lambda j, b: append([b[0], b[0]], [1, 2])), InvalidInput, "branch 1 of 2 a second time"),
    "begin raises": (scoring(fail), LookupError, "no such thing"),
    "begin ends": (scoring(end), StopIteration, "too early"),
    "close ends": (scoring(lambda s: Rewarding(3, close=end)), StopIteration, "too early"),
    "stop ends": (stopping(end), RuntimeError, "StopIteration"),
    "begin returns nothing": (scoring(lambda s: None), RewardError, "PendingReward, got NoneType"),
    "begin drops": (scoring(lambda s: (leave(s.branches), Rewarding(3))[1]), InvalidInput, "was dropped"),
    "begin drops what it wants": (
        scoring(lambda s: (leave(s.branches), on_own_worker(s, s.branches))[1]),
        InvalidInput,
        "branch 0 of 3 was dropped",
    ),
    "start wants foreign": (scoring(lambda s: on_own_worker(s, [FOREIGN] * 3)), InvalidInput, "belongs to tree"),
    "begin lengthens": (
        scoring(lambda s: (lengthen(s.branches), on_own_worker(s, s.branches))[1]),
        InvalidInput,
        "256",
    ),
    "read raises": (scoring(lambda s: Rewarding(3, read=fail)), LookupError, "no such thing"),
    "read gives a list": (scoring(lambda s: Rewarding(3, read=lambda: [1, 2, 3])), RewardError, "Rewards, got list"),
    "read gives too few": (scoring(lambda s: Rewarding(2)), RewardError, "3 rewards.*got 2"),
    "read drops": (scoring(lambda s: Rewarding(3, read=lambda: leave(s.branches) or fail())), LookupError, "no such"),
    "close raises": (scoring(lambda s: Rewarding(3, close=fail)), LookupError, "no such thing"),
    "close drops": (scoring(lambda s: Rewarding(3, close=lambda: leave(s.branches))), InvalidInput, "was dropped"),
    "stop raises": (stopping(fail), LookupError, "no such thing"),
    "stop drops": (stopping(leave), InvalidInput, "dropped"),
    "stop lengthens": (stopping(lengthen), InvalidInput, "changed"),
    "stop shortens": (stopping(shorten), InvalidInput, "changed"),
    "processor raises": (processing(fail), LookupError, "no such thing"),
    "processor gives nothing": (processing(lambda *_: None), AttributeError, ""),
    "processor gives half": (processing(lambda b, ids, scores: scores[:1]), InvalidInput, "return scores"),
    "processor drops": (processing(lambda b, ids, scores: leave(b[:1]) or scores), InvalidInput, "dropped"),
    "processor lengthens": (processing(lambda b, ids, scores: lengthen(b) or scores), InvalidInput, "256 positions"),
    "processor misspells": (processing(lambda b, ids, scores: misspell(b) or scores), InvalidInput, "ids must lie"),
}


def broken_sampling() -> Sampling:
    sampling = Sampling()
    object.__setattr__(sampling, "temperature", "hot")
    return sampling


class Returning(Search):
    """A search whose `run` is any function."""

    def __init__(self, run: Callable[[SearchContext], Any]) -> None:
        self._run = run

    def run(self, context: SearchContext) -> Any:
        return self._run(context)


async def given(value: Any) -> Any:
    return value


def hypothesis(tokens: Any) -> Hypothesis:
    return Hypothesis(tokens, 0.0, 0.0, "length")


RUNS: dict[str, tuple[Callable[[SearchContext], Any], type[Exception], str]] = {
    "no coroutine": (lambda context: [], InvalidInput, "Returning.run must be an async function.*list"),
    "raises at once": (fail, LookupError, "no such thing"),
    "a generator": (lambda context: (yield), InvalidInput, "async function.*generator"),
    "nothing": (lambda context: given(None), InvalidInput, "list of Hypothesis, got None"),
    "branches": (lambda context: given([context.root]), InvalidInput, "list of Hypothesis"),
    "no ids": (lambda context: given([hypothesis("abc")]), InvalidInput, "token_ids"),
    "ids past the vocabulary": (lambda context: given([hypothesis([tiny.VOCAB])]), InvalidInput, "token_ids"),
}


def innocents() -> list[Search]:
    steps: dict[str, Any] = dict(num_particles=3, step_delimiter="5", max_step_tokens=3, max_steps=4)
    reward_model = RewardModel(ModelWorker(tiny.model("qwen3"), num_slots=256), tiny.tokenizer(), value_head(1))
    return [
        Sample(num_return_sequences=3),
        ParticleFilter(reward=value_head(), **steps),
        Sample(num_return_sequences=2, logits_processor=(lambda ids, scores: scores + 0.25,)),
        ParticleFilter(reward=reward_model, **steps),
    ]


LIMITED = tiny.new_model(rope_parameters=tiny.LIMITED)  # to 256 positions


def limited() -> Decoder:
    return Decoder(LIMITED, tiny.tokenizer(), num_slots=2048)


PROMPTS = tiny.prompts(4, seed=3)
ALONE: list[Any] = []


def assert_each_ends_alone(offenders: dict[str, tuple[Search, Any, str]], ahead: bool) -> None:
    """All at once, with innocent searches that are older and younger than they."""
    if not ALONE:
        for prompt, search in zip(PROMPTS, innocents(), strict=True):
            ALONE.append(outcome(limited().search([prompt], search, max_new_tokens=9)[0]))
    decoder, good = limited(), innocents()
    decoder.engine.ahead = ahead
    prompts = [*PROMPTS[:2], *tiny.prompts(len(offenders), seed=8), *PROMPTS[2:]]
    searches = [*good[:2], *(search for search, *_ in offenders.values()), *good[2:]]
    found = together(decoder, prompts, searches, max_new_tokens=9, on_step=decoder.worker.tree.check)
    for (name, (_, kind, message)), result in zip(offenders.items(), found[2:-2], strict=True):
        assert isinstance(result.error, kind) and re.search(message, str(result.error)), (name, result.error)
        assert result.candidates == []
    assert [outcome(result) for result in found[:2] + found[-2:]] == ALONE
    tiny.assert_all_returned(decoder.worker)


NAMES = list(SCRIPTS)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("names", [NAMES, *([name] for name in NAMES[-3:])], ids=["all", *NAMES[-3:]])
def test_a_request_or_callback_that_is_wrong(names: list[str], ahead: bool) -> None:
    offenders = {name: (Scripted(script), *what) for name, (script, *what) in SCRIPTS.items() if name in names}
    assert_each_ends_alone(offenders, ahead)


def test_a_run_that_is_no_coroutine_or_returns_no_hypotheses() -> None:
    assert_each_ends_alone({name: (Returning(run), *what) for name, (run, *what) in RUNS.items()}, ahead=False)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("offends", [leave, lengthen, misspell])
def test_a_search_that_spoils_another_ends_that_one_at_most(offends: Any, ahead: bool) -> None:
    """A reward that reaches for the branches of a search that waits."""
    theirs: list[Branch] = []

    async def victim(context: SearchContext) -> list[Branch]:
        theirs.extend(context.root.fork(2))
        await extend(theirs, SAMPLING, max_tokens=9)
        await next_logits(theirs)
        return theirs

    spoils = Scripted(scoring(lambda given: (offends(theirs), Rewarding(3, read=fail))[1]))
    offenders = {
        "victim": (Scripted(victim), InvalidInput, "dropped|changed|ids must lie|256 positions"),
        "spoils": (spoils, LookupError, "no such thing"),
    }
    assert_each_ends_alone(offenders, ahead)


def test_what_a_reward_opened_on_its_own_model_is_dropped_with_the_search() -> None:
    worker = ModelWorker(tiny.model("qwen3"), num_slots=256)

    def begin(given: RewardInput) -> PendingReward:
        owner = int(given.worker.tree.branch_owner[given.branches[0].id])
        reading = Rewarding(3)
        reading.worker, reading.branches = worker, [worker.open([1, tiny.VOCAB + 5], owner=owner) for _ in range(3)]
        return reading

    assert_each_ends_alone({"a token too high": (Scripted(scoring(begin)), InvalidInput, "ids must lie")}, ahead=False)
    tiny.assert_all_returned(worker)


def test_a_rewards_model_that_fails_ends_the_searches_that_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = ModelWorker(tiny.new_model("qwen3"), num_slots=256)
    monkeypatch.setattr(worker.runner, "forward", fail)
    reward = RewardModel(worker, tiny.tokenizer(), value_head(1))
    offenders = {str(i): (ParticleFilter(reward=reward, num_particles=2), LookupError, "no such thing") for i in "ab"}
    assert_each_ends_alone(offenders, ahead=False)
    tiny.assert_all_returned(worker)
