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


def effective_sample_size(weights: Float64Array) -> float:
    """`1 / sum(w^2)` of normalised weights (Kong 1992): N if all are equal, 1 if one has everything."""
    return float(1 / np.square(weights).sum())


def best_first(values: Float64Array) -> Int64Array:
    """Indices from the highest value to the lowest, NaN last; equal ones keep their order. `[N]`."""
    return np.argsort(-np.where(np.isnan(values), -np.inf, values), kind="stable")
