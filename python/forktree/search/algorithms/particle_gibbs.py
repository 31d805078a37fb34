"""Particle Gibbs with a process-reward model (Puri et al. 2025, section 3.3), and chains of it that exchange texts."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from forktree.checks import integer, number
from forktree.errors import InvalidInput
from forktree.search.algorithms.particle import ParticleSearch
from forktree.search.base import Hypothesis
from forktree.search.context import SearchContext
from forktree.search.registry import register
from forktree.search.selection import log_weights, multinomial, softmax, unit_interval
from forktree.search.steps import Walkers, grow, judged
from forktree.search.trace import SearchTrace
from forktree.types import Float64Array, Int64Array


class Mark(NamedTuple):
    """Where a text stood after a step; for the fields see `Walkers`."""

    length: int
    reason: str
    num_tokens: int
    log_prob: float
    unfinished: int


@register("particle-gibbs")
@dataclass(frozen=True, kw_only=True)
class ParticleGibbs(ParticleSearch):
    """Particle filters in turn, in each of which a text of the one before takes part as it is.

    The reference is sampled by the weights of a sweep's texts. In the next sweep it competes at every step with the
    reward that it had there, and whoever continues it is cut to that step (conditional SMC; Andrieu et al. 2010). With
    texts of one number of steps the references have exactly the filter's posterior in the long run, whatever
    `num_particles` is. The authors' code lets references compete with their last reward at every step, which is no
    such filter; ancestors of a reference are not sampled anew, there or here.

    Args:
        num_particles: texts of a sweep, references among them.
        num_iterations: sweeps, the first of them without a reference.
        num_ref_particles: references of a sweep, sampled with replacement; the posterior is exact for one.
    """

    num_iterations: int = 4
    num_ref_particles: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("num_iterations", self.num_iterations, 1)
        integer("num_ref_particles", self.num_ref_particles, 1)
        if self.num_ref_particles >= self.num_particles:
            raise InvalidInput(
                f"num_ref_particles must be less than num_particles = {self.num_particles}, got "
                f"{self.num_ref_particles}"
            )

    @property
    def weight_temperatures(self) -> Float64Array:
        """`[C]`: that of every chain; what is returned comes from the first."""
        return np.array([self.weight_temperature])

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """The texts of all sweeps, best reward first; `weight` is the mean over the sweeps, 0 outside its own."""
        marks: dict[int, Mark] = {}
        references, sweeps, weights = None, [], []
        for _ in range(self.num_iterations):
            texts, chains, of_chain = await self._sweep(references, marks, context)
            rows = zip(chains, of_chain, strict=True)
            chosen = np.stack([context.rng.choice(row, self.num_ref_particles, p=w) for row, w in rows])
            self._exchange(chosen, texts, context)
            context.trace.record("reference", nodes=texts.node[chosen.ravel()])
            if references is not None:
                references.drop()
            references = texts.forks(chosen.ravel())
            sweeps.append(texts.taken(chains[0], why="first chain"))
            weights.append(of_chain[0])
            if context.budget.spent:
                break
        return self.hypotheses(Walkers.concatenated(sweeps), np.concatenate(weights) / len(sweeps), context)

    async def _sweep(
        self, references: Walkers | None, marks: dict[int, Mark], context: SearchContext
    ) -> tuple[Walkers, Int64Array, Float64Array]:
        """One filter a chain, all side by side.

        Args:
            references: R of each of C chains in turn, `[C * R]`; None in the first sweep.
            marks: of every node so far; those of this sweep are added.
            context: that of the search.

        Returns:
            The texts `[C * N]`, those of each chain `[C, N]`, its references last, and their weights `[C, N]`.
        """
        temperatures = self.weight_temperatures[:, None]
        fixed = 0 if references is None else self.num_ref_particles
        each = self.num_particles - fixed
        number = np.arange(len(temperatures))[:, None]
        chains = np.concatenate(
            [number * each + np.arange(each), (len(number) * each + number * fixed) + np.arange(fixed)], axis=1
        )
        free, step = Walkers.start(context, len(number) * each), 0
        while True:
            live, step = np.flatnonzero(free.alive), step + 1
            await grow(free, live, context, self)
            texts = free
            if references is not None:
                cut = _cut(references, step, marks, context.trace)
                texts = Walkers.concatenated([free, cut])
            await judged(texts, live, self.reward, valid=unit_interval)
            if references is not None:  # they have their rewards: no budget ends them
                texts.alive[len(free) :], texts.reason[len(free) :] = cut.alive, cut.reason
            _mark(texts, live, marks)
            weights = np.stack([_weights(row) for row in log_weights(texts.rewards, 1.0)[chains] / temperatures])
            going = texts.alive[chains].any(axis=1)
            if not going.any():
                return texts, chains, weights
            ancestors = chains[:, :each].copy()
            for c in np.flatnonzero(going):
                ancestors[c] = chains[c, multinomial(weights[c], each, context.rng)]
            shown = np.empty(len(texts))
            shown[chains] = weights
            free = texts.taken(ancestors.ravel(), why="resampling", weights=shown)

    def _exchange(self, chosen: Int64Array, texts: Walkers, context: SearchContext) -> None:
        """Exchanges references `chosen [C, R]` between chains; here there is one chain."""


@register("parallel-tempering")
@dataclass(frozen=True, kw_only=True)
class ParallelTempering(ParticleGibbs):
    """Chains of particle Gibbs, of which the hotter ones trust the rewards less and pass on what they find.

    After each sweep the references of neighbouring chains a and b change places with the probability
    `min(1, exp((1 / T_a - 1 / T_b) (l_b - l_a)))`, where l is the sum of the logits of a reference's rewards; that
    leaves the posterior of every chain as it is. The whole is a reconstruction: the paper names it without a formula.

    Args:
        num_chains: chains; the texts of the first, whose temperature is `weight_temperature`, are returned.
        temperature_ratio: between the weight temperatures of neighbouring chains, more than 1.
    """

    num_chains: int = 3
    temperature_ratio: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("num_chains", self.num_chains, 1)
        number("temperature_ratio", self.temperature_ratio, "finite and more than 1", lambda ratio: ratio > 1)

    @property
    def weight_temperatures(self) -> Float64Array:
        """That of every chain, `[C]`."""
        return np.array([self.weight_temperature * self.temperature_ratio**c for c in range(self.num_chains)])

    def _exchange(self, chosen: Int64Array, texts: Walkers, context: SearchContext) -> None:
        inverse = 1 / self.weight_temperatures
        for a in range(len(chosen) - 1):
            for r in range(chosen.shape[1]):
                l_a, l_b = (log_weights(np.array(texts.history[i]), 1.0).sum() for i in chosen[a : a + 2, r])
                if np.log(context.rng.random()) < (inverse[a] - inverse[a + 1]) * (l_b - l_a):
                    chosen[[a, a + 1], r] = chosen[[a + 1, a], r]


def _weights(logits: Float64Array) -> Float64Array:
    """Normalised weights of a chain; equal ones if all its rewards failed."""
    return softmax(logits if np.isfinite(logits).any() else np.zeros(len(logits)))


def _mark(texts: Walkers, which: Int64Array, marks: dict[int, Mark]) -> None:
    """Notes where `which` of the texts stand."""
    for i in which.tolist():
        marks[int(texts.node[i])] = Mark(
            texts.branches[i].length,
            texts.reason[i],
            int(texts.num_tokens[i]),
            float(texts.log_prob[i]),
            int(texts.unfinished[i]),
        )


def _cut(texts: Walkers, steps: int, marks: dict[int, Mark], trace: SearchTrace) -> Walkers:
    """Forks of whole texts that stand where those stood after so many steps, at the latest at their ends."""
    cut = texts.forks(np.arange(len(texts)))
    for i, node in enumerate(texts.node.tolist()):
        path = [step for step in trace.path(node) if step in marks]  # a step that a budget has cut has several nodes
        if steps >= len(path):
            continue
        mark = marks[path[steps - 1]]
        cut.branches[i].rewind(mark.length)
        cut.alive[i], cut.node[i], cut.steps[i], cut.reason[i] = True, path[steps - 1], steps, mark.reason
        cut.num_tokens[i], cut.log_prob[i], cut.unfinished[i] = mark.num_tokens, mark.log_prob, mark.unfinished
        cut.history[i] = texts.history[i][:steps]
        cut.rewards[i] = cut.history[i][-1]
    return cut
