"""Perplexity consistency: the fit against planted mixtures, the mass against enumeration of all texts."""

import importlib.util
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from forktree import InvalidInput, PerplexityConsistency, Sample
from forktree.search.algorithms.rpc import WeibullMixture, answer_mass, fit_mixture, pruned
from forktree.search.answers import NO_ANSWER
from markov import EOS, MarkovLM

CHAIN = MarkovLM(
    {
        ":": {"x": 0.6, "y": 0.3, "n": 0.1},
        "x": {"a": 0.5, "b": 0.5},
        "y": {"a": 0.9, "c": 0.1},
        **{end: {EOS: 0.9, "z": 0.1} for end in "abc"},
        "n": {EOS: 1},
        "z": {EOS: 1},
    }
)


SAMPLE = st.tuples(st.integers(-1, 2), st.sampled_from("pqrs"), st.booleans())


def answer(text: str) -> str | None:
    return next((c for c in text if c in "abc"), None)


@pytest.mark.proves(66, 149)
@pytest.mark.parametrize(("share", "high", "low"), [(0.6, (8.0, 0.8), (2.0, 0.2)), (0.35, (12.0, 0.9), (3.0, 0.35))])
def test_a_planted_mixture_is_recovered(
    share: float, high: tuple[float, float], low: tuple[float, float]
) -> None:
    rng, n = np.random.default_rng(0), 4000
    first = rng.random(n) < share
    planted = [k_scale[1] * rng.weibull(k_scale[0], n) for k_scale in (high, low)]
    x = np.where(first, *planted)
    found = fit_mixture(x)
    assert found.share == pytest.approx(share, abs=0.05)
    np.testing.assert_allclose(found.scale, [high[1], low[1]], rtol=0.05)
    np.testing.assert_allclose(found.shape, [high[0], low[0]], rtol=0.15)
    mine = [s * stats.weibull_min.pdf(x, k, scale=c) for s, k, c in
            zip((found.share, 1 - found.share), found.shape, found.scale, strict=True)]  # fmt: skip
    np.testing.assert_allclose(found.densities(x), mine, rtol=1e-9)
    out = pruned(x)
    np.testing.assert_array_equal(out, (mine[0] < mine[1]) & (x < x.mean()))
    assert out[~first].mean() > 0.8 and out[first].mean() < 0.1


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=24))
def test_the_likeliest_sample_always_stays(x: list[float]) -> None:
    """Whatever the fit makes of them; few samples, and equal ones, all stay."""
    out = pruned(np.array(x))
    assert not out[int(np.argmax(x))]
    assert not (len(x) < 4 and out.any()) and not (len(set(x)) == 1 and out.any())


@pytest.mark.proves(66, 149)
@settings(deadline=None, max_examples=60)
@given(st.lists(SAMPLE, min_size=1, max_size=12), st.randoms())
def test_mass_counts_each_text_once_and_knows_no_order(samples: list[tuple[int, str, bool]], random: object) -> None:
    worth = {"p": 0.25, "q": 0.5, "r": 0.5, "s": 0.125}

    def mass(some: list[tuple[int, str, bool]]) -> dict[int, float]:
        groups, texts, kept = (list(x) for x in zip(*some, strict=True))
        found = answer_mass(np.array(groups), texts, np.array([worth[t] for t in texts]), np.array(kept))
        return dict(zip(groups, found, strict=True))

    distinct = {(g, t) for g, t, kept in samples if kept and g != NO_ANSWER}
    total = sum(worth[t] for _, t in distinct) or 1
    expected = {g: sum(worth[t] for h, t in distinct if h == g) / total for g, _, _ in samples}
    assert mass(samples) == pytest.approx(expected)
    shuffled = list(samples)
    random.shuffle(shuffled)
    assert mass(shuffled) == pytest.approx(expected)


@pytest.mark.proves(66, 149)
def test_with_many_samples_the_mass_is_that_of_all_texts() -> None:
    """Enumerated: the sum over an answer's texts of the exponential of the mean log-prob, EOS included."""
    texts = CHAIN.texts(":", 6)
    p = {t: math.exp(CHAIN.log_prob(":", t) / (len(t) + 1)) for t in texts}
    total = sum(p[t] for t in texts if answer(t))
    exact = {a: sum(p[t] for t in texts if answer(t) == a) / total for a in "abc"}
    search = PerplexityConsistency(answer=answer, num_samples=3000, prune=False)
    (result,) = CHAIN.decoder.search(":", search, max_new_tokens=6)
    assert {c.text for c in result.candidates} == set(texts), "rare texts came too"
    assert {answer(c.text): c.score for c in result.candidates} == pytest.approx({**exact, None: 0}, abs=1e-5)
    assert answer(result.text) == max(exact, key=exact.get)


def test_pruned_samples_have_no_mass() -> None:
    """From the candidates alone, by the formulas."""
    search = PerplexityConsistency(answer=answer, num_samples=64)
    (result,) = CHAIN.decoder.search(":", search, max_new_tokens=6, seed=3)
    plain = CHAIN.decoder.search(":", Sample(num_return_sequences=64), max_new_tokens=6, seed=3)[0]
    texts = [c.text for c in plain.candidates]
    assert sorted(texts) == sorted(c.text for c in result.candidates)
    p = {t: math.exp(CHAIN.log_prob(":", t) / (len(t) + 1)) for t in texts}
    x = np.array([p[t] for t in texts])
    out = set(np.array(texts)[pruned(x)].tolist())
    assert out, "something is left out here"
    mass = {a: sum(p[t] for t in set(texts) - out if answer(t) == a) for a in "abc"}
    total = sum(mass.values())
    for c in result.candidates:
        assert c.score == pytest.approx(mass[answer(c.text)] / total if answer(c.text) else 0, abs=1e-5)
    (votes,) = [e for e in result.trace.events if e["event"] == "vote"]
    assert votes["kept"].count(False) == pruned(x).sum()


def test_scipy_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"prune=True needs scipy: pip install 'forktree\[scipy\]'"):
        PerplexityConsistency(answer=answer)
    assert PerplexityConsistency(answer=answer, prune=False).num_samples == 64


def test_a_mixture_keeps_its_larger_mean_first() -> None:
    x = 0.1 + 0.9 * np.random.default_rng(1).random(50)
    found = fit_mixture(x)
    means = found.scale * [math.gamma(1 + 1 / k) for k in found.shape]
    assert means[0] >= means[1] and isinstance(found, WeibullMixture)
