"""Rewards that are the model's own probability of a token: a judge's Yes against its No."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from forktree.checks import integer
from forktree.device.transfer import upload
from forktree.errors import InvalidInput, RewardError
from forktree.ops.token_request import TokenRequest
from forktree.rewards.base import PendingFromHidden, PendingReward, Reward, RewardInput

if TYPE_CHECKING:
    from forktree.engine.worker import ModelWorker


class TokenProbability(Reward):
    """`softmax(logits[tokens])[0]` of the next token: a judge's Yes against No, a 1 against a 0.

    Args:
        tokens: ids of at least two tokens; the reward is the probability of the first among them.
        suffix: token ids of a question asked after each branch, on a fork that is dropped afterwards.
    """

    def __init__(self, tokens: Sequence[int], *, suffix: Sequence[int] = ()) -> None:
        self._tokens = [integer(f"token {i} of tokens", t, 0) for i, t in enumerate(tokens)]
        self._suffix = [integer(f"token {i} of suffix", t, 0) for i, t in enumerate(suffix)]
        if len(self._tokens) < 2 or len(set(self._tokens)) != len(self._tokens):
            raise InvalidInput(f"tokens must be at least two different ids, got {self._tokens}")

    def check(self, worker: "ModelWorker") -> None:
        """See `Reward`."""
        bad = [t for t in (*self._tokens, *self._suffix) if t >= worker.runner.vocab_size]
        if bad:
            raise InvalidInput(f"token ids must lie in [0, {worker.runner.vocab_size}), got {bad}")

    def rewards_on(self, worker: "ModelWorker") -> Callable[[Tensor], Tensor]:
        """hidden `[n, H]` of the worker's model, after the suffix -> rewards fp32 `[n]`."""

        def rewards(hidden: Tensor) -> Tensor:
            select = upload(np.array(self._tokens), hidden.device)
            logits = worker.runner.score(hidden, TokenRequest(select=select)).selected_logits
            assert logits is not None
            return logits.softmax(dim=-1)[:, 0]

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
