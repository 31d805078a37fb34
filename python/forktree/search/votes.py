"""Votes among answers: which group of texts wins. Arrays in, arrays out; nothing here knows a text or a model.

`groups` is the answer of each of `n` texts, int64 `[n]`; `NO_ANSWER` has no vote.
"""

import math

import numpy as np

from forktree.search.answers import NO_ANSWER
from forktree.types import AnyArray, BoolArray, Float64Array, Int64Array


def vote(
    groups: Int64Array, weights: Float64Array | None = None, *, within: AnyArray | None = None
) -> Float64Array:
    """The share of all votes that the answer of each text has; 0 where there is no answer. `[n]`.

    With one vote a text this is self-consistency (Wang et al. 2022). With `within`, the texts of each of its values
    vote among themselves, and each value has one ballot, for its winner (ties: more weight overall, then first to
    occur).

    Args:
        groups: the answer of each text, int64 `[n]`.
        weights: votes of each text, not negative; NaN is none. Default: one each. `[n]`.
        within: of each text what it votes within, such as its temperature. `[n]`.
    """
    weights = np.ones(len(groups)) if weights is None else np.nan_to_num(weights)
    total = _sums(groups, weights)
    if within is None:
        whole = weights.sum()
    else:
        ballots = np.zeros(len(total))
        for value in dict.fromkeys(within.tolist()):
            at = within == value
            inside = _sums(groups[at], weights[at], len(total))
            if inside.any():
                best = np.flatnonzero(inside == inside.max()).tolist()
                ballots[max(best, key=lambda group: (total[group], -_first(groups, group)))] += 1
        total, whole = ballots, float(len(set(within.tolist())))
    return np.where(groups == NO_ANSWER, 0.0, total[groups] / (whole or 1.0)) if len(total) else np.zeros(len(groups))


def ranked(
    groups: Int64Array,
    shares: Float64Array,
    *,
    weights: Float64Array | None = None,
    worth: Float64Array | None = None,
) -> Int64Array:
    """Texts of the winning answer first, then those of the next. `[n]`.

    Answers with equal shares are ranked by how many texts say so, then by the sum of their weights, then by which comes
    first. Texts without an answer come after them, and last those whose share is NaN.

    Args:
        groups: the answer of each text, int64 `[n]`.
        shares: what decides, equal within a group. `[n]`.
        weights: of each text, `[n]`.
        worth: ranks the texts of one answer, highest first, NaN last; default: by their places. `[n]`.
    """
    n = len(groups)
    count = _at(groups, _sums(groups, np.ones(n)))
    weight = np.zeros(n) if weights is None else _at(groups, _sums(groups, np.nan_to_num(weights)))
    first = np.array([_first(groups, group) for group in groups], float)
    inner = np.zeros(n) if worth is None else -np.where(np.isnan(worth), -np.inf, worth)
    share = np.where(np.isnan(shares), np.inf, -shares)
    return np.lexsort((np.arange(n), inner, first, -weight, -count, share))


def frequent(groups: Int64Array, least: float, *, k: int = 1) -> BoolArray:
    """Of each text whether its answer is that of a share of at least `least` of all texts. `[n]`.

    All answers pass if fewer than `k` would.
    """
    share = vote(groups)
    kept = (share >= least) & (groups != NO_ANSWER)
    return kept if len(np.unique(groups[kept])) >= k else groups != NO_ANSWER


def worth_of_answers(groups: Int64Array, rewards: Float64Array, *, highest: bool = False) -> Float64Array:
    """Of each text the mean (or highest) reward of the texts with its answer; NaN if none has any, or no answer. `[n]`.

    Args:
        groups: the answer of each text, int64 `[n]`.
        rewards: NaN where there is none. `[n]`.
        highest: whether an answer is worth its highest reward.
    """
    found = np.full(len(groups), np.nan)
    for group in np.unique(groups[groups != NO_ANSWER]):
        known = rewards[(groups == group) & ~np.isnan(rewards)]
        if len(known):
            found[groups == group] = known.max() if highest else known.mean()
    return found


