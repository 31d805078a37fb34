"""Verified generation of what is not text (Llasa): a verifier reads codes, here by their histogram."""

import math
from collections import Counter

import numpy as np
import pytest

from forktree import BestOfN, Decoder, IdReward
from markov import MarkovLM

CODES = MarkovLM.random("pqrs", seed=2, end=0.0)
TARGET = {1: 0.5, 3: 0.5}  # token ids: p and r, in equal parts


def likeness(prompt_ids: list[int], ids: list[int]) -> float:
    """1 less the distance of two histograms."""
    counts = Counter(ids)
    keys = {*counts, *TARGET}
    return 1 - sum(abs(counts[k] / max(1, len(ids)) - TARGET.get(k, 0.0)) for k in keys) / 2


@pytest.mark.proves(14)
def test_the_best_of_n_codes_is_as_good_as_enumeration_says_and_better_for_more() -> None:
    """Of independent samples: E[max] from the distribution of the verifier over all texts of four codes."""
    decoder = Decoder(CODES.model, num_slots=4096)
    worth = Counter()
    for text, p in CODES.texts("p", 4).items():
        worth[likeness([], CODES.ids(text))] += p
    values = np.array(sorted(worth))
    cdf = np.cumsum([worth[v] for v in values])
    means = []
    for n in (1, 4, 16):
        exact = values @ np.diff(np.concatenate([[0.0], cdf**n]))
        search = BestOfN(reward=IdReward(likeness), num_samples=n, temperature=1.0)
        found = [decoder.search([CODES.ids("p")], search, max_new_tokens=4, seed=s)[0].best.score for s in range(60)]
        assert np.mean(found) == pytest.approx(exact, abs=4 * np.std(found) / math.sqrt(60) + 1e-6)
        means.append(exact)
    assert means == sorted(means) and means[0] < means[-1]
