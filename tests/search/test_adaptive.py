"""Adaptive self-consistency: what is sampled is a prefix of what a vote samples, and ends where its rule says."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from scipy import special

import tiny
from forktree import AdaptiveVote, InvalidInput, RewardError, Sample
from markov import EOS, MarkovLM, pushed
from searches import over_seeds

CHAIN = MarkovLM({":": {"a": 0.6, "b": 0.25, "c": 0.1, "n": 0.05}, **{end: {EOS: 1} for end in "abcn"}})


def answer(text: str) -> str | None:
    return None if text == "n" else text


def beta(said: list[str | None], newest: list[str | None]) -> float:
    a, b = ([c for _, c in Counter(s for s in said if s).most_common(2)] + [0, 0])[:2]
    return 1 - special.betainc(a + 1, b + 1, 0.5)


def top(said: list[str | None]) -> float:
    return max([c for s, c in Counter(said).items() if s], default=0) / len(said)


FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "beta": (dict(num_samples=40), beta),
    "beta by threes": (dict(num_samples=20, round_size=3, threshold=0.9), beta),
    "doubling": (
        dict(stopping="agreement", round_size=2, doubling=True, threshold=0.75, num_samples=27),
        lambda said, newest: top(said),
    ),
    "window": (dict(stopping="window", round_size=3, threshold=1.0, num_samples=20), lambda said, newest: top(newest)),
}


@pytest.mark.parametrize("name", FORMS)
def test_samples_are_those_of_a_vote_up_to_where_the_rule_holds(name: str) -> None:
    options, rule = FORMS[name]
    decoder, lengths = CHAIN.new_decoder(), []
    for seed in range(25):
        n = options["num_samples"]
        plain = decoder.search(":", Sample(num_return_sequences=n), max_new_tokens=3, seed=seed)[0].candidates
        said = [answer(c.text) for c in plain]
        taken = 0
        while taken < n:
            size = max(taken, options.get("round_size", 1)) if options.get("doubling") else options.get("round_size", 1)
            begin, taken = taken, min(n, taken + size)
            if rule(said[:taken], said[begin:taken]) >= options.get("threshold", 0.95):
                break
        search = AdaptiveVote(answer=answer, temperature=1.0, **options)
        (result,) = decoder.search(":", search, max_new_tokens=3, seed=seed)
        assert sorted(c.text for c in result.candidates) == sorted(c.text for c in plain[:taken])
        counts = Counter(s for s in said[:taken] if s)
        assert counts[result.text] == max(counts.values())
        assert result.best.score == pytest.approx(counts[result.text] / taken)
        lengths.append(taken)
        tiny.assert_all_returned(decoder.worker)
    assert len(set(lengths)) > 2, "the rule matters"


def test_fewer_samples_are_taken_by_what_enumeration_says() -> None:
    """The mean number of samples of the Beta rule, over all sequences of at most 6 answers."""
    chances, mean = pushed(CHAIN.texts(":", 3), answer), 0.0
    for said in itertools.product(chances, repeat=6):
        taken = next((i for i in range(1, 6) if beta(list(said[:i]), []) >= 0.85), 6)
        mean += taken * math.prod(chances[s] for s in said)
    seeds = 300
    search = AdaptiveVote(answer=answer, temperature=1.0, num_samples=6, threshold=0.85)
    found = [len(r.candidates) for r in over_seeds(CHAIN.decoder, ":", search, seeds, max_new_tokens=3)]
    assert np.mean(found) == pytest.approx(mean, abs=4 * np.std(found) / seeds**0.5)
    assert mean < 5


def test_dirichlet_stops_no_earlier_than_beta() -> None:
    for seed in range(20):
        searches = [AdaptiveVote(answer=answer, stopping=stopping) for stopping in ("beta", "dirichlet")]
        results = [CHAIN.decoder.search(":", search, max_new_tokens=3, seed=seed)[0] for search in searches]
        assert len(results[0].candidates) <= len(results[1].candidates)


def test_a_text_is_read_once_however_many_rounds_there_are() -> None:
    asked: list[str] = []
    words = MarkovLM.random("abcdefgh", end=0.1, seed=1)
    search = AdaptiveVote(answer=lambda text: asked.append(text) or text[:1], num_samples=12, threshold=1.0)
    (result,) = words.decoder.search("a", search, max_new_tokens=12)
    assert len(result.candidates) == 12 and sorted(asked) == sorted({c.text for c in result.candidates})


def test_answers_that_fail_cost_their_samples_even_in_the_first_round() -> None:
    def broken(text: str) -> str:
        if text != "b":
            raise ValueError("not b")
        return text

    for seed in range(5):
        (result,) = CHAIN.decoder.search(":", AdaptiveVote(answer=broken), max_new_tokens=3, seed=seed)
        assert result.text == "b" and all(
            isinstance(c.hypothesis.error, RewardError) == (c.text != "b") for c in result.candidates
        )


@pytest.mark.parametrize(
    ("setting", "value"),
    [("stopping", "alpha"), ("threshold", 0.0), ("threshold", 1.5), ("round_size", 0), ("num_samples", 0)],
)
def test_bad_settings_are_named(setting: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=f"{setting} must be"):
        AdaptiveVote(**{"answer": answer, setting: value})