def best_of_majority(
    groups: Int64Array, rewards: Float64Array, least: float, k: int = 1, *, highest: bool = False
) -> Int64Array:
    """Places of up to `k` texts of different answers: the best rewarded of those that are frequent.

    Best-of-Majority (Di et al. 2025): answers of a frequency of at least `least` stay, and of these the k with the
    highest rewards are submitted. With `least` 0 this is best-of-n; with the highest frequency there is, and k = 1, it
    is majority.

    Args:
        groups: the answer of each text, int64 `[n]`.
        rewards: NaN where there is none. `[n]`.
        least: smallest frequency.
        k: number of answers.
        highest: whether an answer is worth its highest reward instead of its mean.
    """
    worth = np.where(frequent(groups, least, k=k), worth_of_answers(groups, rewards, highest=highest), np.nan)
    order = ranked(groups, worth, worth=rewards)
    firsts = {groups[i]: i for i in reversed(order.tolist()) if not np.isnan(worth[i])}
    return np.array(sorted(firsts.values(), key=order.tolist().index)[:k], np.int64)


def majority_of_the_bests(groups: Int64Array, rewards: Float64Array, m: int) -> Float64Array:
    """The probability that the best of `m` texts, sampled with replacement from these, has the answer of each. `[n]`.

    Majority of the Bests (Rakhsha et al. 2025): its mode is the answer. The bootstrap's distribution is exact: of N
    texts by falling reward, number i is the best of m with probability ((N - i + 1) / N)^m - ((N - i) / N)^m. Texts of
    equal reward share theirs, so that their order does not matter. Texts without an answer or a reward take no part.

    Args:
        groups: the answer of each text, int64 `[n]`.
        rewards: NaN where there is none. `[n]`.
        m: size of a sample; 1 is majority, infinitely many best-of-n.
    """
    part = (groups != NO_ANSWER) & ~np.isnan(rewards)
    best = np.zeros(len(groups))
    n = int(part.sum())
    for reward in np.unique(rewards[part]):
        above, same = int((rewards[part] > reward).sum()), part & (rewards == reward)
        below = n - above - int(same.sum())
        best[same] = (((n - above) / n) ** m - (below / n) ** m) / same.sum()
    return np.where(groups == NO_ANSWER, 0.0, _at(groups, _sums(groups, best)))


def stays_ahead(counts: Int64Array) -> float:
    """The probability that the most frequent answer is the more likely one of the two most frequent.

    P(p > 1/2) for p ~ Beta(a + 1, b + 1), a and b their counts: the rule "Beta" of Aggarwal et al. 2023, "Let's Sample
    Step by Step". Exact: 1 - I_1/2(a + 1, b + 1) is P(Binomial(a + b + 1, 1/2) <= a).
    """
    a, b = (int(c) for c in (*sorted(counts.tolist(), reverse=True), 0, 0)[:2])
    n = a + b + 1
    return sum(math.comb(n, j) for j in range(a + 1)) / 2**n


def is_mode(counts: Int64Array) -> float:
    """The probability that the most frequent of all answers seen is the most likely of them.

    For p ~ Dirichlet(counts + 1): the rule "Dirichlet" of Aggarwal et al. 2023, without their bound of five answers.
    Shares of independent Gamma(count + 1) variables are Dirichlet, so it is the integral over x of the leader's density
    times the others' distribution functions at x; by Gauss-Legendre, to 1e-9.
    """
    ordered = sorted(counts.tolist(), reverse=True)
    if len(ordered) < 2:
        return stays_ahead(counts)
    a = ordered[0]
    reach = a + 1 + 12 * math.sqrt(a + 1) + 30  # what the leader's Gamma has above is below 1e-12
    nodes, weights = np.polynomial.legendre.leggauss(400)
    x = (nodes + 1) * reach / 2
    density = np.exp(a * np.log(x) - x - math.lgamma(a + 1))
    factorials = np.array([math.lgamma(j + 1) for j in range(a + 1)])
    terms = np.exp(np.arange(a + 1)[:, None] * np.log(x) - x - factorials[:, None])
    above = np.cumsum(terms, axis=0)  # P(Gamma(j + 1) > x), by row j
    below = np.prod([1 - above[c] for c in ordered[1:]], axis=0)
    return float((weights * density * below).sum() * reach / 2)


def _sums(groups: Int64Array, values: Float64Array, size: int | None = None) -> Float64Array:
    """Sums of `values` by group, `[G]`."""
    has = groups != NO_ANSWER
    sums: Float64Array = np.bincount(groups[has], weights=values[has], minlength=size or 0).astype(np.float64)
    return sums


def _at(groups: Int64Array, of_groups: Float64Array) -> Float64Array:
    """Of each text the value of its group, 0 without one. `[n]`."""
    return np.array([0.0 if group == NO_ANSWER else of_groups[group] for group in groups])


def _first(groups: Int64Array, group: int) -> int:
    """The place of the first text of a group."""
    return int(np.argmax(groups == group))
