"""Twisted SMC and SMC steering: resampling without replacement, and unbiased estimates of p(x) potential(x)."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

import tiny
from forktree import FunctionReward, InvalidInput, RewardError
from forktree.search import SMCSteering, TwistedSMC
from forktree.search.selection import logsumexp, without_replacement
from markov import MarkovLM
from searches import alike, by_text

LM = MarkovLM.random("ab", seed=3, spread=2.0, end=0.3)
STEPS = 3
ONE_TOKEN = dict(step_delimiter="", max_step_tokens=1, max_steps=STEPS, temperature=1.0)


def value(text: str) -> float:
    """Between 0.1 and 0.9, different for most texts."""
    return 0.1 + 0.8 * ((5 * sum((i + 2) * ord(c) ** 2 for i, c in enumerate(text)) + 3) % 23) / 22


# ---------------------------------------------------------------- resampling


def members(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(int(rng.integers(1, 12)), rng.choice([0.2, 1.0, 5.0])))
    weights[rng.random(len(weights)) < 0.2] = 0
    weights[rng.integers(len(weights))] += 0.1
    return weights / weights.sum()


@pytest.mark.parametrize("seed", range(40))
def test_without_replacement_keeps_heavy_members_and_the_expectation_of_light_ones(seed: int) -> None:
    """c solves sum(min(c w, 1)) = n; whoever has c w >= 1 stays as it is, the others stay with probability c w."""
    weights, n = members(seed), 1 + seed % 6
    if np.count_nonzero(weights) <= n:
        stay, new = without_replacement(weights, n, np.random.default_rng(0))
        assert stay.tolist() == np.flatnonzero(weights).tolist()
        np.testing.assert_array_equal(new, weights[stay])
        return
    low, high = 0.0, n / weights[weights > 0].min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(middle * weights, 1).sum() < n else (low, middle)
    c, runs = high, 400
    kept, sums = np.zeros(len(weights)), np.zeros(len(weights))
    for run in range(runs):
        # systematic: u from a grid hits every member as often as it should, up to one grid step
        class Grid:
            def random(self, u: float = (run + 0.5) / runs) -> float:
                return u

        stay, new = without_replacement(weights, n, Grid())  # type: ignore[arg-type]
        assert len(stay) == n and (np.diff(stay) > 0).all()
        np.testing.assert_allclose(new, np.maximum(weights[stay], 1 / c), rtol=1e-6)
        kept[stay] += 1 / runs
        sums[stay] += new / runs
    np.testing.assert_allclose(kept, np.minimum(c * weights, 1), atol=2 / runs)
    np.testing.assert_allclose(sums, weights, atol=2 / runs / c)


def test_without_replacement_survives_rounding() -> None:
    rng = np.random.default_rng(0)
    for weights in (np.array([1.0, 1e-300, 1e-300]), np.full(3, 1 / 3), np.array([0.5, 0.5, 0, 0, 1e-17])):
        for n in (1, 2):
            stay, new = without_replacement(weights, n, rng)
            assert len(set(stay.tolist())) == n and (new > 0).all()


def test_logsumexp() -> None:
    assert logsumexp(np.array([-1000.0, -1000 + math.log(3), -np.inf])) == pytest.approx(-1000 + math.log(4))


# ---------------------------------------------------------------- the distribution


POTENTIALS = {"reward": value, "odds": lambda t: value(t) / (1 - value(t)), "exp": lambda t: math.exp(value(t))}
SEARCHES: dict[str, Any] = {
    "never resampled": lambda **how: TwistedSMC(num_particles=4, ess_threshold=0.0, **how),
    "uneven": lambda **how: TwistedSMC(num_particles=4, ess_threshold=0.8, **how),
    "always": lambda **how: TwistedSMC(num_particles=4, ess_threshold=1.0, resampling="systematic", **how),
    "steering": lambda **how: SMCSteering(num_particles=4, beam_factor=2, **how),
    "steering by one": lambda **how: SMCSteering(num_particles=4, beam_factor=1, **how),
}


def unnormalised(name: str, potential: str, temperature: float, runs: int) -> tuple[np.ndarray, np.ndarray]:
    """p(x) potential(x) of all texts, and the estimate of each run, `[runs, cells]`; the rare texts are one cell."""
    prior = LM.texts("a", STEPS)
    exact = {text: p * POTENTIALS[potential](text) ** (1 / temperature) for text, p in prior.items()}
    common = [text for text in exact if exact[text] > 0.08 * sum(exact.values())]
    assert len(common) >= 3
    cells = {text: common.index(text) if text in common else len(common) for text in exact}
    search = SEARCHES[name](
        reward=by_text(value), potential=potential, weight_temperature=temperature, **ONE_TOKEN
    )
    found = np.zeros((runs, len(common) + 1))
    for i, result in enumerate(LM.decoder.search(alike("a", "ab", runs), search, max_new_tokens=16)):
        (evidence,) = [e["log_evidence"] for e in result.trace.events if e["event"] == "evidence"]
        for candidate in result.candidates:
            found[i, cells[candidate.text]] += math.exp(evidence) * candidate.hypothesis.weight
    merged = np.zeros(len(common) + 1)
    np.add.at(merged, list(cells.values()), list(exact.values()))
    return merged, found


@pytest.mark.parametrize("name", SEARCHES)
def test_estimates_are_unbiased_text_by_text(name: str) -> None:
    """The mean over runs of evidence times weight is p(x) potential(x), within five standard errors; so is the sum."""
    exact, found = unnormalised(name, "odds", 1.0, runs=60)
    error = found.std(axis=0, ddof=1) / math.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - exact) < 5 * error).all()
    total = found.sum(axis=1)
    assert abs(total.mean() - exact.sum()) < 4 * total.std(ddof=1) / math.sqrt(len(total)) + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "potential", "temperature"),
    [("uneven", "reward", 0.5), ("uneven", "exp", 0.3), ("steering", "exp", 0.3), ("steering", "odds", 2.0)],
)
def test_every_potential_is_estimated_without_bias(name: str, potential: str, temperature: float) -> None:
    exact, found = unnormalised(name, potential, temperature, runs=150)
    error = found.std(axis=0, ddof=1) / math.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - exact) < 5 * error).all()


def test_a_reward_on_the_way_only_guides() -> None:
    """With every text's own reward equal, weights are equal in the end, whatever the rewards were on the way."""
    texts = LM.texts("a", STEPS)
    ends = {text for text in texts if len(text) == STEPS}
    reward = by_text(lambda text: 0.5 if text in ends else value(text))
    lm = MarkovLM({"a": {"a": 0.4, "b": 0.6}, "b": {"a": 0.7, "b": 0.3}})
    search = TwistedSMC(reward=reward, num_particles=8, ess_threshold=0.0, potential="odds", **ONE_TOKEN)
    (result,) = lm.decoder.search("a", search, max_new_tokens=16)
    np.testing.assert_allclose([c.hypothesis.weight for c in result.candidates], 1 / 8)
    assert result.trace.events[-2]["log_evidence"] == pytest.approx(0.0)


