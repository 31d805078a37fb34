"""Votes as arithmetic: against counting in plain Python, enumeration of all bootstraps, and scipy's integrals."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats

from forktree.search.answers import NO_ANSWER
from forktree.search.votes import (
    best_of_majority,
    frequent,
    is_mode,
    majority_of_the_bests,
    ranked,
    stays_ahead,
    vote,
    worth_of_answers,
)

GROUPS = st.lists(st.integers(NO_ANSWER, 3), min_size=1, max_size=9)
REWARDS = st.integers(0, 8).map(lambda x: x / 8)


@st.composite
def rewarded(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Answers, and rewards of which some failed."""
    groups = draw(GROUPS)
    rewards = draw(st.lists(REWARDS | st.just(math.nan), min_size=len(groups), max_size=len(groups)))
    return renumbered(groups), np.array(rewards)


def renumbered(groups: list[int]) -> np.ndarray:
    """As `Answers` numbers them: by first occurrence."""
    order = [g for g in dict.fromkeys(groups) if g != NO_ANSWER]
    return np.array([NO_ANSWER if g == NO_ANSWER else order.index(g) for g in groups])


@settings(deadline=None, max_examples=60)
@given(GROUPS)
def test_a_vote_is_a_count(groups: list[int]) -> None:
    counts = Counter(groups)
    expected = [0 if g == NO_ANSWER else counts[g] / len(groups) for g in groups]
    np.testing.assert_allclose(vote(np.array(groups)), expected)


@settings(deadline=None, max_examples=60)
@given(rewarded())
def test_a_weighted_vote_is_a_sum(given_: tuple[np.ndarray, np.ndarray]) -> None:
    groups, weights = given_
    known = [(g, w) for g, w in zip(groups, weights, strict=True) if not math.isnan(w)]
    total = sum(w for _, w in known)
    expected = [0 if g == NO_ANSWER or not total else sum(w for h, w in known if h == g) / total for g in groups]
    np.testing.assert_allclose(vote(groups, weights), expected, atol=1e-12)


def test_a_vote_in_two_levels_gives_each_temperature_one_ballot() -> None:
    groups = np.array([0, 0, 0, 1, 1, 2, NO_ANSWER, NO_ANSWER])
    within = np.array([0.2, 0.2, 0.2, 0.7, 0.7, 0.7, 1.2, 1.2])
    np.testing.assert_allclose(vote(groups, within=within), [1 / 3] * 5 + [0] * 3)
    within = np.array([0.2, 0.2, 0.7, 0.7, 0.7, 0.9, 0.9, 0.9])  # one of 0 and two of 1 at 0.7: 1; a tie of none at 0.9
    np.testing.assert_allclose(vote(groups, within=within), [1 / 3] * 6 + [0] * 2)
    tie = np.array([0, 1, 1, 0, 0])  # at 5: 0 and 1 are even, 0 has more overall
    np.testing.assert_allclose(vote(tie, within=np.array([5, 5, 6, 7, 7])), [2 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3])


@settings(deadline=None, max_examples=60)
@given(rewarded(), st.integers(0, 3))
def test_ranking_is_by_share_count_weight_first_then_worth(given_: tuple[np.ndarray, np.ndarray], failed: int) -> None:
    groups, weights = given_
    shares = np.round(vote(groups), 1)
    broken = np.arange(len(groups)) < failed
    shares[broken], groups[broken] = math.nan, NO_ANSWER

    def key(i: int) -> tuple:
        mine = [j for j in range(len(groups)) if groups[j] == groups[i]]
        some = groups[i] != NO_ANSWER
        return (
            math.isnan(shares[i]),
            -shares[i] if shares[i] == shares[i] else 0,
            -len(mine) * some,
            -sum(w for w in weights[mine] if w == w) * some,
            min(mine),
            -weights[i] if weights[i] == weights[i] else math.inf,
            i,
        )

    order = ranked(groups, shares, weights=weights, worth=weights).tolist()
    assert order == sorted(range(len(groups)), key=key)


# ---------------------------------------------------------------- best of majority


@pytest.mark.proves(134)
@settings(deadline=None, max_examples=60)
@given(rewarded(), st.sampled_from([0.0, 0.2, 0.34, 0.5]), st.integers(1, 3), st.booleans())
def test_best_of_majority_is_the_best_of_what_is_frequent(
    given_: tuple[np.ndarray, np.ndarray], least: float, k: int, highest: bool
) -> None:
    groups, rewards = given_
    answers = [g for g in dict.fromkeys(groups.tolist()) if g != NO_ANSWER]
    often = [g for g in answers if (groups == g).mean() >= least]
    often = often if len(often) >= k else answers
    assert frequent(groups, least, k=k).tolist() == [g in often for g in groups]
    worth = {}
    for g in often:
        known = [r for h, r in zip(groups, rewards, strict=True) if h == g and r == r]
        if known:
            worth[g] = max(known) if highest else sum(known) / len(known)
    chosen = best_of_majority(groups, rewards, least, k, highest=highest)
    values = [worth[groups[i]] for i in chosen]
    assert len(set(groups[chosen])) == len(chosen) == min(k, len(worth))
    np.testing.assert_allclose(values, sorted(worth.values(), reverse=True)[:k])
    for i in chosen:
        assert rewards[i] == np.nanmax(rewards[groups == groups[i]]), "an answer is shown by its best text"


