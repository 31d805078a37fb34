"""Particle Gibbs and parallel tempering: what a reference may do, and the exact posterior in the long run."""

import math
from typing import Any

import numpy as np
import pytest

import tiny
from forktree import InvalidInput, SearchResult
from forktree.search import ParallelTempering, ParticleGibbs
from markov import MarkovLM
from searches import alike, by_text, traced_tokens

STEPS = 3
LM = MarkovLM({"a": {"a": 0.3, "b": 0.7}, "b": {"a": 0.6, "b": 0.4}})  # no text ends before its last step
ENDING = MarkovLM.random("ab", seed=2, spread=2.0, end=0.25)
ONE_TOKEN = dict(step_delimiter="", max_step_tokens=1, temperature=1.0)


def value(text: str) -> float:
    """Between 0.1 and 0.9, different for most texts."""
    return 0.1 + 0.8 * ((5 * sum((i + 2) * ord(c) ** 2 for i, c in enumerate(text)) + 3) % 23) / 22


def of_kind(result: SearchResult, kind: str) -> list[dict[str, Any]]:
    return [e for e in result.trace.events if e["event"] == kind]


def references(result: SearchResult, lm: MarkovLM) -> list[list[str]]:
    """The texts of the references after every sweep."""
    said = lambda node: "".join(lm.names[t] for t in traced_tokens(result.trace, node))  # noqa: E731
    return [[said(node) for node in event["nodes"]] for event in of_kind(result, "reference")]


def mild(text: str) -> float:
    """Between 0.3 and 0.7, so that no text of the posterior is rare."""
    return (value(text) - 0.5) / 2 + 0.5


@pytest.mark.proves(11)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("search", "temperature"),
    [
        (ParticleGibbs(reward=by_text(mild), num_particles=3, num_iterations=60, max_steps=STEPS, **ONE_TOKEN), 1.0),
        (
            ParallelTempering(
                reward=by_text(mild),
                num_particles=2,
                num_iterations=60,
                max_steps=STEPS,
                num_chains=2,
                temperature_ratio=3.0,
                weight_temperature=0.7,
                **ONE_TOKEN,
            ),
            0.7,
        ),
    ],
    ids=["gibbs", "tempering"],
)
def test_references_have_the_exact_posterior(search: ParticleGibbs, temperature: float) -> None:
    """Few particles, many sweeps, independent runs: p(x) prod odds^(1 / T) for every chain's T, text by text."""
    runs, burn_in = 12, 15
    lm = MarkovLM({"a": {"a": 0.7, "b": 0.3}, "b": {"a": 0.6, "b": 0.4}})
    results = lm.decoder.search(alike("a", "ab", runs), search, max_new_tokens=STEPS)
    prior = lm.texts("a", STEPS)
    for chain, heat in enumerate(search.weight_temperatures):
        odds = {t: math.prod(mild(t[: i + 1]) / (1 - mild(t[: i + 1])) for i in range(STEPS)) for t in prior}
        exact = {t: p * odds[t] ** (1 / heat) for t, p in prior.items()}
        exact = {t: g / sum(exact.values()) for t, g in exact.items()}
        assert min(exact.values()) > 0.03
        shares = np.zeros((runs, len(exact)))
        for i, result in enumerate(results):
            texts = [sweep[chain] for sweep in references(result, lm)[burn_in:]]
            shares[i] = [texts.count(t) / len(texts) for t in exact]
        error = shares.std(axis=0, ddof=1) / math.sqrt(runs) + 1e-3
        z = (shares.mean(axis=0) - np.array(list(exact.values()))) / error
        assert np.abs(z).max() < 4.5, (chain, np.abs(z).max())
    assert search.weight_temperatures[0] == temperature


@pytest.mark.proves(11)
@pytest.mark.parametrize("lm", [LM, ENDING], ids=["one length", "many lengths"])
@pytest.mark.parametrize("fixed", [1, 2])
def test_a_reference_takes_part_as_it_was(lm: MarkovLM, fixed: int) -> None:
    """At every step it stands where it stood then, with its reward of then; its text is among the sweep's texts."""
    search = ParticleGibbs(
        reward=by_text(value), num_particles=5, num_iterations=4, num_ref_particles=fixed, max_steps=5, **ONE_TOKEN
    )
    decoder = lm.new_decoder()
    (result,) = decoder.search("ab", search, max_new_tokens=16, seed=3)
    tiny.assert_all_returned(decoder.worker)
    reward, path, sweep, previous, step = {}, {}, 0, [], 0
    for event in result.trace.events:
        if event["event"] == "grow":
            path |= {n: [*path.get(p, []), n] for n, p in zip(event["nodes"], event["parents"], strict=True)}
        elif event["event"] == "reward":
            reward |= dict(zip(event["nodes"], event["rewards"], strict=True))
        elif event["event"] == "reference":
            sweep, previous, step = sweep + 1, event["nodes"], 0
        elif event.get("why") == "resampling":
            step += 1
            if sweep:
                then = [path[node][: step][-1] for node in previous]
                assert event["nodes"][-fixed:] == then
            logits = np.array([math.log(reward[n] / (1 - reward[n])) for n in event["nodes"]])
            np.testing.assert_allclose(event["weights"], np.exp(logits) / np.exp(logits).sum(), rtol=1e-9)
    assert sweep == 4
    texts = [c.text for c in result.candidates]
    assert len(texts) == 4 * 5
    for sweep_references in references(result, lm)[:-1]:
        for text in sweep_references:
            assert texts.count(text) >= 2, "it was a text of its own sweep, and is one of the next"
    assert sum(c.hypothesis.weight for c in result.candidates) == pytest.approx(1)
    for c in result.candidates:
        assert c.hypothesis.step_rewards[: len(c.text)] == [value(c.text[: i + 1]) for i in range(len(c.text))]
        ended = c.hypothesis.finish_reason == "eos"
        assert c.hypothesis.log_prob == pytest.approx(lm.log_prob("ab", c.text, ended=ended), abs=1e-4)
        assert len(c.text) + ended <= 5


