"""Entropic particle filtering: the rules' own values, the limits in which it is the plain filter, and looking ahead."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

import tiny
from forktree import InvalidInput, ParticleFilter
from forktree.search import EntropicParticleFilter
from forktree.search.selection import ANNEALING, effective_sample_size, log_weights, softmax, temper
from markov import MarkovLM
from searches import alike, by_text, digits

LM = MarkovLM.random("ab", seed=1, spread=2.0, end=0.25)
ONE_TOKEN = dict(step_delimiter="", max_step_tokens=1, temperature=1.0)


def value(text: str) -> float:
    """Between 0.05 and 0.95, different for most texts."""
    return 0.05 + 0.9 * ((5 * sum((i + 2) * ord(c) ** 2 for i, c in enumerate(text)) + 3) % 23) / 22


# ---------------------------------------------------------------- annealing


@pytest.mark.proves(15)
@pytest.mark.parametrize(
    ("rule", "evenness", "progress", "divisor"),
    [("ess", 0.2, 0.2, 4.0), ("ess", 0.5, 0.8, 1.0), ("entropy", 0.5, 0.3, 1 / 0.65), ("base", 2.0, 0.5, 1.5)],
)
def test_the_rules_divide_by_what_the_paper_and_its_library_say(
    rule: str, evenness: float, progress: float, divisor: float
) -> None:
    assert max(1.0, ANNEALING[rule](evenness, progress)) == pytest.approx(divisor)


@pytest.mark.parametrize("rule", ANNEALING)
@pytest.mark.parametrize("seed", range(10))
def test_tempered_weights_are_a_softmax_of_divided_logits(rule: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, progress = rng.normal(0, 3, int(rng.integers(2, 20))), float(rng.random())
    p = np.exp(logits) / np.exp(logits).sum()
    evenness = {
        "ess": 1 / (p * p).sum() / len(p),
        "entropy": -(p * np.log(p)).sum() / math.log(len(p)),
        "base": math.nan,
    }[rule]
    divided = np.exp(logits / max(1.0, ANNEALING[rule](evenness, progress)))
    found = temper(logits, progress, rule)
    np.testing.assert_allclose(found, divided / divided.sum(), rtol=1e-9)
    assert effective_sample_size(found) >= effective_sample_size(p) - 1e-9
    assert temper(np.array([0.0, -np.inf, 1.0]), progress, rule)[1] == 0


def test_weights_are_flattened_only_while_they_are_uneven_and_the_search_is_young() -> None:
    """The weights that every step was resampled by, from the rewards in the trace."""
    search = EntropicParticleFilter(
        reward=by_text(lambda t: 0.999 if t[-1:] == "a" and len(t) % 2 else value(t)),
        num_particles=12,
        max_steps=10,
        annealing_threshold=0.6,
        early_phase=0.5,
        **ONE_TOKEN,
    )
    lm = MarkovLM({"a": {"a": 0.3, "b": 0.7}, "b": {"a": 0.3, "b": 0.7}})
    (result,) = lm.decoder.search("a", search, max_new_tokens=16, seed=2)
    reward, seen, step = {}, set(), 0
    for event in result.trace.events:
        if event["event"] == "reward":
            reward |= dict(zip(event["nodes"], event["rewards"], strict=True))
        if event["event"] == "select":
            step += 1
            logits = np.array([math.log(reward[n] / (1 - reward[n])) for n in event["nodes"]])
            plain = np.exp(logits) / np.exp(logits).sum()
            even = 1 / (plain**2).sum() >= 0.6 * 12
            late = step / 10 >= 0.5
            seen.add((even, late))
            expected = plain if even or late else temper(logits, step / 10, "ess")
            np.testing.assert_allclose(event["weights"], expected, rtol=1e-9)
            assert (even or late) == np.allclose(expected, plain)
    assert step == 9 and seen >= {(False, False), (False, True), (True, False)}


# ---------------------------------------------------------------- the plain filter


SETTINGS: dict[str, Any] = {
    "no early phase": dict(early_phase=0.0),
    "no rule": dict(annealing="none"),
    "never uneven": dict(annealing_threshold=0.0),
}


@pytest.mark.proves(15)
@pytest.mark.parametrize("name", SETTINGS)
def test_without_annealing_it_is_the_plain_filter_text_for_text(name: str) -> None:
    common: Any = dict(reward=by_text(lambda t: digits("", t)), num_particles=9, step_delimiter="5", max_step_tokens=3)
    prompts = tiny.prompts(4)
    plain = tiny.decoder().search(prompts, ParticleFilter(**common), max_new_tokens=20, seed=5)
    search = EntropicParticleFilter(**common, **SETTINGS[name])
    for a, b in zip(plain, tiny.decoder().search(prompts, search, max_new_tokens=20, seed=5), strict=True):
        assert [c.token_ids for c in a.candidates] == [c.token_ids for c in b.candidates]
        assert [c.score for c in a.candidates] == [c.score for c in b.candidates]
        assert a.counters.model_tokens == b.counters.model_tokens


# ---------------------------------------------------------------- look-ahead


def measure(search: ParticleFilter | EntropicParticleFilter, runs: int) -> np.ndarray:
    """The weight of each text in each of many runs that are alike but for their random numbers. `[runs, texts]`"""
    cells = {text: i for i, text in enumerate(LM.texts("a", 4))}
    found = np.zeros((runs, len(cells)))
    for i, result in enumerate(LM.decoder.search(alike("a", "ab", runs), search, max_new_tokens=16)):
        for c in result.candidates:
            found[i, cells[c.text]] += c.hypothesis.weight
    return found


@pytest.mark.proves(15)
@pytest.mark.slow
def test_a_look_ahead_of_no_weight_is_the_plain_filter_in_distribution() -> None:
    """The copy that keeps the step it proposed is one among those that sample theirs; no text gains by it."""
    common: Any = dict(reward=by_text(value), num_particles=6, max_steps=4, **ONE_TOKEN)
    plain = measure(ParticleFilter(**common, resampling="multinomial"), 250)
    ahead = measure(
        EntropicParticleFilter(**common, resampling="multinomial", annealing="none", lookahead_weight=1e-12), 251
    )
    error = np.sqrt(plain.var(axis=0) / len(plain) + ahead.var(axis=0) / len(ahead)) + 1e-4
    z = (plain.mean(axis=0) - ahead.mean(axis=0)) / error
    assert np.abs(z).max() < 4.5 and np.square(z).mean() < 2


@pytest.mark.parametrize("weight", [1e-12, 0.5, 1.0])
def test_each_survivor_keeps_the_step_it_proposed_once(weight: float) -> None:
    """Of all copies of a particle one goes on with its proposal; the others, and they alone, sample a new step."""
    search = EntropicParticleFilter(
        reward=by_text(value), num_particles=10, max_steps=6, lookahead_weight=weight, **ONE_TOKEN
    )
    decoder = LM.new_decoder()
    (result,) = decoder.search("ab", search, max_new_tokens=16, seed=1)
    tiny.assert_all_returned(decoder.worker)
    grown = [e for e in result.trace.events if e["event"] == "grow"]
    end = {node: e for g in grown for node, e in zip(g["nodes"], g["ends"], strict=True)}
    rewards = [e for e in result.trace.events if e["event"] == "reward"]
    reward = {node: r for e in rewards for node, r in zip(e["nodes"], e["rewards"], strict=True)}
    parents = [set(g["parents"]) for g in grown]
    rounds = redrawn = 0
    for i, event in enumerate(result.trace.events):
        if event["event"] != "select":
            continue
        rounds += 1
        nodes, ancestors = event["nodes"], event["ancestors"]
        now, proposed = nodes[:10], nodes[10:]
        live = [j for j in range(10) if end[now[j]] is None]
        of = dict(zip(range(10, len(nodes)), live, strict=True))
        assert [reward[n] for n in proposed] and len(proposed) == len(live)
        named = [of.get(a, a) for a in ancestors]
        for a, copies in Counter(named).items():
            kept = sum(1 for b in ancestors if of.get(b) == a)
            assert kept == (1 if a in live else 0) and copies >= kept
        again = [now[a] for a in ancestors if a < 10 and a in live]
        redrawn += len(again)
        later = result.trace.events[i + 1]
        assert (later["parents"] if later["event"] == "grow" and again else []) == again
        if not i:
            continue
        logits = log_weights(np.array([reward[n] for n in now]), 1.0)
        coming = logits.copy()
        coming[live] = log_weights(np.array([reward[n] for n in proposed]), 1.0)
        plain = softmax(logits + weight * (coming - logits))
        if rounds >= 3 or 1 / (plain**2).sum() >= 5:
            np.testing.assert_allclose(event["weights"], plain, rtol=1e-9)
    assert rounds >= 3 and redrawn and parents


def test_a_proposal_whose_reward_fails_takes_its_particle_out() -> None:
    calls = 0

    def reward(text: str) -> float:
        nonlocal calls
        calls += 1
        return math.nan if text.endswith("bb") else 0.5

    lm = MarkovLM({"a": {"a": 0.5, "b": 0.5}, "b": {"a": 0.5, "b": 0.5}})
    search = EntropicParticleFilter(
        reward=by_text(reward), num_particles=16, max_steps=4, lookahead_weight=0.5, **ONE_TOKEN
    )
    (result,) = lm.decoder.search("a", search, max_new_tokens=16)
    assert result.error is None
    for event in result.trace.events:
        if event["event"] == "select":
            assert sum(event["weights"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("annealing", "linear"), ("annealing_threshold", -0.1), ("early_phase", 2), ("lookahead_weight", 1.5),
     ("resampling", "residual"), ("lookahead_weight", "1")],
)  # fmt: skip
def test_bad_settings_are_named(setting: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=setting):
        EntropicParticleFilter(**{"reward": by_text(len), setting: value})
