"""What holds for every search that grows texts step by step: its slots come back, and nothing but its seed matters."""

from collections.abc import Callable
from typing import Any

import pytest

import tiny
from forktree import FunctionReward, ParticleFilter, SearchResult
from forktree.search import (
    DVTS,
    ETS,
    REBASE,
    EntropicParticleFilter,
    ParallelTempering,
    ParticleGibbs,
    PRMBeamSearch,
    Search,
    SMCSteering,
    StepBeamSearch,
    TwistedSMC,
)
from forktree.search.registry import searches
from forktree.search.steps import StepSearch
from searches import alone, digits, mixed, outcome, together, value_head

STEPS: dict[str, Any] = dict(step_delimiter="5", max_step_tokens=3, max_steps=5, stop=("b",))
SEARCHES: dict[str, Callable[..., Search]] = {
    "dvts": lambda **how: DVTS(num_beams=6, beam_width=3, lookahead=1, **how),
    "entropic-particle": lambda **how: EntropicParticleFilter(num_particles=6, lookahead_weight=0.5, **how),
    "ets": lambda **how: ETS(width=6, **how),
    "parallel-tempering": lambda **how: ParallelTempering(num_particles=3, num_iterations=3, num_chains=2, **how),
    "particle": lambda **how: ParticleFilter(num_particles=6, ess_threshold=0.6, **how),
    "particle-gibbs": lambda **how: ParticleGibbs(num_particles=4, num_iterations=3, **how),
    "prm-beam": lambda **how: PRMBeamSearch(num_beams=6, beam_width=2, lookahead=1, filter_duplicates=True, **how),
    "rebase": lambda **how: REBASE(width=6, **how),
    "smc-steering": lambda **how: SMCSteering(num_particles=4, beam_factor=2, **how),
    "step-beam": lambda **how: StepBeamSearch(step_beam_width=2, num_samples=3, **how),
    "twisted-smc": lambda **how: TwistedSMC(num_particles=6, **how),
}
every = pytest.mark.parametrize("name", SEARCHES)


def test_every_search_with_steps_is_here() -> None:
    assert set(SEARCHES) == {name for name, search in searches().items() if issubclass(search, StepSearch)}


def told(result: SearchResult) -> list[dict[str, Any]]:
    """The trace without what rounds: who grew by what, who was kept."""
    kept = ("event", "nodes", "parents", "tokens", "ends", "ancestors", "dropped", "why")
    return [{k: v for k, v in event.items() if k in kept} for event in result.trace.events]


@every
def test_the_same_seed_is_the_same_tree_and_all_slots_come_back(name: str) -> None:
    search, found = SEARCHES[name](reward=FunctionReward(digits), **STEPS), []
    for seed in (3, 3, 4):
        decoder = tiny.decoder()
        (result,) = decoder.search(["12+3="], search, max_new_tokens=14, seed=seed)
        assert result.error is None and result.candidates
        tiny.assert_all_returned(decoder.worker)
        found.append(told(result))
    assert found[0] == found[1] != found[2]


@every
def test_a_search_is_the_same_alone_and_among_twenty_others(name: str) -> None:
    """Of mixed kinds, in the same forward passes, with hardly enough slots; in fp32."""
    others = [*mixed(), *mixed(), *mixed()][:20]
    searches_ = [
        *others[:7],
        SEARCHES[name](reward=FunctionReward(digits), **STEPS),
        *others[7:],
        SEARCHES[name](reward=value_head(), **STEPS),
    ]
    prompts = tiny.prompts(len(searches_), seed=1)
    decoder = tiny.decoder()
    results = together(decoder, prompts, searches_, max_new_tokens=14, seed=5)
    tiny.assert_all_returned(decoder.worker)
    for i in (7, len(searches_) - 1):
        assert [outcome(results[i])] == alone([prompts[i]], [searches_[i]], max_new_tokens=14, seed=5)


@every
def test_texts_stay_within_their_limits_and_come_best_first(name: str) -> None:
    for tokens, steps in ((1, 5), (9, 2), (14, 1)):
        search = SEARCHES[name](reward=FunctionReward(digits), **{**STEPS, "max_steps": steps})
        (result,) = tiny.decoder().search(["12+3="], search, max_new_tokens=tokens)
        assert result.error is None
        for c in result.candidates:
            ended = c.hypothesis.finish_reason == "eos"
            assert len(c.token_ids) + ended <= tokens and len(c.hypothesis.step_rewards) <= steps
        in_order = sorted(result.candidates, key=lambda c: -c.score)
        if name != "step-beam":  # what reached a limit comes last there
            assert [c.score for c in result.candidates] == [c.score for c in in_order]


@every
def test_beginnings_are_shared(name: str) -> None:
    """The prompt is computed once, and a token that several texts share is computed once for all of them."""
    search = SEARCHES[name](reward=FunctionReward(digits), **STEPS)
    prompt = "1+2=3 4-1=3 12+3="
    (result,) = tiny.decoder().search([prompt], search, max_new_tokens=14)
    grown = sum(len(t) for e in result.trace.events if e["event"] == "grow" for t in e["tokens"])
    assert result.counters.model_tokens <= len(prompt) + grown


LIMITS = [dict(max_model_tokens=9), dict(max_model_tokens=40), dict(max_reward_calls=1), dict(max_reward_calls=9)]


@every
@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: " ".join(f"{n} {v}" for n, v in limit.items()))
def test_a_spent_budget_ends_a_search_with_what_it_has(name: str, limit: dict[str, int]) -> None:
    """It is never exceeded, some text has a reward, and a budget that is not spent changes nothing."""
    search = SEARCHES[name](reward=FunctionReward(digits), **STEPS)
    decoder = tiny.decoder()
    (result,) = decoder.search(["12+3="], search, max_new_tokens=14, **limit)
    tiny.assert_all_returned(decoder.worker)
    assert result.error is None, result.error
    used = dict(max_model_tokens=result.counters.sampled_tokens, max_reward_calls=result.counters.reward_calls)
    assert all(used[name] <= most for name, most in limit.items())
    assert result.candidates and result.best.score == result.best.score
    (free,) = tiny.decoder().search(["12+3="], search, max_new_tokens=14)
    needed = dict(max_model_tokens=free.counters.sampled_tokens, max_reward_calls=free.counters.reward_calls)
    enough = {name: most + 1 for name, most in needed.items()}
    (same,) = tiny.decoder().search(["12+3="], search, max_new_tokens=14, **enough)
    assert outcome(same) == outcome(free)
    if limit in (LIMITS[0], LIMITS[2]):
        assert any(used[name] < needed[name] for name in limit), "the budget matters"
