"""How leaves of a tree of steps are continued: each rule against its pseudocode, or all that could have been chosen."""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from scipy.cluster import hierarchy

from forktree.search import allocation
from forktree.search.allocation import (
    balanced_counts,
    beam_counts,
    clusters,
    ngram_counts,
    step_beam_counts,
    subtree_counts,
    thrifty_leaves,
)

SEEDS = pytest.mark.parametrize("seed", range(30))


def scored(rng: np.random.Generator, n: int, failures: float = 0.15) -> np.ndarray:
    """Scores of which some are equal and some are NaN, but not all."""
    scores = rng.choice(np.linspace(0, 1, 9), n)
    scores[rng.random(n) < failures] = np.nan
    scores[rng.integers(n)] = rng.random()
    return scores


# ---------------------------------------------------------------- REBASE


@SEEDS
def test_balanced_counts_are_those_of_the_papers_loop(seed: int) -> None:
    """Nodes by reward; each gets the rounded-up share of what is left. In exact fractions of the same exponentials."""
    rng = np.random.default_rng(seed)
    n, width, temperature = int(rng.integers(1, 12)), int(rng.integers(1, 40)), float(rng.choice([0.05, 0.2, 1.0]))
    rewards = scored(rng, n)
    weight = [Fraction(0) if math.isnan(r) else Fraction(math.exp(r / temperature)) for r in rewards]
    expected, left, total = [0] * n, width, sum(weight)
    for i in sorted(range(n), key=lambda i: (-weight[i], i)):
        if left > 0 and weight[i]:
            expected[i] = math.ceil(left * weight[i] / total)
            left, total = left - expected[i], total - weight[i]
    counts = balanced_counts(rewards, width, temperature)
    assert counts.tolist() == expected
    assert counts.sum() == width and not counts[np.isnan(rewards)].any()
    order = np.argsort(-np.nan_to_num(rewards, nan=-1), kind="stable")
    assert (np.diff(counts[order]) <= 0).all(), "a better leaf has no fewer"


def test_balanced_counts_at_the_ends_of_the_temperature() -> None:
    rewards = np.array([0.3, 0.9, 0.8999, 0.1])
    assert balanced_counts(rewards, 7, 1e-9).tolist() == [0, 7, 0, 0]
    assert balanced_counts(rewards, 8, 1e9).tolist() == [2, 2, 2, 2]
    assert balanced_counts(np.full(3, np.nan), 8, 1.0).tolist() == [0, 0, 0]
    assert balanced_counts(rewards, 0, 1.0).tolist() == [0, 0, 0, 0]
    assert balanced_counts(np.array([-5.0, 2000.0]), 3, 0.2).tolist() == [0, 3]


# ---------------------------------------------------------------- beams


@SEEDS
def test_beam_counts_are_copies_in_turns(seed: int) -> None:
    """search-and-learn: the top n / m leaves, and cyclic copies of that list up to n."""
    rng = np.random.default_rng(seed)
    n, total, keep = int(rng.integers(1, 20)), int(rng.integers(1, 20)), int(rng.integers(1, 8))
    scores = scored(rng, n)
    best = sorted((i for i in range(n) if not math.isnan(scores[i])), key=lambda i: (-scores[i], i))[:keep]
    copies = [leaf for leaf, _ in zip(itertools.cycle(sorted(best)), range(total), strict=False)]
    assert beam_counts(scores, total, keep).tolist() == [copies.count(i) for i in range(n)]
    assert beam_counts(np.full(3, np.nan), 4, 2).tolist() == [0, 0, 0]


