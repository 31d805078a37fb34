"""Sequential Monte Carlo whose rewards on the way guide it and leave no trace: twisted SMC and SMC steering."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from forktree.checks import integer, number
from forktree.errors import RewardError
from forktree.search.algorithms.particle import ParticleSearch
from forktree.search.base import Hypothesis
from forktree.search.context import SearchContext
from forktree.search.registry import register
from forktree.search.selection import (
    CLIP,
    RESAMPLERS,
    effective_sample_size,
    log_weights,
    logsumexp,
    softmax,
    unit_interval,
    without_replacement,
)
from forktree.search.steps import Walkers, grow, judged
from forktree.search.validation import check_choice
from forktree.types import Float64Array

POTENTIALS: dict[str, Callable[[Float64Array], Float64Array]] = {
    "reward": lambda rewards: np.log(np.maximum(rewards, CLIP)),
    "odds": lambda rewards: log_weights(rewards, 1.0),
    "exp": lambda rewards: rewards,
}
"""The log of a potential, from rewards."""


@dataclass(frozen=True, kw_only=True)
class TwistedSearch(ParticleSearch):
    """Particles that stand for `p(x) potential(x)`, where only the reward of a whole text counts in the end.

    A step multiplies a particle's weight by the ratio of the potentials after it and before it (Zhao et al. 2024,
    "Twisted SMC", eq. 5 with the potential of a text so far as its twist). So rewards on the way say which texts are
    worth going on with, and cancel in the product. The estimate of the sum of `p(x) potential(x)` over all texts is
    recorded in the trace as `log_evidence`; its exponential is unbiased.

    Args:
        potential: what a reward r stands for: "reward", r itself, at least 0; "odds", r / (1 - r); or "exp", e^r, of a
            reward that is a log-potential of any size. Rewards must lie in [0, 1] for the first two.
        weight_temperature: the potential is taken to the power 1 / weight_temperature.
    """

    potential: str = "reward"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("potential", self.potential, POTENTIALS)

    async def _step(
        self, particles: Walkers, gained: Float64Array, twist: Float64Array, context: SearchContext
    ) -> tuple[Float64Array, Float64Array]:
        """Grows all that are alive by a step.

        Args:
            particles: changed in place.
            gained: log-weights, `[N]`.
            twist: log-potentials that are part of them, `[N]`.
            context: that of the search.

        Returns:
            Both after the step: -inf where a reward failed.

        Raises:
            RewardError: no particle has a weight left.
        """
        live = np.flatnonzero(particles.alive)
        await grow(particles, live, context, self)
        await judged(particles, live, self.reward, valid=None if self.potential == "exp" else unit_interval)
        now = POTENTIALS[self.potential](particles.rewards) / self.weight_temperature
        now = np.where(np.isnan(now), -np.inf, now)
        known = np.isfinite(now) & np.isfinite(twist)
        if not (known & np.isfinite(gained)).any():
            raise RewardError(f"no particle has a weight left; a failure: {next(filter(None, particles.errors))}")
        return np.where(known, gained + np.where(known, now, 0) - np.where(known, twist, 0), -np.inf), now

    def _returned(
        self, particles: Walkers, gained: Float64Array, log_evidence: float, context: SearchContext
    ) -> list[Hypothesis]:
        context.trace.record("evidence", log_evidence=log_evidence)
        return self.hypotheses(particles, softmax(gained), context)


@register("twisted-smc")
@dataclass(frozen=True, kw_only=True)
class TwistedSMC(TwistedSearch):
    """Sequential Monte Carlo towards `p(x) potential(x)`, resampled when the weights have become uneven.

    Args:
        resampling: "multinomial" or "systematic".
        ess_threshold: the effective sample size, as a share of `num_particles`, below which particles are resampled.
    """

    resampling: str = "multinomial"
    ess_threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("resampling", self.resampling, RESAMPLERS)
        number("ess_threshold", self.ess_threshold, "from 0 to 1", lambda share: 0 <= share <= 1)

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """All particles, best reward first; `weight` estimates the posterior of each."""
        n = self.num_particles
        particles, gained, twist = Walkers.start(context, n), np.zeros(n), np.zeros(n)
        while particles.alive.any():
            gained, twist = await self._step(particles, gained, twist, context)
            weights = softmax(gained)
            ess = effective_sample_size(weights)
            if particles.alive.any() and ess < self.ess_threshold * n:
                ancestors = RESAMPLERS[self.resampling](weights, n, context.rng)
                particles = particles.taken(ancestors, why="resampling", weights=weights, ess=ess)
                gained, twist = np.full(n, logsumexp(gained) - np.log(n)), twist[ancestors]
        return self._returned(particles, gained, logsumexp(gained) - np.log(n), context)


@register("smc-steering")
@dataclass(frozen=True, kw_only=True)
class SMCSteering(TwistedSearch):
    """SMC steering (Lew et al. 2023, algorithm 2): every particle goes on in several ways, and different ones stay.

    Of the `num_particles * beam_factor` continuations of a step, `num_particles` are kept by resampling without
    replacement: heavy ones surely, with their weights, and of the light ones a sample of equal weights.

    Args:
        beam_factor: continuations of each particle.
    """

    beam_factor: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("beam_factor", self.beam_factor, 1)

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """At most `num_particles` texts, best reward first; `weight` estimates the posterior of each."""
        n = self.num_particles
        particles, gained, twist = Walkers.start(context, n), np.full(n, -np.log(n)), np.zeros(n)
        while particles.alive.any():
            clones = np.where(particles.alive, self.beam_factor, 1)
            particles = particles.split(clones, why="beam factor")
            gained, twist = np.repeat(gained - np.log(clones), clones), np.repeat(twist, clones)
            gained, twist = await self._step(particles, gained, twist, context)
            stay, weights = without_replacement(softmax(gained), n, context.rng)
            particles = particles.taken(stay, why="steering", weights=softmax(gained))
            gained, twist = logsumexp(gained) + np.log(weights), twist[stay]
        return self._returned(particles, gained, logsumexp(gained), context)
