"""How often each leaf of a tree of steps is continued: arrays in, counts out.

A leaf is a text that has just grown by a step. Counts are int64 `[N]`, of continuations of each of N leaves; 0 prunes
it. Scores are fp64 `[N]`, higher is better, NaN where the reward failed: such a leaf is continued only if a rule says
so. No rule continues what has ended: of that, 1 keeps it as it is.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from forktree.search.selection import best_first
from forktree.types import BoolArray, Float64Array, Int32Array, Int64Array

ROUNDING = 1e-9  # a share this little above an integer is that integer
EXACT_LEAVES = 20  # so many leaves are chosen among exactly


def beam_counts(scores: Float64Array, total: int, keep: int) -> Int64Array:
    """The best `keep` leaves are copied in turns, in their own order, until there are `total` (search-and-learn)."""
    best = best_first(scores)[:keep]
    best = np.sort(best[~np.isnan(scores[best])])
    return np.bincount(np.resize(best, total) if len(best) else best, minlength=len(scores))


def subtree_counts(scores: Float64Array, ended: BoolArray, subtree: Int64Array, width: int) -> Int64Array:
    """In each subtree the best leaf is continued `width` times; if that has ended, so has the subtree (DVTS).

    Args:
        scores: of the leaves of subtrees that are searched on, `[N]`.
        ended: whether each one's text is over, `[N]`.
        subtree: the number of each one's subtree, `[N]`.
        width: continuations of a best leaf.

    Returns:
        Counts; of a subtree that has ended, the leaves that have ended themselves stay.
    """
    counts = np.zeros(len(scores), np.int64)
    for number in np.unique(subtree):
        members = np.flatnonzero(subtree == number)
        best = members[best_first(scores[members])[0]]
        if ended[best]:
            counts[members] = ended[members]
        else:
            counts[best] = width
    return counts


def step_beam_counts(scores: Float64Array, ended: BoolArray, keep: int, width: int) -> Int64Array:
    """The best `keep` leaves stay; those among them whose text goes on are continued `width` times (AlphaMath)."""
    counts = np.zeros(len(scores), np.int64)
    best = best_first(scores)[:keep]
    counts[best] = np.where(ended[best], 1, width)
    return counts


def balanced_counts(rewards: Float64Array, width: int, temperature: float) -> Int64Array:
    """`width` continuations in proportion to `exp(r / temperature)`, rounded up from the best leaf on (REBASE).

    From the best to the worst, leaf i gets `ceil(W e_i / S)` of the W that are left, where `S` is the sum of `e` over
    it and all that are worse. So the worst may get none. The counts sum to `width`.
    """
    counts = np.zeros(len(rewards), np.int64)
    order = best_first(rewards)
    order = order[~np.isnan(rewards[order])]
    if not len(order):
        return counts
    mass = np.exp((rewards[order] - rewards[order[0]]) / temperature)
    rest = mass[::-1].cumsum()[::-1]  # of this leaf and all after it
    for leaf, own, left in zip(order, mass, rest, strict=True):
        if width <= 0 or own == 0:
            break
        counts[leaf] = math.ceil(width * own / left - ROUNDING)
        width -= int(counts[leaf])
    return counts


def ngram_counts(steps: Sequence[Int32Array]) -> Float64Array:
    """How often each token and each pair of neighbouring tokens occurs in each of `steps`, `[N, d]`."""
    grams = [[*((token,) for token in step), *pairwise(step)] for step in (s.tolist() for s in steps)]
    column = {gram: j for j, gram in enumerate(dict.fromkeys(gram for some in grams for gram in some))}
    counts = np.zeros((len(steps), len(column)))
    for row, some in zip(counts, grams, strict=True):
        np.add.at(row, [column[gram] for gram in some], 1)
    return counts


def clusters(vectors: Float64Array, distance: float) -> Int64Array:
    """Clusters of `vectors [N, d]` by average linkage of cosine distances, int64 `[N]` from 0 on.

    The two clusters of the smallest mean distance between their members are joined as long as that is at most
    `distance`. A vector of zeros is at distance 1 from all others.
    """
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norm > 0, norm, 1)
    apart = 1 - unit @ unit.T
    size = np.ones(len(vectors))
    cluster = np.arange(len(vectors))
    np.fill_diagonal(apart, np.inf)
    while len(vectors) > 1 and apart.min() <= distance:
        a, b = sorted(divmod(int(apart.argmin()), len(vectors)))
        apart[a] = apart[:, a] = (size[a] * apart[a] + size[b] * apart[b]) / (size[a] + size[b])
        apart[b] = apart[:, b] = apart[a, a] = np.inf
        size[a] += size[b]
        cluster[cluster == b] = a
    return np.unique(cluster, return_inverse=True)[1]


def thrifty_leaves(
    value: Float64Array, paths: Sequence[Sequence[int]], cluster: Int64Array, lambda_b: float, lambda_d: float
) -> BoolArray:
    """The leaves that are worth the nodes that they keep in memory (ETS, Hooper et al. 2025, eq. 4).

    Of all sets S that are not empty, the one that maximises

        sum of value over S - lambda_b (M_S + |S|) / (M + N) + lambda_d K_S / K

    where of M nodes above the N leaves `M_S` are above a leaf of S, and of K clusters `K_S` have a leaf in S. Of
    equally good sets it is one to which no leaf can be added. Up to `EXACT_LEAVES` leaves it is found by branch and
    bound; beyond that, whole subtrees or clusters are removed and single leaves added as long as that gains.

    Args:
        value: of each leaf, its share of all continuations. `[N]`
        paths: the nodes above each leaf, from the root on. `[N]`
        cluster: the cluster of each leaf, from 0 to K - 1. int64 `[N]`
        lambda_b: weight of the nodes that are kept.
        lambda_d: weight of the clusters that are covered.

    Returns:
        Whether each leaf stays, `[N]`.
    """
    number = {node: m for m, node in enumerate(dict.fromkeys(node for path in paths for node in path))}
    above = np.zeros((len(number), len(value)), bool)
    for leaf, path in enumerate(paths):
        above[[number[node] for node in path], leaf] = True
    covered = cluster == np.arange(cluster.max() + 1)[:, None]
    each = lambda_b / (len(above) + len(value))
    groups = np.concatenate([above, covered])  # each is paid for once if a leaf of it stays
    price = np.concatenate([np.full(len(above), -each), np.full(len(covered), lambda_d / len(covered))])
    kept = (_exact if len(value) <= EXACT_LEAVES else _pruned)(value - each, groups, price)
    while len(free := _of_no_cost(kept, value - each, groups, price)):
        kept[free[0]] = True
    return kept


def _worth(kept: BoolArray, value: Float64Array, groups: BoolArray, price: Float64Array) -> Float64Array:
    """What sets of leaves `kept [S, N]` are worth: their `value [N]`, and the `price` of `groups [G, N]` they touch."""
    touched = (kept.astype(np.float64) @ groups.T.astype(np.float64)) > 0
    worth: Float64Array = kept @ value + touched @ price
    return worth


def _of_no_cost(kept: BoolArray, value: Float64Array, groups: BoolArray, price: Float64Array) -> Int64Array:
    """Leaves without which the set is no better than with them."""
    more = kept | np.eye(len(kept), dtype=bool)
    same = _worth(more, value, groups, price) >= _worth(kept[None], value, groups, price) - ROUNDING
    return np.flatnonzero(same & ~kept)


def _pruned(value: Float64Array, groups: BoolArray, price: Float64Array) -> BoolArray:
    """A good set: from all leaves on, a group is removed or a leaf added, whatever gains most, as long as one gains."""
    single = np.eye(len(value), dtype=bool)
    removable = np.unique(np.concatenate([groups, single]), axis=0)
    kept = np.ones(len(value), bool)
    while True:
        others = np.concatenate([kept & ~removable, kept | single])
        others = others[others.any(axis=1)]
        worth = _worth(others, value, groups, price)
        if worth.max() <= _worth(kept[None], value, groups, price)[0] + ROUNDING:
            return kept
        kept = others[worth.argmax()]


def _exact(value: Float64Array, groups: BoolArray, price: Float64Array) -> BoolArray:
    """The best set, by branch and bound: leaf by leaf, all sets so far that may still become better than the best.

    What the leaves that are undecided can add is at most what their new groups promise, and the gains of those leaves
    that have one. In that, a leaf pays of each new group's cost the share that it has if all leaves of the group stay.
    """
    shared = np.where(price < 0, price / groups.sum(axis=1), 0)
    order = np.argsort(-(value + shared @ groups), kind="stable")
    best = _pruned(value, groups, price)
    least = _worth(best[None], value, groups, price)[0]
    sets = np.zeros((1, len(value)), bool)
    for i, leaf in enumerate(order):
        rest = order[i + 1 :]
        longer = sets.copy()
        longer[:, leaf] = True
        sets = np.concatenate([longer, sets])
        fresh = (sets.astype(np.float64) @ groups.T.astype(np.float64)) == 0
        worth = sets @ value + ~fresh @ price
        found = np.where(sets.any(axis=1), worth, -np.inf)
        if found.max() > least + ROUNDING:
            best, least = sets[found.argmax()], found.max()
        gains = value[rest] + (fresh * shared) @ groups[:, rest]
        promised = fresh @ np.where(groups[:, rest].any(axis=1), np.maximum(price, 0), 0)
        sets = sets[worth + np.maximum(gains, 0).sum(axis=1) + promised > least + ROUNDING]
        if not len(sets):
            break
    return best