@pytest.mark.proves(134)
@settings(deadline=None, max_examples=60)
@given(rewarded())
def test_best_of_majority_has_best_of_n_and_majority_as_its_limits(given_: tuple[np.ndarray, np.ndarray]) -> None:
    groups, rewards = given_
    known = (groups != NO_ANSWER) & ~np.isnan(rewards)
    best = best_of_majority(groups, rewards, 0, highest=True)
    assert len(best) == known.any() and (rewards[best] == rewards[known].max(initial=-1)).all()
    share = vote(groups)
    winners = set(groups[share == share.max()].tolist()) - {NO_ANSWER}
    if len(winners) == 1 and known[groups == min(winners)].any():
        assert set(groups[best_of_majority(groups, rewards, share.max())].tolist()) == winners


def test_worth_of_answers() -> None:
    groups, rewards = np.array([0, 1, 0, NO_ANSWER, 2]), np.array([0.2, 0.9, 0.6, 1.0, math.nan])
    np.testing.assert_allclose(worth_of_answers(groups, rewards), [0.4, 0.9, 0.4, math.nan, math.nan])
    np.testing.assert_allclose(worth_of_answers(groups, rewards, highest=True), [0.6, 0.9, 0.6, math.nan, math.nan])


# ---------------------------------------------------------------- majority of the bests


@settings(deadline=None, max_examples=60)
@given(rewarded().filter(lambda given_: len(given_[0]) <= 5), st.integers(1, 4))
def test_majority_of_the_bests_is_the_distribution_over_all_bootstraps(
    given_: tuple[np.ndarray, np.ndarray], m: int
) -> None:
    groups, rewards = given_
    part = [i for i in range(len(groups)) if groups[i] != NO_ANSWER and rewards[i] == rewards[i]]
    mass = Counter()
    for sample in itertools.product(part, repeat=m):
        best = [i for i in part if rewards[i] == max(rewards[j] for j in sample)]
        for i in best:  # those of one reward are even, whoever was sampled
            mass[groups[i]] += 1 / len(best) / len(part) ** m
    expected = [mass[g] if g != NO_ANSWER else 0 for g in groups]
    np.testing.assert_allclose(majority_of_the_bests(groups, rewards, m), expected, atol=1e-12)


def test_majority_of_the_bests_runs_from_majority_to_best_of_n() -> None:
    groups, rewards = np.array([0, 0, 0, 1, 1, 2]), np.array([0.1, 0.2, 0.3, 0.5, 0.4, 0.9])
    np.testing.assert_allclose(majority_of_the_bests(groups, rewards, 1), vote(groups))
    np.testing.assert_allclose(majority_of_the_bests(groups, rewards, 500), [0, 0, 0, 0, 0, 1], atol=1e-12)


# ---------------------------------------------------------------- when to stop


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30), max_size=5))
def test_stays_ahead_is_the_incomplete_beta_function(counts: list[int]) -> None:
    a, b = [*sorted(counts, reverse=True), 0, 0][:2]
    assert stays_ahead(np.array(counts, int)) == pytest.approx(1 - special.betainc(a + 1, b + 1, 0.5), abs=1e-12)


COUNTS = [(1,), (3, 1), (5, 5), (2, 2, 2), (9, 4, 4, 1), (30, 28, 2), (40, 1, 1, 1, 1, 1, 1), (120, 90)]


@pytest.mark.parametrize("counts", COUNTS)
def test_is_mode_is_the_dirichlet_probability_of_the_leader(counts: tuple[int, ...]) -> None:
    """By scipy's quadrature over Gamma variables; with two answers it is the Beta rule."""
    a, *rest = sorted(counts, reverse=True)
    found = is_mode(np.array(counts))
    if len(counts) > 1:
        exact, _ = integrate.quad(
            lambda x: stats.gamma.pdf(x, a + 1) * np.prod([stats.gamma.cdf(x, c + 1) for c in rest]), 0, 20 + 4 * a,
            epsabs=1e-11, limit=400,
        )
        assert found == pytest.approx(exact, abs=1e-7)
    if len(counts) <= 2:
        assert found == pytest.approx(stays_ahead(np.array(counts)), abs=1e-9)
    if len(set(counts)) == 1 and len(counts) > 1:
        assert found == pytest.approx(1 / len(counts), abs=1e-9)