@SEEDS
def test_each_subtree_goes_on_from_its_best_or_is_over(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width, trees = int(rng.integers(1, 5)), rng.permutation(6)[: int(rng.integers(1, 5))]
    subtree = np.repeat(np.sort(trees), width)
    scores, ended = scored(rng, len(subtree)), rng.random(len(subtree)) < 0.4
    expected = []
    for tree in np.sort(trees):
        leaves = [i for i in range(len(subtree)) if subtree[i] == tree]
        best = max(leaves, key=lambda i: (-math.inf if math.isnan(scores[i]) else scores[i], -i))
        expected += [int(ended[i]) if ended[best] else width * (i == best) for i in leaves]
    assert subtree_counts(scores, ended, subtree, width).tolist() == expected


@SEEDS
def test_a_step_beam_keeps_its_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, keep, width = int(rng.integers(1, 12)), int(rng.integers(0, 6)), int(rng.integers(1, 6))
    scores, ended = scored(rng, n), rng.random(n) < 0.4
    best = sorted(range(n), key=lambda i: (math.isnan(scores[i]), -np.nan_to_num(scores[i]), i))[:keep]
    expected = [(1 if ended[i] else width) if i in best else 0 for i in range(n)]
    assert step_beam_counts(scores, ended, keep, width).tolist() == expected


# ---------------------------------------------------------------- ETS


def worth(kept: Sequence[int], value: np.ndarray, paths: list, cluster: np.ndarray, b: float, d: float) -> float:
    """Equation 4 of ETS, as it is written."""
    nodes = {node for path in paths for node in path}
    above = {node for i in kept for node in paths[i]}
    covered = len({cluster[i] for i in kept}) / len(set(cluster.tolist()))
    return sum(value[i] for i in kept) - b * (len(above) + len(kept)) / (len(nodes) + len(paths)) + d * covered


def tree(rng: np.random.Generator, leaves: int, depth: int) -> list[list[int]]:
    """The nodes above each leaf of a random tree, root first."""
    paths, number = [[-1] for _ in range(leaves)], 0
    for _ in range(depth):
        groups: dict[tuple, int] = {}
        for path in paths:
            key = (*path, int(rng.integers(3)))
            number += key not in groups
            path.append(groups.setdefault(key, number))
    return paths


def case(seed: int, most: int, least: int = 1) -> tuple:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(least, most + 1))
    counts = rng.multinomial(16, rng.dirichlet(np.full(n, 0.5)))
    cluster = np.unique(rng.integers(max(1, n // 2), size=n), return_inverse=True)[1]
    b, d = rng.choice([0.0, 0.3, 1.0, 3.0]), rng.choice([0.0, 0.5, 1.5])
    return counts / 16, tree(rng, n, int(rng.integers(4))), cluster, float(b), float(d)


@pytest.mark.proves(6)
@pytest.mark.parametrize("seed", range(60))
def test_thrifty_leaves_are_the_best_of_all_sets(seed: int) -> None:
    value, paths, cluster, b, d = case(seed, 9)
    sets = [s for r in range(1, len(value) + 1) for s in itertools.combinations(range(len(value)), r)]
    best = max(worth(s, value, paths, cluster, b, d) for s in sets)
    kept = np.flatnonzero(thrifty_leaves(value, paths, cluster, b, d)).tolist()
    assert worth(kept, value, paths, cluster, b, d) == pytest.approx(best, abs=1e-8)
    for i in set(range(len(value))) - set(kept):
        assert worth([*kept, i], value, paths, cluster, b, d) < best - 1e-9, "nothing could be added for nothing"


@pytest.mark.parametrize("seed", range(4))
def test_thrifty_leaves_are_exact_up_to_twenty(seed: int) -> None:
    """Against all 2^n sets at once: a group counts where a mask meets it."""
    value, paths, cluster, b, d = case(seed, 20, least=18 if seed else 20)
    b, d, n = max(b, 1.0), max(d, 1.5), len(value)
    sets = np.arange(1 << n)
    nodes = {node for path in paths for node in path}
    groups = [(-b / (len(nodes) + n), [i for i in range(n) if node in paths[i]]) for node in nodes]
    groups += [(d / (cluster.max() + 1), np.flatnonzero(cluster == c)) for c in range(cluster.max() + 1)]
    groups += [(float(value[i]) - b / (len(nodes) + n), [i]) for i in range(n)]
    total = np.zeros(1 << n)
    for price, members in groups:
        total += price * ((sets & sum(1 << int(i) for i in members)) > 0)
    kept = np.flatnonzero(thrifty_leaves(value, paths, cluster, b, d)).tolist()
    assert worth(kept, value, paths, cluster, b, d) == pytest.approx(total[1:].max(), abs=1e-8)


@pytest.mark.parametrize("leaves", [1, 7, 30])
def test_thrifty_leaves_at_the_ends_of_their_weights(leaves: int) -> None:
    rng = np.random.default_rng(leaves)
    value, paths = rng.dirichlet(np.ones(leaves)) * (rng.random(leaves) < 0.7), tree(rng, leaves, 3)
    cluster = np.arange(leaves)
    assert thrifty_leaves(value, paths, cluster, 0.0, 0.0).all(), "without a price of memory all stay"
    (only,) = np.flatnonzero(thrifty_leaves(value, paths, cluster, 1e6, 0.0))
    if leaves < 20:
        assert value[only] == value.max(), "all paths are of one length"


@pytest.mark.parametrize("seed", range(20))
def test_many_leaves_are_thinned_as_long_as_that_gains(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "EXACT_LEAVES", 0)
    value, paths, cluster, b, d = case(seed, 40, least=2)
    n = len(value)
    kept = set(np.flatnonzero(thrifty_leaves(value, paths, cluster, b, d)).tolist())
    found = worth(sorted(kept), value, paths, cluster, b, d)
    assert kept and found >= worth(range(n), value, paths, cluster, b, d) - 1e-9
    for i in range(n):
        other = kept ^ {i}
        assert not other or worth(sorted(other), value, paths, cluster, b, d) <= found + 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_clusters_are_those_of_average_linkage(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 15))
    vectors = rng.random((4, 6))[rng.integers(4, size=n)] + rng.normal(0, rng.choice([0.01, 0.1, 0.3]), (n, 6))
    links = hierarchy.linkage(vectors, "average", metric="cosine")
    expected = hierarchy.fcluster(links, 0.05, "distance")
    found = clusters(vectors, 0.05)
    assert set(found) == set(range(found.max() + 1))
    same = found[:, None] == found
    np.testing.assert_array_equal(same, expected[:, None] == expected)


def test_clusters_of_what_has_no_direction() -> None:
    assert clusters(np.zeros((1, 3)), 0.05).tolist() == [0]
    assert clusters(np.array([[0.0, 0], [1, 0], [0, 0], [2, 0]]), 0.05).tolist() == [0, 1, 2, 1]


def test_ngrams_are_counted() -> None:
    counts = ngram_counts([np.array([5, 7, 5, 7], np.int32), np.array([7], np.int32), np.array([], np.int32)])
    assert counts.shape == (3, 4) and counts.sum(axis=1).tolist() == [7, 1, 0]
    assert sorted(counts[0].tolist()) == [1, 2, 2, 2] and counts[1].max() == 1
