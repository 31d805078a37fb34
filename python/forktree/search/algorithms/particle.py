"""Particle filtering with a process-reward model (Puri et al. 2025, "Rollout Roulette")."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forktree.checks import integer, number
from forktree.errors import InvalidInput, ScorerError
from forktree.kv import reassign
from forktree.search.base import Hypothesis, SamplingSearch, SearchContext, first_failure, needs_scorer
from forktree.search.request import extend, score
from forktree.search.selection import RESAMPLERS, softmax

ROUNDING = 1e-5  # rewards this far outside [0, 1] were rounded, and count as 0 or 1
CLIP = 1e-7  # rewards are clipped to [CLIP, 1 - CLIP] before their logit is taken


def log_weights(rewards: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """`logit(r) / temperature` of rewards in [0, 1]; -inf where the reward is NaN (its scorer failed). `[N]`."""
    clipped = np.clip(rewards, CLIP, 1 - CLIP)
    return np.where(np.isnan(rewards), -np.inf, (np.log(clipped) - np.log1p(-clipped)) / temperature)


@dataclass(frozen=True, kw_only=True)
class ParticleFilter(SamplingSearch):
    """`num_particles` texts grow step by step; after each step they are resampled by their rewards.

    scorer: reward in [0, 1] of a text so far (a process-reward model); 1e-5 outside is taken for rounding.
    step_delimiter: text that ends a step (it stays part of it). max_step_tokens: so does this many tokens; a delimiter
        that they cut in half ends the next step when its rest comes.
    max_steps: a particle stops after this many steps.
    weight_temperature: divides the logits of the rewards; higher keeps more diversity.
    resampling: "systematic" or "multinomial". A particle's weight is the logit of its newest reward, not a running
        product; stopped particles keep their last reward and compete on.
    selection: the first hypothesis is the best reward ("argmax") or a draw by weight ("sample").
    """

    scorer: Any
    num_particles: int = 16
    step_delimiter: str = "\n\n"
    max_step_tokens: int = 1024
    max_steps: int = 40
    weight_temperature: float = 1.0
    resampling: str = "systematic"
    selection: str = "argmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_particles", "max_step_tokens", "max_steps"):
            integer(name, getattr(self, name), 1)
        needs_scorer(self.scorer)
        if not isinstance(self.step_delimiter, str):
            raise InvalidInput(f"step_delimiter must be a text, got {self.step_delimiter!r}")
        number("weight_temperature", self.weight_temperature, "finite and more than 0", lambda t: t > 0)
        if self.resampling not in RESAMPLERS:
            raise InvalidInput(f"resampling must be one of {', '.join(RESAMPLERS)}, got {self.resampling!r}")
        if self.selection not in ("argmax", "sample"):
            raise InvalidInput(f"selection must be 'argmax' or 'sample', got {self.selection!r}")

    @property
    def scorers(self) -> Sequence[Any]:
        """The process reward."""
        return (self.scorer,)

    async def run(self, context: SearchContext) -> list[Hypothesis]:
        """All particles, best reward first; `weight` estimates the posterior of each."""
        n = self.num_particles
        resample = RESAMPLERS[self.resampling]
        step_end = context.stop_at(self.step_delimiter, *self.stop)
        text_end = context.stop_at(*self.stop)
        particles = context.root.fork(n)
        state = _State.fresh(n)
        while True:
            live = np.flatnonzero(state.alive)
            moving = [particles[i] for i in live]
            step = await extend(
                moving,
                self.sampling,
                max_tokens=np.minimum(self.max_step_tokens, context.max_new_tokens - state.drawn[live]),
                eos_token_ids=context.eos_token_ids,
                stop=step_end,
                processors=self.logits_processor,
                pad_token_id=context.pad_token_id,
                unfinished=state.unfinished[live].tolist(),
            )
            rewards = await score(moving, self.scorer)
            state.rewards[live] = self._checked(rewards.values)
            if np.isnan(state.rewards).all():
                raise first_failure(rewards.errors)
            state.log_prob[live] += step.log_prob
            state.drawn[live] += step.num_tokens
            state.steps[live] += 1
            state.unfinished[live] += step.num_tokens
            for i, reason, error in zip(live, step.reason, rewards.errors, strict=True):
                state.reason[i], state.errors[i] = reason, error
                new = particles[i].tokens[-state.unfinished[i] :]
                full = state.drawn[i] >= context.max_new_tokens or state.steps[i] >= self.max_steps
                stopped = reason == "stop" and text_end is not None and text_end(int(new[-1]), new.tolist())
                state.alive[i] = not (reason == "eos" or full or stopped)
                if full and reason != "eos" and not stopped:
                    state.reason[i] = "length"
                if reason == "stop":
                    state.unfinished[i] = 0
                state.history[i] = [*state.history[i], float(state.rewards[i])]
            weights = softmax(log_weights(state.rewards, self.weight_temperature))
            if not state.alive.any():
                break
            ancestors = resample(weights, n, context.rng)
            particles = reassign(particles, ancestors)
            state = state.taken(ancestors)
        order = np.argsort(-np.nan_to_num(state.rewards, nan=-1.0), kind="stable")
        if self.selection == "sample":
            first = context.rng.choice(n, p=weights)
            order = np.concatenate([[first], order[order != first]])
        return [
            Hypothesis(
                token_ids=particles[i].tokens[context.root.length :],
                score=float(state.rewards[i]),
                log_prob=float(state.log_prob[i]),
                finish_reason=str(state.reason[i]),
                step_scores=state.history[i],
                weight=float(weights[i]),
                error=state.errors[i],
            )
            for i in order
        ]

    def _checked(self, rewards: NDArray[np.float64]) -> NDArray[np.float64]:
        outside = rewards[(rewards < -ROUNDING) | (rewards > 1 + ROUNDING)]
        if len(outside):
            raise InvalidInput(
                f"a particle filter needs rewards in [0, 1], got {outside[0]}: give the head activation='sigmoid'"
            )
        return rewards.clip(0, 1)


@dataclass
class _State:
    """What travels with a particle when it is resampled; arrays `[N]`."""

    alive: NDArray[np.bool_]
    rewards: NDArray[np.float64]
    log_prob: NDArray[np.float64]
    drawn: NDArray[np.int64]
    unfinished: NDArray[np.int64]  # newest tokens, since the last text that ended a step
    steps: NDArray[np.int64]
    reason: NDArray[np.str_]
    history: list[list[float]]
    errors: list[ScorerError | None]

    @classmethod
    def fresh(cls, n: int) -> "_State":
        zeros = np.zeros(n, np.int64)
        reason = np.full(n, "length")
        unscored = np.full(n, np.nan)
        counts = zeros, zeros.copy(), zeros.copy()
        return cls(np.ones(n, bool), unscored, np.zeros(n), *counts, reason, [[]] * n, [None] * n)

    def taken(self, ancestors: NDArray[np.int64]) -> "_State":
        return _State(
            self.alive[ancestors],
            self.rewards[ancestors],
            self.log_prob[ancestors],
            self.drawn[ancestors],
            self.unfinished[ancestors],
            self.steps[ancestors],
            self.reason[ancestors],
            [self.history[a] for a in ancestors],
            [self.errors[a] for a in ancestors],
        )
