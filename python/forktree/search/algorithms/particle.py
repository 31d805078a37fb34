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


@register("particle")
@dataclass(frozen=True, kw_only=True)
class ParticleFilter(StepSearch):
    """Texts grow step by step; after each step they are resampled by their rewards, which must lie in [0, 1].

    A particle's weight is the logit of its newest reward, not a running product. Particles whose text has ended keep
    their last reward and compete on.

    Args:
        num_particles: number of texts.
        weight_temperature: divides the logits of the rewards; higher keeps more diversity.
        resampling: "systematic" or "multinomial".
        selection: the first hypothesis is the one of the best reward ("argmax") or sampled by weight ("sample").
    """

    num_particles: int = 16
    weight_temperature: float = 1.0
    resampling: str = "systematic"
    selection: str = "argmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("num_particles", self.num_particles, 1)
        number("weight_temperature", self.weight_temperature, "finite and more than 0", lambda t: t > 0)
        check_choice("resampling", self.resampling, RESAMPLERS)
        check_choice("selection", self.selection, ("argmax", "sample"))

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """All particles, best reward first; `weight` estimates the posterior of each."""
        n = self.num_particles
        particles = Walkers.start(context, n)
        while True:
            live = np.flatnonzero(particles.alive)
            await grow(particles, live, context, self)
            await judged(particles, live, self.reward, valid=unit_interval)
            weights = softmax(log_weights(particles.rewards, self.weight_temperature))
            if not particles.alive.any():
                break
            ancestors = RESAMPLERS[self.resampling](weights, n, context.rng)
            ess = effective_sample_size(weights)
            particles = particles.taken(ancestors, why="resampling", weights=weights, ess=ess)
        order = best_first(particles.rewards)
        if self.selection == "sample":
            first = context.rng.choice(n, p=weights)
            order = np.concatenate([[first], order[order != first]])
        return particles.hypotheses(order, context, weights=weights)
