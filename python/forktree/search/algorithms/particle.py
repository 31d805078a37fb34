"""Particle filtering with a process-reward model (Puri et al. 2025, "Rollout Roulette")."""

from dataclasses import dataclass

import numpy as np

from forktree.checks import integer, number
from forktree.search.base import Hypothesis
from forktree.search.context import SearchContext
from forktree.search.registry import register
from forktree.search.selection import (
    RESAMPLERS,
    best_first,
    effective_sample_size,
    log_weights,
    softmax,
    unit_interval,
)
from forktree.search.steps import StepSearch, Walkers, grow, judged
from forktree.search.validation import check_choice
from forktree.types import Float64Array


@dataclass(frozen=True, kw_only=True)
class ParticleSearch(StepSearch):
    """Texts that grow step by step, weighted by their rewards, which must lie in [0, 1].

    Args:
        num_particles: number of texts.
        weight_temperature: divides the logits of the rewards; higher keeps more diversity.
        selection: the first hypothesis is the one of the best reward ("argmax") or sampled by weight ("sample").
    """

    num_particles: int = 16
    weight_temperature: float = 1.0
    selection: str = "argmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("num_particles", self.num_particles, 1)
        number("weight_temperature", self.weight_temperature, "finite and more than 0", lambda t: t > 0)
        check_choice("selection", self.selection, ("argmax", "sample"))

    def hypotheses(self, particles: Walkers, weights: Float64Array, context: SearchContext) -> list[Hypothesis]:
        """All particles, best reward first, but for the first as `selection` has it; `weights [N]` are normalised."""
        order = best_first(particles.rewards)
        if self.selection == "sample":
            first = context.rng.choice(len(weights), p=weights)
            order = np.concatenate([[first], order[order != first]])
        return particles.hypotheses(order, context, weights=weights)


@register("particle")
@dataclass(frozen=True, kw_only=True)
class ParticleFilter(ParticleSearch):
    """Texts grow step by step; after each step they are resampled by their rewards, which must lie in [0, 1].

    A particle's weight is the odds of its newest reward, not a running product. Particles whose text has ended keep
    their last reward and compete on.

    With `ess_threshold` below 1 particles are resampled only when their weights have become uneven, and until then a
    weight is the product of the odds since the last time. Both ways aim at the same distribution,
    `p(x) prod_t odds(r_t)^(1 / weight_temperature)`. A particle whose reward fails is resampled away at once.

    Args:
        resampling: "systematic" or "multinomial".
        ess_threshold: the effective sample size, as a share of `num_particles`, below which particles are resampled;
            1: after every step, as in the paper.
    """

    resampling: str = "systematic"
    ess_threshold: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("resampling", self.resampling, RESAMPLERS)
        number("ess_threshold", self.ess_threshold, "from 0 to 1", lambda share: 0 <= share <= 1)

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """All particles, best reward first; `weight` estimates the posterior of each."""
        n = self.num_particles
        particles, gained = Walkers.start(context, n), np.zeros(n)
        while True:
            live = np.flatnonzero(particles.alive)
            await grow(particles, live, context, self)
            await judged(particles, live, self.reward, valid=unit_interval)
            gained = gained + log_weights(particles.rewards, self.weight_temperature)
            weights = softmax(gained)
            if not particles.alive.any():
                return self.hypotheses(particles, weights, context)
            ess = effective_sample_size(weights)
            if self.ess_threshold == 1 or ess < self.ess_threshold * n or np.isinf(gained).any():
                ancestors = RESAMPLERS[self.resampling](weights, n, context.rng)
                particles = particles.taken(ancestors, why="resampling", weights=weights, ess=ess)
                gained = np.zeros(n)