# ---------------------------------------------------------------- steering


def test_steering_tries_every_particle_several_ways_and_keeps_different_ones() -> None:
    search = SMCSteering(reward=by_text(value), num_particles=5, beam_factor=3, **ONE_TOKEN)
    decoder = LM.new_decoder()
    (result,) = decoder.search("ba", search, max_new_tokens=16)
    tiny.assert_all_returned(decoder.worker)
    selects = [e for e in result.trace.events if e["event"] == "select"]
    assert {e["why"] for e in selects} == {"beam factor", "steering"} and len(result.candidates) == 5
    for event in selects:
        copies = Counter(event["ancestors"])
        if event["why"] == "steering":
            assert max(copies.values()) == 1 and len(copies) <= 5
            assert sum(event["weights"]) == pytest.approx(1)
        else:
            assert set(copies.values()) <= {1, 3}


def test_weights_that_failures_have_taken_from_all_end_the_search() -> None:
    """One particle fails at the first step, all others at the second: nobody has a weight, though some have rewards."""

    def reward(prompt: str, response: str) -> float:
        if (len(response) == 1) == response.startswith("a"):
            raise KeyError(response)
        return 0.5

    lm = MarkovLM({"a": {"a": 0.5, "b": 0.5}, "b": {"a": 0.5, "b": 0.5}})
    search = TwistedSMC(reward=FunctionReward(reward), num_particles=8, ess_threshold=0.0, **ONE_TOKEN)
    (result,) = lm.decoder.search("a", search, max_new_tokens=16)
    assert isinstance(result.error, RewardError) and "no particle has a weight left" in str(result.error)
    assert "KeyError" in str(result.error)


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        (TwistedSMC, "potential", "logit"),
        (TwistedSMC, "resampling", "steering"),
        (TwistedSMC, "ess_threshold", 1.5),
        (TwistedSMC, "num_particles", 0),
        (SMCSteering, "beam_factor", 0),
        (SMCSteering, "potential", 1),
    ],
)
def test_bad_settings_are_named(kind: Any, setting: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=setting):
        kind(**{"reward": by_text(len), setting: value})
