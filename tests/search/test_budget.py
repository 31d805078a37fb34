"""Budgets: what is left is shared fairly, no search asks for more, and what it had is not lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from forktree import (
    AdaptiveVote,
    BeamSearch,
    BestOfN,
    FunctionReward,
    Greedy,
    InvalidInput,
    MajorityVote,
    MinimumBayesRisk,
    ParticleFilter,
    PerplexityConsistency,
    Sample,
    SearchResult,
    WeightedVote,
)
from forktree.engine.counters import Counters
from forktree.search import Search
from forktree.search.budget import Budget
from searches import digits, mixed, outcome, together

PROMPT = "12+3="


def last(text: str) -> str:
    return text[-1:]


SEARCHES: dict[str, Search] = {
    "greedy": Greedy(),
    "sample": Sample(num_return_sequences=5),
    "best-of-n": BestOfN(reward=FunctionReward(digits), num_samples=6),
    "vote": MajorityVote(answer=last, num_samples=6),
    "adaptive": AdaptiveVote(answer=last, num_samples=7, round_size=2),
    "weighted": WeightedVote(answer=last, reward=FunctionReward(digits), num_samples=6),
    "rpc": PerplexityConsistency(answer=last, num_samples=8),
    "mbr": MinimumBayesRisk(num_samples=6),
    "beam": BeamSearch(num_beams=3),
    "particle": ParticleFilter(reward=FunctionReward(digits), num_particles=7, step_delimiter="5", max_step_tokens=4),
}


def run(search: Search, **options: int) -> SearchResult:
    decoder = tiny.decoder()
    (result,) = decoder.search([PROMPT], search, max_new_tokens=20, seed=3, **options)  # type: ignore[arg-type]
    assert result.error is None, result.error
    tiny.assert_all_returned(decoder.worker)
    return result


def generated(result: SearchResult) -> int:
    """Tokens of all texts by the trace, EOS included; each step of a beam search takes one a beam."""
    grown = [e for e in result.trace.events if e["event"] == "grow"]
    if "scores" in grown[0]:
        return len(grown) * len(grown[0]["nodes"])  # the last event, of what is returned, stands for the last step
    return sum(len(t) + (end == "eos") for e in grown for t, end in zip(e["tokens"], e["ends"], strict=True))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 200))
def test_shares_are_fair(wanted: list[int], left: int) -> None:
    """Nobody has more than he could use, nothing is left that somebody could, and no share could be evened out."""
    got = Budget(Counters(sampled_tokens=7), 7 + left).limit_tokens(np.array(wanted)).tolist()
    assert sum(got) == min(left, sum(wanted))
    assert all(0 <= share <= most for share, most in zip(got, wanted, strict=True))
    for share, most in zip(got, wanted, strict=True):
        assert share == most or share >= max(got) - 1
    short = [share for share, most in zip(got, wanted, strict=True) if share < most]
    assert short == sorted(short, reverse=True), "the first have what does not divide"


@pytest.mark.parametrize("max_model_tokens", [7, 8, 20, 33, 61])
@pytest.mark.parametrize("name", SEARCHES)
def test_no_more_tokens_are_generated_than_allowed(name: str, max_model_tokens: int) -> None:
    result = run(SEARCHES[name], max_model_tokens=max_model_tokens)
    used = generated(result)
    assert used == result.counters.sampled_tokens <= max_model_tokens
    free = run(SEARCHES[name])
    cut = [c for c in result.candidates if c.hypothesis.finish_reason == "budget"]
    if generated(free) <= max_model_tokens:
        assert outcome(result) == outcome(free) and not cut
    elif name != "beam":  # whose beams take as many tokens each
        assert cut and used == max_model_tokens, "all of it is used"
    texts = [c.text for c in free.candidates]
    if name in ("greedy", "sample"):
        for whole, candidate in zip(texts, result.candidates, strict=True):
            assert whole is not None and candidate.text is not None and whole.startswith(candidate.text)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_budget_that_is_just_enough_changes_nothing(name: str) -> None:
    free = run(SEARCHES[name])
    calls = free.counters.reward_calls or 1
    same = run(SEARCHES[name], max_model_tokens=generated(free), max_reward_calls=calls)
    assert [c.token_ids for c in same.candidates] == [c.token_ids for c in free.candidates]
    assert [c.score for c in same.candidates] == [c.score for c in free.candidates]


@pytest.mark.parametrize("max_reward_calls", [1, 4, 7, 10, 23])
@pytest.mark.parametrize("name", ["best-of-n", "weighted", "particle"])
def test_no_more_texts_are_rewarded_than_allowed(name: str, max_reward_calls: int) -> None:
    result, free = run(SEARCHES[name], max_reward_calls=max_reward_calls), run(SEARCHES[name])
    assert result.counters.reward_calls == min(max_reward_calls, free.counters.reward_calls)
    rewards = [e["rewards"] for e in result.trace.events if e["event"] == "reward"]
    assert sum(map(len, rewards)) == result.counters.reward_calls
    last: dict[int, float] = {}  # of every text that was returned, as far as it was judged
    for event in result.trace.events:
        if event["event"] == "reward":
            last.update(zip(event["nodes"], event["rewards"], strict=True))
    scores = [c.score for c in result.candidates]
    rated = [s for s in scores if not np.isnan(s)]
    assert rated and rated == sorted(rated, reverse=True) and np.isnan(scores[len(rated) :]).all()
    for candidate in result.candidates[len(rated) :]:
        assert "the budget of" in str(candidate.hypothesis.error)
    if result.counters.reward_calls < free.counters.reward_calls and name == "particle":
        assert any(c.hypothesis.finish_reason == "budget" for c in result.candidates)


def test_a_budget_is_the_same_whatever_else_runs_and_whatever_was_kept() -> None:
    names = list(SEARCHES)
    limits = dict(max_model_tokens=24, max_reward_calls=9)
    alone = {name: outcome(run(SEARCHES[name], **limits)) for name in names}
    decoder = tiny.decoder()
    for _ in range(2):  # the second time the prompt is there
        searches = [SEARCHES[name] for name in names] + mixed()
        results = together(decoder, [PROMPT] * len(searches), searches, max_new_tokens=20, seed=3, **limits)
        for name, result in zip(names, results, strict=False):
            assert outcome(result) == alone[name], name


@pytest.mark.parametrize("name", ["max_model_tokens", "max_reward_calls"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "many"])
def test_what_is_no_budget_is_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=f"{name} must be.*got"):
        tiny.decoder().search([PROMPT], Greedy(), **{name: value})  # type: ignore[arg-type]


def test_beams_need_a_token_each() -> None:
    (result,) = tiny.decoder().search([PROMPT], BeamSearch(num_beams=3), max_model_tokens=2)
    assert isinstance(result.error, InvalidInput)
    assert str(result.error) == "max_model_tokens must be at least num_beams = 3, got 2"
