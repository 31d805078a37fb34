"""Minimum Bayes risk: similarities against their formulas in plain Python, and what the most similar text must be."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forktree import Greedy, InvalidInput, MinimumBayesRisk, RewardError, Sample, SearchResult
from forktree.search.algorithms.mbr import chrf, expected_similarity, token_f1
from markov import EOS, MarkovLM

CHAIN = MarkovLM.random("abcdef", spread=0.7, seed=3)
COIN = MarkovLM({":": {"h": 0.55, "t": 0.45}, "h": {EOS: 1}, "t": {EOS: 1}})
TEXT = st.text(alphabet="ab c", max_size=9)


def run(search: MinimumBayesRisk, *, chain: MarkovLM = CHAIN, seed: int = 0) -> SearchResult:
    prompt = chain.characters[0]
    return chain.decoder.search(prompt, search, max_new_tokens=10, seed=seed)[0]


@settings(deadline=None, max_examples=60)
@given(TEXT, TEXT)
def test_chrf_is_its_formula(a: str, b: str) -> None:
    x, y = a.replace(" ", ""), b.replace(" ", "")
    precisions, recalls = [], []
    for n in range(1, 7):
        mine, theirs = ([t[i : i + n] for i in range(len(t) - n + 1)] for t in (x, y))
        if mine and theirs:
            hits = sum(min(mine.count(g), theirs.count(g)) for g in set(mine))
            precisions.append(hits / len(mine))
            recalls.append(hits / len(theirs))
    p, r = (float(np.mean(v)) if v else 0.0 for v in (precisions, recalls))
    expected = 5 * p * r / (4 * p + r) if p + r else 0.0
    assert chrf(a, b) == pytest.approx(1.0 if x == y else expected)


@settings(deadline=None, max_examples=60)
@given(TEXT, TEXT)
def test_token_f1_is_the_harmonic_mean_of_precision_and_recall(a: str, b: str) -> None:
    x, y = a.split(), b.split()
    hits = sum((Counter(x) & Counter(y)).values())
    expected = 0.0 if not hits else 2 / (len(x) / hits + len(y) / hits)
    assert token_f1(a, b) == pytest.approx(1.0 if not x and not y else expected)


@settings(deadline=None, max_examples=60)
@given(TEXT, TEXT)
def test_similarities_lie_in_the_unit_interval_and_know_equal_texts(a: str, b: str) -> None:
    for similarity in (chrf, token_f1):
        assert 0 <= similarity(a, b) <= 1 + 1e-12 and similarity(a, a) == pytest.approx(1)


@pytest.mark.proves(79)
@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["aab", "abb", "ccc", "cab"]), min_size=1, max_size=8))
def test_the_mean_is_over_the_pool_each_text_as_often_as_it_came(texts: list[str]) -> None:
    found, errors = expected_similarity(texts, chrf)
    np.testing.assert_allclose(found, [np.mean([chrf(a, b) for b in texts]) for a in texts])
    assert errors == [None] * len(texts)
    equality, _ = expected_similarity(texts, lambda a, b: a == b)
    counts = Counter(texts)
    np.testing.assert_allclose(equality, [counts[t] / len(texts) for t in texts])  # majority


@pytest.mark.proves(79)
@pytest.mark.parametrize("seed", range(4))
def test_the_pool_is_one_greedy_text_and_samples(seed: int) -> None:
    result = run(MinimumBayesRisk(num_samples=9), seed=seed)
    greedy = CHAIN.decoder.search("a", Greedy(), max_new_tokens=10)[0].text
    plain = Sample(num_return_sequences=9, temperature=0.8, min_p=0.1)
    samples = [c.text for c in CHAIN.decoder.search("a", plain, max_new_tokens=10, seed=seed)[0].candidates]
    pool = [greedy, *samples[1:]]
    assert sorted(c.text for c in result.candidates) == sorted(pool)
    exact = {t: np.mean([chrf(t, other) for other in pool]) for t in pool}
    assert [c.score for c in result.candidates] == pytest.approx(sorted((exact[t] for t in pool), reverse=True))
    assert exact[result.text] == pytest.approx(max(exact.values()))
    unhedged = run(MinimumBayesRisk(num_samples=9, hedged=False), seed=seed)
    assert sorted(c.text for c in unhedged.candidates) == sorted(samples)


@pytest.mark.proves(79)
def test_one_sample_is_greedy_and_two_tie_to_it() -> None:
    greedy = CHAIN.decoder.search("a", Greedy(), max_new_tokens=10)[0].text
    for seed in range(6):
        assert run(MinimumBayesRisk(num_samples=1), seed=seed).text == greedy
        assert run(MinimumBayesRisk(num_samples=2, similarity=token_f1), seed=seed).text == greedy


@pytest.mark.proves(79)
def test_a_text_that_came_twice_wins() -> None:
    search = MinimumBayesRisk(num_samples=7, similarity=lambda a, b: a == b, temperature=1.0)
    for seed in range(5):
        result = run(search, chain=COIN, seed=seed)
        counts = Counter(c.text for c in result.candidates)
        assert result.text == max(counts, key=counts.get)


def test_a_comparison_that_fails_is_left_out_and_a_text_without_any_comes_last() -> None:
    def similarity(a: str, b: str) -> float:
        if a == "t":
            raise ValueError("no tails")
        return math.nan if b == "t" else 0.5

    (result,) = COIN.decoder.search(":", MinimumBayesRisk(num_samples=9, similarity=similarity), max_new_tokens=4)
    assert result.text == "h" and result.best.score == 0.5 and result.best.hypothesis.error is None
    failed = [c for c in result.candidates if c.text == "t"]
    assert failed and result.candidates[-len(failed) :] == failed
    for c in failed:
        assert isinstance(c.hypothesis.error, RewardError) and "raised ValueError: no tails" in str(c.hypothesis.error)
        assert math.isnan(c.score)
    search = MinimumBayesRisk(similarity=lambda a, b: math.nan)
    (result,) = COIN.decoder.search(":", search, max_new_tokens=4)
    assert isinstance(result.error, RewardError) and "it gave nan" in str(result.error)


@pytest.mark.parametrize("options", [dict(similarity="bleu"), dict(similarity=3)])
def test_bad_settings_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="similarity must be chrf, token-f1 or a function of two texts, got"):
        MinimumBayesRisk(**options)
