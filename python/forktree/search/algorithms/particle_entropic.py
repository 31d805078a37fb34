"""Entropic particle filtering (Giannone et al. 2025, "Mitigating Premature Exploitation")."""

from dataclasses import dataclass

import numpy as np

from forktree.checks import number
from forktree.search.algorithms.particle import ParticleSearch
from forktree.search.base import Hypothesis
from forktree.search.context import SearchContext
from forktree.search.registry import register
from forktree.search.selection import (
    ANNEALING,
    RESAMPLERS,
    effective_sample_size,
    log_weights,
    softmax,
    temper,
    unit_interval,
)
from forktree.search.steps import Walkers, grow, judged
from forktree.search.validation import check_choice
from forktree.types import Float64Array, Int64Array


@register("entropic-particle")
@dataclass(frozen=True, kw_only=True)
class EntropicParticleFilter(ParticleSearch):
    """A particle filter that trusts its rewards less while it is young, and may look a step ahead.

    Entropic annealing: before the share `early_phase` of `max_steps`, when the effective sample size is below
    `annealing_threshold` of the particles, they are resampled by `softmax(logit(r) / b)` with a b of at least 1, see
    `forktree.search.selection.ANNEALING`. Otherwise this is the plain filter.

    Look-ahead modulation: before particles are resampled, each proposes its next step, and its logit l becomes
    `l + lookahead_weight (l' - l)`, where l' is the logit of the reward after that step. Of every particle that is
    continued, one copy keeps the step that was proposed and the others sample their own, so that with a weight of 0
    this would be the plain filter. Which copy keeps what is a reconstruction: the authors' library names this
    technique and leaves it out.

    Args:
        resampling: "systematic" or "multinomial".
        annealing: the rule for b: "ess" (the paper's), "entropy", "base", or "none", which is b = 1.
        annealing_threshold: the share of `num_particles` below which an effective sample size is too small.
        early_phase: the share of `max_steps` after which nothing is annealed.
        lookahead_weight: how much of the next step's change counts, from 0 to 1; 0 proposes nothing.
    """

    resampling: str = "systematic"
    annealing: str = "ess"
    annealing_threshold: float = 0.5
    early_phase: float = 0.5
    lookahead_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("resampling", self.resampling, RESAMPLERS)
        check_choice("annealing", self.annealing, ("none", *ANNEALING))
        for name in ("annealing_threshold", "early_phase", "lookahead_weight"):
            number(name, getattr(self, name), "from 0 to 1", lambda share: 0 <= share <= 1)

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """All particles, best reward first; a `weight` is that of the reward alone."""
        n = self.num_particles
        particles, waiting, step = Walkers.start(context, n), np.arange(n), 0
        while True:
            await self._step(particles, waiting, context)
            step += 1
            logits = log_weights(particles.rewards, self.weight_temperature)
            live = np.flatnonzero(particles.alive)
            if not len(live):
                return self.hypotheses(particles, softmax(logits), context)
            proposed = particles.forks(live if self.lookahead_weight else live[:0])
            await self._step(proposed, np.arange(len(proposed)), context)
            if context.budget.spent:
                particles.end(why="budget")
            weights = self._annealed(self._modulated(logits, live, proposed), step)
            ancestors = RESAMPLERS[self.resampling](weights, n, context.rng)
            keepers, kept = _keepers(ancestors, live[: len(proposed)])
            ancestors[keepers] = n + kept
            particles = Walkers.concatenated([particles, proposed]).taken(
                ancestors, why="resampling", weights=weights, ess=effective_sample_size(weights)
            )
            waiting = np.setdiff1d(np.flatnonzero(particles.alive), keepers)  # those without their next step

    async def _step(self, particles: Walkers, which: Int64Array, context: SearchContext) -> None:
        await grow(particles, which, context, self)
        await judged(particles, which, self.reward, valid=unit_interval)

    def _modulated(self, logits: Float64Array, live: Int64Array, proposed: Walkers) -> Float64Array:
        """Logits `[N]` that have seen what is `proposed` for `live`; -inf where either reward failed."""
        if not len(proposed):
            return logits
        coming = logits.copy()
        coming[live] = log_weights(proposed.rewards, self.weight_temperature)
        known = np.isfinite(logits) & np.isfinite(coming)
        ahead = np.where(known, coming, 0) - np.where(known, logits, 0)
        return np.where(known, logits + self.lookahead_weight * ahead, -np.inf) if known.any() else logits

    def _annealed(self, logits: Float64Array, step: int) -> Float64Array:
        """Normalised weights to resample by after so many steps."""
        progress = step / self.max_steps
        weights = softmax(logits)
        uneven = effective_sample_size(weights) < self.annealing_threshold * len(weights)
        if self.annealing == "none" or not uneven or progress >= self.early_phase:
            return weights
        return temper(logits, progress, self.annealing)


def _keepers(ancestors: Int64Array, live: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Copies that keep what was proposed for `live`: the first of each in `ancestors [n]`, and its place in `live`."""
    found, first = np.unique(ancestors, return_index=True)
    place = np.searchsorted(live, found)
    named = np.isin(found, live)
    return first[named], place[named]
