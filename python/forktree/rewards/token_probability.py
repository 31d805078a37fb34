"""Rewards that are the model's own probabilities of tokens: a judge's Yes against its No, or a digit it would give."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from forktree.checks import integer, number
from forktree.device.transfer import upload
from forktree.errors import InvalidInput, RewardError
from forktree.ops.token_request import TokenRequest
from forktree.rewards.base import PendingFromHidden, PendingReward, Reward, RewardInput

if TYPE_CHECKING:
    from forktree.engine.worker import ModelWorker


class TokenProbability(Reward):
    """What the next token is worth, if it is one of some: a judge's Yes against No, a digit from 0 to 9.

    Args:
        tokens: ids of at least two tokens.
        values: what each of them is worth; the reward is the expectation of that under `softmax(logits[tokens])`.
            Default: 1 for the first and 0 for the others, so that the reward is the first's probability among them.
        suffix: token ids of a question asked after each branch, on a fork that is dropped afterwards.
    """

    def __init__(
        self, tokens: Sequence[int], *, values: Sequence[float] | None = None, suffix: Sequence[int] = ()
    ) -> None:
        self._tokens = [integer(f"token {i} of tokens", t, 0) for i, t in enumerate(tokens)]
        self._suffix = [integer(f"token {i} of suffix", t, 0) for i, t in enumerate(suffix)]
        if len(self._tokens) < 2 or len(set(self._tokens)) != len(self._tokens):
            raise InvalidInput(f"tokens must be at least two different ids, got {self._tokens}")
        given = [1.0, *[0.0] * (len(self._tokens) - 1)] if values is None else list(values)
        self._values = np.array([number("values", v, "finite numbers", lambda x: True) for v in given])
        if len(self._values) != len(self._tokens):
            raise InvalidInput(f"values must be one for each of {len(self._tokens)} tokens, got {len(self._values)}")

    def check(self, worker: "ModelWorker") -> None:
        """See `Reward`."""
        bad = [t for t in (*self._tokens, *self._suffix) if t >= worker.runner.vocab_size]
        if bad:
            raise InvalidInput(f"token ids must lie in [0, {worker.runner.vocab_size}), got {bad}")

    def rewards_on(self, worker: "ModelWorker") -> Callable[[Tensor], Tensor]:
        """hidden `[n, H]` of the worker's model, after the suffix -> rewards fp64 `[n]`."""

        def rewards(hidden: Tensor) -> Tensor:
            select = upload(np.array(self._tokens), hidden.device)
            logits = worker.runner.score(hidden, TokenRequest(select=select)).selected_logits
            assert logits is not None
            return (logits.softmax(dim=-1).double() * upload(self._values, hidden.device)).sum(dim=-1)

        return rewards

    def start(self, given: RewardInput) -> PendingReward:
        """See `Reward`."""
        worker, branches = given.worker, list(given.branches)
        if not self._suffix:
            return PendingFromHidden(worker, branches, self.rewards_on(worker))
        most, added = worker.runner.max_position, len(self._suffix)
        errors = [
            RewardError(
                f"text and suffix must fit the model's {most} positions, got {b.length + added} tokens (branch {i})"
            )
            if b.length + added > most
            else None
            for i, b in enumerate(branches)
        ]
        asked = [worker.tree.fork(b, 1)[0] for b, error in zip(branches, errors, strict=True) if error is None]
        for branch in asked:
            branch.append(self._suffix)
        return PendingFromHidden(worker, asked, self.rewards_on(worker), errors=errors, temporary=True)