@pytest.mark.proves(11)
def test_a_reward_of_the_end_does_not_decide_the_beginning() -> None:
    """Only whole texts differ in their rewards: until then a reference weighs as much as anybody."""
    search = ParticleGibbs(
        reward=by_text(lambda t: (0.999 if t == "bbb" else 0.01) if len(t) == STEPS else 0.5),
        num_particles=6,
        num_iterations=3,
        max_steps=STEPS,
        **ONE_TOKEN,
    )
    (result,) = LM.decoder.search("a", search, max_new_tokens=STEPS)
    selects = [e for e in of_kind(result, "select") if e["why"] == "resampling"]
    assert len(selects) == 3 * (STEPS - 1)
    for event in selects:
        np.testing.assert_allclose(event["weights"], 1 / 6)


def test_chains_exchange_references_and_one_chain_is_particle_gibbs() -> None:
    common: Any = dict(reward=by_text(value), num_particles=4, num_iterations=5, max_steps=STEPS, **ONE_TOKEN)
    plain = LM.decoder.search("a", ParticleGibbs(**common), max_new_tokens=STEPS, seed=4)[0]
    one = LM.decoder.search("a", ParallelTempering(**common, num_chains=1), max_new_tokens=STEPS, seed=4)[0]
    assert [c.token_ids for c in one.candidates] == [c.token_ids for c in plain.candidates]
    search = ParallelTempering(**common, num_chains=3, temperature_ratio=4.0, weight_temperature=0.5)
    np.testing.assert_allclose(search.weight_temperatures, [0.5, 2.0, 8.0])
    decoder = LM.new_decoder()
    (several,) = decoder.search("a", search, max_new_tokens=STEPS, seed=4)
    tiny.assert_all_returned(decoder.worker)
    assert len(several.candidates) == 5 * 4 and all(len(texts) == 3 for texts in references(several, LM))
    origins = []
    last = None
    for event in several.trace.events:
        if event["event"] == "select" and event["why"] == "first chain":
            assert len(event["ancestors"]) == 4
        if event["event"] == "grow":
            last = event
        origins.append(last)
    scores = [c.score for c in several.candidates]
    assert scores == sorted(scores, reverse=True)


def test_a_failed_reward_leaves_a_sweep_to_its_reference() -> None:
    """Whatever is new fails: the reference goes on alone, and is the only text with a weight."""
    known: set[str] = set()
    sweep = 0

    def reward(text: str) -> float:
        if sweep == 0:
            known.add(text)
            return 0.5
        return math.nan

    search = ParticleGibbs(reward=by_text(reward), num_particles=2, num_iterations=1, max_steps=2, **ONE_TOKEN)
    assert LM.decoder.search("a", search, max_new_tokens=2)[0].error is None
    calls = 0

    def later(text: str) -> float:
        nonlocal calls
        calls += 1
        return 0.5 if calls <= 4 else math.nan  # two particles of two steps, then nothing any more

    search = ParticleGibbs(reward=by_text(later), num_particles=2, num_iterations=3, max_steps=2, **ONE_TOKEN)
    (result,) = LM.decoder.search("a", search, max_new_tokens=2)
    assert result.error is None and len(result.candidates) == 6
    first = references(result, LM)[0][0]
    assert [texts[0] for texts in references(result, LM)] == [first] * 3


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        (ParticleGibbs, "num_iterations", 0),
        (ParticleGibbs, "num_ref_particles", 16),
        (ParticleGibbs, "num_ref_particles", 0),
        (ParallelTempering, "num_chains", 0),
        (ParallelTempering, "temperature_ratio", 1.0),
        (ParallelTempering, "weight_temperature", 0.0),
    ],
)
def test_bad_settings_are_named(kind: Any, setting: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=setting):
        kind(**{"reward": by_text(len), setting: value})
