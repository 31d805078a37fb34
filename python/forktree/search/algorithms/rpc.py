"""Perplexity consistency with reasoning pruning: votes by the probability of texts."""

import importlib.util
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from forktree.errors import InvalidInput
from forktree.search.algorithms.vote import VotingSearch
from forktree.search.answers import NO_ANSWER
from forktree.search.base import Hypothesis
from forktree.search.context import SearchContext
from forktree.search.registry import register
from forktree.search.steps import Walkers
from forktree.types import BoolArray, Float64Array, Int64Array

FEWEST = 4  # samples that a mixture is fitted to


@dataclass(frozen=True)
class WeibullMixture:
    """Two Weibull distributions, of which the first has the larger mean.

    Args:
        share: of the first.
        shape: of each, `[2]`.
        scale: of each, `[2]`.
    """

    share: float
    shape: Float64Array
    scale: Float64Array

    def densities(self, x: Float64Array) -> Float64Array:
        """Density of each, times its share, at `x [n]`: `[2, n]`."""
        shape, scale = self.shape[:, None], self.scale[:, None]
        density = shape / scale * (x / scale) ** (shape - 1) * np.exp(-((x / scale) ** shape))
        return np.array([[self.share], [1 - self.share]]) * density


def fit_mixture(x: Float64Array) -> WeibullMixture | None:
    """The mixture that is most likely to give `x [n]`, all positive; None if there is no good fit.

    By L-BFGS-B from the start, and within the bounds, of the authors' code.
    """
    from scipy.optimize import minimize
    from scipy.special import gamma

    def of(parameters: Float64Array) -> WeibullMixture:
        share, shape, scale, other_shape, other_scale = parameters
        return WeibullMixture(share, np.array([shape, other_shape]), np.array([scale, other_scale]))

    def loss(parameters: Float64Array) -> float:
        return -float(np.log(np.maximum(of(parameters).densities(x).sum(axis=0), np.finfo(float).tiny)).sum())

    with np.errstate(all="ignore"):
        found = minimize(loss, [0.5, 1, 1, 1.5, 2], bounds=[(0.2, 0.8), *[(0.01, None)] * 4])
        if not np.isfinite(found.fun):
            return None
        fitted = of(found.x)
        means = fitted.scale * gamma(1 + 1 / fitted.shape)
    if means[0] < means[1]:
        fitted = WeibullMixture(1 - fitted.share, fitted.shape[::-1], fitted.scale[::-1])
    return fitted


def pruned(probabilities: Float64Array) -> BoolArray:
    """Which samples are left out: more likely of the lower component than of the higher, and below the mean. `[n]`.

    None of fewer than four, nor where no mixture fits.

    Args:
        probabilities: `exp` of the mean log-prob of each sample's tokens, `[n]`.
    """
    fitted = fit_mixture(probabilities) if len(probabilities) >= FEWEST else None
    if fitted is None:
        return np.zeros(len(probabilities), bool)
    with np.errstate(all="ignore"):
        high, low = fitted.densities(probabilities)
    out: BoolArray = (high < low) & (probabilities < min(probabilities.mean(), probabilities.max()))  # means round up
    return out


def answer_mass(
    groups: Int64Array, texts: Sequence[Hashable], probabilities: Float64Array, kept: BoolArray
) -> Float64Array:
    """The share of each sample's answer in the sum of the probabilities of all different texts that are kept. `[n]`.

    A text that came twice counts once; different texts count each, however equal their probabilities.

    Args:
        groups: the answer of each sample, int64 `[n]`.
        texts: what each says, `[n]`.
        probabilities: of each, `[n]`.
        kept: which take part, `[n]`.
    """
    part = kept & (groups != NO_ANSWER)
    once = {(groups[i], texts[i]): probabilities[i] for i in np.flatnonzero(part).tolist()}
    mass: dict[int, float] = {}
    for (group, _), p in once.items():
        mass[group] = mass.get(group, 0.0) + p
    total = sum(mass.values()) or 1.0
    return np.array([mass.get(int(group), 0.0) / total for group in groups])


@register("rpc")
@dataclass(frozen=True, kw_only=True)
class PerplexityConsistency(VotingSearch):
    """RPC: an answer's weight is the probability of its distinct texts, instead of how often they came.

    Zhou et al. 2025, "Bridging Internal Probability and Self-Consistency". A sample's probability is the exponential of
    its mean log-prob a token, as in the authors' code. Reasoning pruning: a mixture of two Weibull distributions is
    fitted to these, and samples that are more likely of the lower one, and below the mean, are left out. No reward is
    asked. Needs scipy: `pip install 'forktree[scipy]'`.

    Args:
        prune: whether samples are left out; without, this is perplexity consistency.
    """

    num_samples: int = 64
    temperature: float = 1.0
    prune: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prune and importlib.util.find_spec("scipy") is None:
            raise InvalidInput("prune=True needs scipy: pip install 'forktree[scipy]'")

    async def select(self, samples: Walkers, context: SearchContext) -> list[Hypothesis]:
        """Samples of the heaviest answer first, the likeliest first; the score is the answer's share of all mass."""
        answers = self.read(samples, context)
        kept = samples.num_tokens > 0  # a budget may have left none
        probabilities = np.where(kept, np.exp(samples.log_prob / np.maximum(1, samples.num_tokens)), 0.0)
        if self.prune:
            kept[kept] = ~pruned(probabilities[kept])
        texts = [branch.tokens.tobytes() for branch in samples.branches]
        samples.rewards = probabilities
        shares = answer_mass(answers.group, texts, probabilities, kept)
        return self.returned(samples, answers, shares, context, probabilities=probabilities, kept=kept)
