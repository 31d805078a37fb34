"""Compute-optimal allocation: bins, the table of the best searches, and what the samples that ask for them cost."""

import math
from typing import Any

import numpy as np
import pytest

import tiny
from forktree import BestOfN, Greedy, InvalidInput, ParticleFilter, Sample
from forktree.search.algorithms.allocate import ComputeOptimal, difficulty_bin, fit_table
from markov import MarkovLM
from searches import by_text, digits

LM = MarkovLM.random("ab", seed=5, spread=2.0, end=0.2)
REWARD = by_text(lambda text: digits("", text))


@pytest.mark.proves(40)
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("bins", [1, 2, 5])
def test_the_table_names_the_best_search_of_each_bin(seed: int, bins: int) -> None:
    rng = np.random.default_rng(seed)
    difficulty, accuracy = rng.random(23), rng.random((23, 4))
    edges, best = fit_table(difficulty, accuracy, bins)
    assert len(edges) == bins - 1 and (np.diff(edges) >= 0).all()
    members: dict[int, list[int]] = {b: [] for b in range(bins)}
    for i, d in enumerate(difficulty):
        b = sum(1 for edge in edges if d >= edge)
        assert difficulty_bin(float(d), edges) == b
        members[b].append(i)
    sizes = [len(some) for some in members.values()]
    assert max(sizes) - min(sizes) <= 1 + (23 % bins > 0)
    for b, some in members.items():
        means = [sum(accuracy[i, s] for i in some) / len(some) for s in range(4)]
        assert best[b] == means.index(max(means))


def test_an_empty_bin_gets_the_best_of_all() -> None:
    accuracy = np.array([[0.0, 1.0], [1.0, 0.9], [0.0, 1.0]])
    edges, best = fit_table(np.array([0.5, 0.5, 0.5]), accuracy, bins=3)
    assert edges.tolist() == [0.5, 0.5] and best.tolist() == [1, 1, 1]


@pytest.mark.proves(40)
@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_the_samples_choose_the_search_and_stay_candidates(edge: float) -> None:
    """Half the prompts' mean rewards are below any edge; here all are on one side of it."""
    inner = {0.0: BestOfN(reward=REWARD, num_samples=5), 1.0: Sample(num_return_sequences=3)}
    search = ComputeOptimal(reward=REWARD, searches=[inner[1.0], inner[0.0]], edges=[edge])
    decoder = LM.new_decoder()
    (result,) = decoder.search("ab", search, max_new_tokens=9, seed=2)
    tiny.assert_all_returned(decoder.worker)
    (event,) = [e for e in result.trace.events if e["event"] == "difficulty"]
    assert event["bin"] == (0 if edge == 1.0 else 1)
    samples = LM.new_decoder().search("ab", BestOfN(reward=REWARD, num_samples=4, temperature=0.8), max_new_tokens=9,
                                      seed=2)[0]  # fmt: skip
    rewards = [c.score for c in samples.candidates]
    assert event["difficulty"] == pytest.approx(sum(rewards) / 4)
    texts = [c.text for c in result.candidates]
    if edge == 1.0:  # the samples of a search without that reward come first
        assert len(texts) == 3 + 4 and texts[3:] == [c.text for c in samples.candidates]
    else:
        scores = [c.score for c in result.candidates]
        assert len(texts) == 5 + 4 and scores == sorted(scores, reverse=True)
        assert sorted(scores)[-1] >= max(rewards)
    grown = sum(len(t) for e in result.trace.events if e["event"] == "grow" for t in e["tokens"])
    assert result.counters.model_tokens <= 2 + grown and result.counters.model_tokens > samples.counters.model_tokens
    assert result.counters.reward_calls == 4 + (5 if edge == 0.0 else 0)


def test_samples_without_a_reward_do_not_count() -> None:
    calls = 0

    def reward(text: str) -> float:
        nonlocal calls
        calls += 1
        return math.nan if calls == 2 else 0.25

    search = ComputeOptimal(reward=by_text(reward), searches=[Greedy()], edges=[])
    (result,) = LM.decoder.search("ab", search, max_new_tokens=5)
    (event,) = [e for e in result.trace.events if e["event"] == "difficulty"]
    assert event["difficulty"] == 0.25 and len(result.candidates) == 5


@pytest.mark.parametrize(
    ("setting", "value"),
    [("searches", []), ("searches", [3]), ("edges", []), ("edges", [math.nan]), ("edges", [0.5, 0.6]),
     ("num_samples", 0), ("reward", None)],
)  # fmt: skip
def test_bad_settings_are_named(setting: str, value: Any) -> None:
    given = dict(reward=REWARD, searches=[Greedy(), ParticleFilter(reward=REWARD)], edges=[0.5])
    with pytest.raises(InvalidInput, match=setting):
        ComputeOptimal(**{**given, setting: value})
    with pytest.raises(InvalidInput, match="edges must be 2 ascending numbers"):
        ComputeOptimal(reward=REWARD, searches=[Greedy()] * 3, edges=[0.6, 0.5])
