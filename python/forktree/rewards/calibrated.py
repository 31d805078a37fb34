"""Rewards that say how a text compares with others of its prompt."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from forktree.checks import number
from forktree.errors import InvalidInput
from forktree.rewards.base import PendingReward, Reward, RewardInput, Rewards, check_reward
from forktree.types import Float64Array

if TYPE_CHECKING:
    from forktree.engine.worker import ModelWorker

TRANSFORMS = ("rank", "exp", "logit")


class Calibrated(Reward):
    """InfAlign's calibrated reward C (Balashankar et al. 2024): the share of reference texts with a lower reward.

    C is the same for every increasing function of a reward, and comparable between prompts. Of one prompt's texts it
    keeps the order, so best-of-n does not change; it acts where rewards are added or compared between prompts: weighted
    votes, particle weights, thresholds. Reconstructed: that the references are the other texts that are judged in the
    same call, where none are given.

    Args:
        reward: what is calibrated.
        references: rewards of reference texts of the prompt, `[m]`. Default: those of the other branches of a call; one
            branch alone has C = 1/2.
        transform: "rank" gives C; "exp" gives exp(t (C - 1)), in (0, 1], as weights of a vote; "logit" gives the number
            in (0, 1) whose logit is t C, so that a particle filter weighs a text by exp(t C).
        t: how much the best texts are favoured; the paper's is 10.
    """

    def __init__(
        self, reward: Reward, *, references: ArrayLike | None = None, transform: str = "rank", t: float = 10.0
    ) -> None:
        check_reward(reward)
        if transform not in TRANSFORMS:
            raise InvalidInput(f"transform must be one of {', '.join(TRANSFORMS)}, got {transform!r}")
        number("t", t, "more than 0", lambda value: value > 0)
        self._reward, self._transform, self._t = reward, transform, t
        self._references = None if references is None else np.asarray(references, np.float64)
        some = self._references
        if some is not None and (some.ndim != 1 or not len(some) or not np.isfinite(some).all()):
            raise InvalidInput(f"references must be finite rewards [m], at least one, got {some.tolist()!r:.80}")

    def check(self, worker: "ModelWorker") -> None:
        """See `Reward`."""
        self._reward.check(worker)

    def start(self, given: RewardInput) -> PendingReward:
        """See `Reward`."""
        return _Calibrating(self, self._reward.start(given))

    def transformed(self, rewards: Float64Array) -> Float64Array:
        """What this gives for `rewards [n]` of one call; NaN stays."""
        c = calibrated(rewards, self._references)
        if self._transform == "exp":
            return np.exp(self._t * (c - 1))
        return 1 / (1 + np.exp(-self._t * c)) if self._transform == "logit" else c


def calibrated(rewards: Float64Array, references: Float64Array | None = None) -> Float64Array:
    """The share of `references [m]` that are lower than each of `rewards [n]`, those that are equal by half.

    NaN is no reward: it stays NaN, and is no reference. References: default, the other rewards; of a single one 1/2.
    """
    known = rewards[~np.isnan(rewards)]
    sorted_ = np.sort(known if references is None else references)
    lower, upto = (np.searchsorted(sorted_, rewards, side=side) for side in ("left", "right"))
    others = len(sorted_) - (references is None)
    if others == 0:
        return np.where(np.isnan(rewards), np.nan, 0.5)
    itself = 0.5 if references is None else 0.0
    return np.where(np.isnan(rewards), np.nan, ((lower + upto) / 2 - itself) / others)


class _Calibrating(PendingReward):
    def __init__(self, reward: Calibrated, pending: PendingReward) -> None:
        self._reward, self._pending = reward, pending
        self.worker, self.branches = pending.worker, pending.branches

    def read(self, hidden: Tensor | None) -> Rewards | None:
        found = self._pending.read(hidden)
        return None if found is None else Rewards(self._reward.transformed(found.values), found.errors)

    def close(self) -> None:
        self._pending.close()
