"""Resampling schemes: weights in, ancestor indices out. Each copies particle i about `n * weights[i]` times."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Resampler = Callable[[NDArray[np.float64], int, np.random.Generator], NDArray[np.int64]]


def multinomial(weights: NDArray[np.float64], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`n` independent draws from the normalised `weights [N]`; ancestors `[n]`, sorted."""
    return _invert(weights, np.sort(rng.random(n)))


def systematic(weights: NDArray[np.float64], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """One draw u, positions (j + u) / n (Kitagawa 1996): i is copied floor(n w) or ceil(n w) times."""
    return _invert(weights, (np.arange(n) + rng.random()) / n)


def _invert(weights: NDArray[np.float64], positions: NDArray[np.float64]) -> NDArray[np.int64]:
    cumulative = np.cumsum(weights)
    # scaling by the total keeps a rounded sum below one from pointing past the last particle with weight
    return np.searchsorted(cumulative, positions * cumulative[-1], side="right").clip(max=np.flatnonzero(weights)[-1])


RESAMPLERS: dict[str, Resampler] = {"systematic": systematic, "multinomial": multinomial}


def softmax(log_weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Normalised weights; -inf is weight 0. At least one must be finite."""
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()
