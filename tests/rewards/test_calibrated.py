"""Calibrated rewards: their definition, what they do not depend on, and what they do to best-of-n and particles."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from forktree import BestOfN, Calibrated, FunctionReward, InvalidInput, ParticleFilter, TokenProbability, WeightedVote
from forktree.rewards.calibrated import calibrated

REWARDS = st.lists(st.integers(-20, 20).map(lambda x: x / 4) | st.just(math.nan), min_size=1, max_size=12).map(np.array)


@pytest.mark.proves(18)
@settings(deadline=None, max_examples=60)
@given(REWARDS, st.none() | st.lists(st.integers(-20, 20).map(lambda x: x / 4), min_size=1, max_size=9).map(np.array))
def test_c_is_the_share_of_lower_references_and_half_of_equal_ones(
    rewards: np.ndarray, references: np.ndarray | None
) -> None:
    found = calibrated(rewards, references)
    for i, r in enumerate(rewards):
        others = np.delete(rewards, i) if references is None else references
        others = others[~np.isnan(others)]
        if math.isnan(r):
            assert math.isnan(found[i])
        elif len(others) == 0:
            assert found[i] == 0.5
        else:
            assert found[i] == pytest.approx(((others < r).sum() + (others == r).sum() / 2) / len(others))


@pytest.mark.proves(18)
@settings(deadline=None, max_examples=60)
@given(REWARDS)
def test_c_is_the_same_for_every_increasing_function(rewards: np.ndarray) -> None:
    found = calibrated(rewards)
    for increasing in (np.exp, np.arctan, lambda r: 3 * r - 7, lambda r: r**3):
        np.testing.assert_array_equal(calibrated(increasing(rewards)), found)
    known = found[~np.isnan(found)]
    assert not len(known) or known.mean() == pytest.approx(0.5)


@pytest.mark.proves(18)
def test_c_is_uniform_and_that_of_the_best_of_n_is_n_over_n_plus_1() -> None:
    rng = np.random.default_rng(0)
    references = np.sort(rng.normal(size=20_000))
    c = calibrated(rng.normal(size=5000), references)
    np.testing.assert_allclose(np.quantile(c, [0.1, 0.25, 0.5, 0.9]), [0.1, 0.25, 0.5, 0.9], atol=0.03)
    for n in (2, 5, 16):
        best = calibrated(rng.normal(size=(4000, n)).max(axis=1), references)
        assert best.mean() == pytest.approx(n / (n + 1), abs=4 * best.std() / 4000**0.5 + 0.01)


def length(prompt: str, response: str) -> float:
    if "5" in response:
        raise ValueError("five")
    return len(response) - 3.0


@pytest.mark.proves(18)
def test_best_of_n_keeps_its_order_and_has_calibrated_scores() -> None:
    decoder = tiny.decoder()
    plain, ranked = (
        decoder.search("1+2=", BestOfN(reward=r, num_samples=20), max_new_tokens=9)[0].candidates
        for r in (FunctionReward(length), Calibrated(FunctionReward(length)))
    )
    assert [c.text for c in ranked] == [c.text for c in plain]
    raw = np.array([c.score for c in plain])
    np.testing.assert_allclose([c.score for c in ranked], calibrated(raw))
    assert [c.hypothesis.error is None for c in ranked] == [c.hypothesis.error is None for c in plain]
    tiny.assert_all_returned(decoder.worker)


def test_what_was_no_weight_becomes_one() -> None:
    """A weighted vote refuses negative rewards; ranks it takes. Model-based rewards are calibrated likewise."""
    vote = dict(answer=lambda text: text[:1] or None, num_samples=12)
    references = [-3.0, 0.0, 2.0, 5.0]
    reward = Calibrated(FunctionReward(length), references=references, transform="exp", t=4.0)
    (result,) = tiny.decoder().search("1+2=", WeightedVote(reward=reward, **vote), max_new_tokens=9)
    weight: dict[str, float] = {}
    for c in result.candidates:
        if "5" not in c.text:
            share = np.mean([(r < len(c.text) - 3) + (r == len(c.text) - 3) / 2 for r in references])
            weight[c.text[:1]] = weight.get(c.text[:1], 0) + math.exp(4 * (share - 1))
    for c in result.candidates:
        if c.text:
            assert c.score == pytest.approx(weight.get(c.text[:1], 0) / sum(weight.values()))
    head = TokenProbability([4, 7], suffix=[2])
    raw, ranked = (
        tiny.decoder().search("1+2=", BestOfN(reward=r, num_samples=8), max_new_tokens=6)[0].candidates
        for r in (head, Calibrated(head))
    )
    np.testing.assert_allclose([c.score for c in ranked], calibrated(np.array([c.score for c in raw])))


@pytest.mark.proves(18)
def test_as_particle_weights_they_are_exponentials_of_t_c() -> None:
    def reward(prompt: str, response: str) -> float:
        return sum(map(ord, response)) % 7 - 3.0

    calibrated_reward = Calibrated(FunctionReward(reward), transform="logit", t=3.0)
    search = ParticleFilter(reward=calibrated_reward, num_particles=12, max_step_tokens=4, max_steps=1)
    candidates = tiny.decoder().search("1+2=", search, max_new_tokens=9)[0].candidates
    c = calibrated(np.array([reward("", x.text) for x in candidates]))
    weights = np.exp(3 * c) / np.exp(3 * c).sum()
    np.testing.assert_allclose([x.hypothesis.weight for x in candidates], weights, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (dict(reward=len), "reward must be"),
        (dict(transform="sqrt"), "transform must be one of rank, exp, logit"),
        (dict(t=0.0), "t must be more than 0"),
        (dict(references=[]), "references must be finite rewards"),
        (dict(references=[1.0, math.nan]), "references must be finite rewards"),
    ],
)
def test_bad_settings_are_named(options: dict, part: str) -> None:
    with pytest.raises(InvalidInput, match=part):
        Calibrated(**{"reward": FunctionReward(length), **options})
