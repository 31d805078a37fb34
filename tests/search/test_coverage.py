"""Coverage of repeated sampling, by enumeration of subsets and of texts."""

import itertools

import numpy as np
import pytest

from forktree import InvalidInput, Sample
from forktree.search.coverage import fit_coverage, pass_at_k
from markov import EOS, MarkovLM
from searches import over_seeds


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample() -> None:
    for n in range(1, 9):
        for c in range(n + 1):
            correct = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = [any(s) for s in itertools.combinations(correct, k)]
                assert pass_at_k(n, c, k) == pytest.approx(np.mean(subsets))


def test_pass_at_k_does_not_overflow() -> None:
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    assert pass_at_k(100_000, 50_000, 9) == pytest.approx(1 - 2**-9, abs=1e-4)


@pytest.mark.proves(76)
def test_coverage_of_samples_is_that_of_independent_ones() -> None:
    """The mean of pass@k over seeds, against 1 - (1 - p)^k; and the law's fit of it."""
    p, n, seeds = 0.2, 12, 150
    chain = MarkovLM({":": {"y": p, "n": 1 - p}, "y": {EOS: 1}, "n": {EOS: 1}})
    results = over_seeds(chain.decoder, ":", Sample(num_return_sequences=n), seeds, max_new_tokens=3)
    correct = [sum(c.text == "y" for c in r.candidates) for r in results]
    for k in (1, 3, 8, 12):
        each = [pass_at_k(n, c, k) for c in correct]
        assert np.mean(each) == pytest.approx(1 - (1 - p) ** k, abs=4 * np.std(each) / seeds**0.5 + 1e-9)


@pytest.mark.parametrize(("a", "b"), [(-2.5, -0.4), (-0.7, -1.1)])
def test_planted_coefficients_are_recovered(a: float, b: float) -> None:
    ks = [1, 2, 5, 10, 100, 1000]
    found = fit_coverage(ks, np.exp(a * np.array(ks, float) ** b))
    assert found == pytest.approx((a, b))
    assert fit_coverage([1, 2, 3, 4], [0.0, 0.2, 0.3, 1.0]) == fit_coverage([2, 3], [0.2, 0.3])


def test_what_cannot_be_counted_is_refused() -> None:
    for arguments, part in [((0, 0, 1), "num_samples"), ((5, 6, 1), "num_correct"), ((5, 2, 6), "k"), ((5, 2, 0), "k")]:
        with pytest.raises(InvalidInput, match=f"{part} must be"):
            pass_at_k(*arguments)
    for ks, coverage in [([1, 2], [0.5]), ([1, 2], [0.5, 1.5]), ([0, 1], [0.1, 0.2]), ([1, 2], [0.5, 1.0])]:
        with pytest.raises(InvalidInput, match="coverage must be"):
            fit_coverage(ks, coverage)
