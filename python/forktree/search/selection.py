"""Choices among texts: arrays in, indices out, randomness explicit. Nothing here knows a model or a branch."""

from collections.abc import Callable

import numpy as np

from forktree.errors import InvalidInput
from forktree.types import Float64Array, Int64Array

Resampler = Callable[[Float64Array, int, np.random.Generator], Int64Array]

ROUNDING = 1e-5  # rewards this far outside [0, 1] were rounded, and count as 0 or 1
CLIP = 1e-7  # rewards are clipped to [CLIP, 1 - CLIP] before their logit is taken


def multinomial(weights: Float64Array, n: int, rng: np.random.Generator) -> Int64Array:
    """`n` independent samples from the normalised `weights [N]`; ancestors `[n]`, sorted."""
    return _invert(weights, np.sort(rng.random(n)))


def systematic(weights: Float64Array, n: int, rng: np.random.Generator) -> Int64Array:
    """One uniform u, positions (j + u) / n (Kitagawa 1996): i is copied floor(n w) or ceil(n w) times."""
    return _invert(weights, (np.arange(n) + rng.random()) / n)


def _invert(weights: Float64Array, positions: Float64Array) -> Int64Array:
    cumulative = np.cumsum(weights)
    # scaling by the total keeps a rounded sum below one from pointing past the last particle with weight
    return np.searchsorted(cumulative, positions * cumulative[-1], side="right").clip(max=np.flatnonzero(weights)[-1])


RESAMPLERS: dict[str, Resampler] = {"systematic": systematic, "multinomial": multinomial}
"""Resampling schemes by name: weights `[N]` in, ancestor indices `[n]` out. Each copies particle i about
`n * weights[i]` times."""


def unit_interval(rewards: Float64Array) -> Float64Array:
    """Rewards `[N]` that must lie in [0, 1], without what rounding put outside; NaN stays.

    Raises:
        InvalidInput: one is further outside.
    """
    outside = rewards[(rewards < -ROUNDING) | (rewards > 1 + ROUNDING)]
    if len(outside):
        raise InvalidInput(f"rewards must lie in [0, 1], got {outside[0]}: give the head activation='sigmoid'")
    return rewards.clip(0, 1)


def log_weights(rewards: Float64Array, temperature: float) -> Float64Array:
    """`logit(r) / temperature` of rewards in [0, 1]; -inf where the reward is NaN (it failed). `[N]`."""
    clipped = np.clip(rewards, CLIP, 1 - CLIP)
    return np.where(np.isnan(rewards), -np.inf, (np.log(clipped) - np.log1p(-clipped)) / temperature)


def softmax(log_weights: Float64Array) -> Float64Array:
    """Normalised weights; -inf is weight 0. At least one must be finite."""
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def logsumexp(log_weights: Float64Array) -> float:
    """`ln sum(exp(x))`, natural log; at least one must be finite."""
    highest = log_weights.max()
    return float(highest + np.log(np.exp(log_weights - highest).sum()))


def effective_sample_size(weights: Float64Array) -> float:
    """`1 / sum(w^2)` of normalised weights (Kong 1992): N if all are equal, 1 if one has everything."""
    return float(1 / np.square(weights).sum())


def best_first(values: Float64Array) -> Int64Array:
    """Indices from the highest value to the lowest, NaN last; equal ones keep their order. `[N]`."""
    return np.argsort(-np.where(np.isnan(values), -np.inf, values), kind="stable")


ANNEALING: dict[str, Callable[[float, float], float]] = {
    "ess": lambda share, progress: (1 - progress) / share,
    "entropy": lambda entropy, progress: 1 / (entropy + (1 - entropy) * progress),
    "base": lambda _, progress: 2 - progress,
}
"""What logits are divided by while a search is young (Giannone et al. 2025), by rule: evenness of the weights and share
of all steps in, divisor out; below 1 it counts as 1. Evenness is the effective sample size over N for "ess", the
entropy over ln N for "entropy"."""


def temper(log_weights: Float64Array, progress: float, rule: str) -> Float64Array:
    """Normalised weights `[N]`, N at least 2, flattened as `ANNEALING[rule]` says at this share of all steps."""
    weights = softmax(log_weights)
    if rule == "entropy":
        evenness = float(-np.sum(weights * np.log(np.where(weights > 0, weights, 1))) / np.log(len(weights)))
    else:
        evenness = effective_sample_size(weights) / len(weights)
    return softmax(log_weights / max(1.0, ANNEALING[rule](evenness, progress)))


def without_replacement(
    weights: Float64Array, n: int, rng: np.random.Generator
) -> tuple[Int64Array, Float64Array]:
    """At most `n` different members of a weighted population that stand for all (Fearnhead & Clifford 2003).

    With the c for which `sum(min(c w, 1)) = n`, those of weight at least 1 / c stay as they are. Of the others,
    member i stays with probability `c w_i`, by systematic sampling, and weighs 1 / c from then on; so the expectation
    of its weight is `w_i`. SMC steering resamples like this (Lew et al. 2023).

    Args:
        weights: at least 0, `[M]`.
        n: how many may stay, at least 1.
        rng: where the systematic sample begins.

    Returns:
        Members that stay, in ascending order `[m]`, and the weight of each; m is n, or less if no more have weight.
    """
    order = np.argsort(-weights, kind="stable")
    heavy = weights[order]
    if np.count_nonzero(weights) <= n:
        stay = np.flatnonzero(weights)
        return stay, weights[stay]
    rest = heavy[::-1].cumsum()[::-1]  # of each and all that are lighter
    whole = int(np.argmax((n - np.arange(n)) * heavy[:n] < rest[:n]))  # so many weigh at least 1 / c
    light = order[whole:]
    c = (n - whole) / rest[whole]
    edges = np.cumsum(weights[light])
    positions = (np.arange(n - whole) + rng.random()) / (n - whole) * edges[-1]
    chosen = light[np.searchsorted(edges, positions, side="right").clip(max=np.flatnonzero(weights[light])[-1])]
    stay = np.concatenate([order[:whole], chosen])
    new = np.concatenate([heavy[:whole], np.full(n - whole, 1 / c)])
    ascending = np.argsort(stay)
    return stay[ascending], new[ascending]
