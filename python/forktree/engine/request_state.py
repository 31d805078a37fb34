"""Requests being answered: which of their branches still wait, and what has been found for the others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forktree.checks import integer
from forktree.device.transfer import Download
from forktree.engine.worker import ModelWorker
from forktree.errors import InvalidInput, NonFinite, RewardError
from forktree.kv import Branch, Tree
from forktree.ops.token_request import TokenScores
from forktree.rewards.base import PendingReward, RewardInput, Rewards
from forktree.search.request import Extend, NextLogits, ScoreTokens
from forktree.types import Int32Array


class RequestState:
    """A request being answered."""

    def __init__(self, worker: ModelWorker, branches: Sequence[Branch]) -> None:
        self.worker, self.branches = worker, list(branches)
        self.hidden: list[Tensor | None] = [None] * len(self.branches)

    def waiting(self) -> list[Branch]:
        """Branches whose hidden state is still wanted."""
        return [b for b, h in zip(self.branches, self.hidden, strict=True) if h is None]

    def collect(self) -> Tensor | None:
        """Takes what is ready; `[n, H]` once all is. Ready states are kept here, as a node holds only one."""
        waiting = [i for i, h in enumerate(self.hidden) if h is None]
        ready = [
            i for i, r in zip(waiting, self.worker.is_ready([self.branches[i] for i in waiting]), strict=True) if r
        ]
        if ready:
            rows = self.worker.hidden([self.branches[i] for i in ready])
            if len(ready) == len(self.branches):
                return rows
            for i, row in zip(ready, rows, strict=True):
                self.hidden[i] = row
        if len(ready) < len(waiting):
            return None
        if not self.branches:
            return self.worker.hidden([])
        return torch.stack([h for h in self.hidden if h is not None])


class RewardState(RequestState):
    def __init__(self, pending_reward: PendingReward, given: RewardInput) -> None:
        if not isinstance(pending_reward, PendingReward):
            raise RewardError(f"a reward's start must return a PendingReward, got {type(pending_reward).__name__}")
        own = pending_reward.worker
        super().__init__(own or given.worker, pending_reward.branches if own else ())
        self.pending_reward, self.scored = pending_reward, given.branches

    def answer(self) -> Rewards | None:
        """What the reward says, None while it is at work. Raises if it gives no finite number and no reason why."""
        hidden = None
        if self.pending_reward.worker is not None and (hidden := self.collect()) is None:
            return None
        rewards = self.pending_reward.read(hidden)
        if rewards is None:
            return None
        if not isinstance(rewards, Rewards):
            raise RewardError(f"a reward must give Rewards, got {type(rewards).__name__}")
        n = len(self.scored)
        if not len(rewards.values) == len(rewards.errors) == n:
            raise RewardError(f"a reward must give {n} rewards and errors, one a branch, got {len(rewards.values)}")
        for i in np.flatnonzero(~np.isfinite(rewards.values)).tolist():
            if rewards.errors[i] is None:  # the model's own numbers: not one branch's fault
                fine = [k for k, error in enumerate(rewards.errors) if error is None]  # these were read, in this order
                read = dict(zip(fine, self.branches, strict=False)).get(i, self.scored[i])
                raise NonFinite.of("reward", i, read.length)
        return rewards


class TokensState(RequestState):
    """Scores or logits of the token behind each branch."""

    def __init__(self, request: ScoreTokens | NextLogits, worker: ModelWorker) -> None:
        super().__init__(worker, request.branches)
        self.request = request

    def answer(self) -> Tensor | TokenScores | None:
        """None while a branch waits. Raises if rows are not finite, or left no token, and are to be checked."""
        request, runner = self.request, self.worker.runner
        if (hidden := self.collect()) is None:
            return None
        if isinstance(request, NextLogits):
            logits = runner.logits(hidden)
            if request.checked:
                self._check(logits.amax(dim=-1))
            return logits
        scores = runner.score(hidden, request.request)
        if request.checked:
            try:
                scores.check()
            except NonFinite:
                if "lse" in scores:
                    self._check(scores.lse)  # names the branch
                raise
        return scores

    def _check(self, numbers: Tensor) -> None:
        finite = numbers.isfinite().cpu().numpy()
        if not finite.all():
            bad = int(np.argmin(finite))
            raise NonFinite.of("logits", bad, self.branches[bad].length)


class ExtendState(RequestState):
    def __init__(self, request: Extend, worker: ModelWorker) -> None:
        super().__init__(worker, request.branches)
        n = len(request.branches)
        self.request = request
        _, self.begin = worker.tree.tips(request.branches)  # their lengths
        beyond = self.begin + request.max_tokens - 1 > worker.runner.max_position  # the last token is not computed
        if beyond.any():
            bad = int(np.argmax(beyond))
            raise InvalidInput(
                f"branch {bad} has {self.begin[bad]} tokens: with max_tokens = {request.max_tokens[bad]} the model's "
                f"limit of {worker.runner.max_position} positions is passed"
            )
        self.open = np.ones(n, bool)
        self.reason = ["length"] * n
        self.log_prob = np.zeros(n)
        self.num_tokens = np.zeros(n, np.int64)
        self.drawn: list[list[int]] = [[] for _ in range(n)]  # what `stop` sees
        if request.unfinished is not None:
            self.drawn = [
                b.tokens[b.length - integer(f"unfinished of branch {i}", count, 0, b.length) :].tolist()
                for i, (b, count) in enumerate(zip(request.branches, request.unfinished, strict=True))
            ]
        self.ids = np.array([b.id for b in request.branches], np.int64)
        if len(np.unique(self.ids)) < n:
            raise InvalidInput(f"extend needs distinct branches, got {n} of which some are the same")

    def waiting(self) -> list[Branch]:
        return [self.branches[i] for i in np.flatnonzero(self.open)]

    def ready(self) -> NDArray[np.int64]:
        """Open branches whose next token can be drawn."""
        return np.flatnonzero(self.open)[self.worker.is_ready(self.waiting())]

    def count(self, rows: NDArray[np.int64]) -> None:
        """Counts a token drawn for each of `rows`, whatever it is; those that may have no more are closed."""
        self.num_tokens[rows] += 1
        self.open[rows] = self.num_tokens[rows] < self.request.max_tokens[rows]

    def take(
        self, rows: NDArray[np.int64], tokens: NDArray[np.int64], log_probs: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """Records the tokens that were drawn and closes the branches that stop; returns which become part of their
        branch, bool `[len(rows)]`: all but EOS. Raises if a row had no finite logits or no token left."""
        request = self.request
        if len(wrong := np.flatnonzero(~np.isfinite(log_probs))):
            bad = int(rows[wrong[0]])
            position = int(self.begin[bad] + self.num_tokens[bad]) - 1
            if log_probs[wrong[0]] == NO_TOKEN:
                raise InvalidInput(f"logits processors leave branch {bad} no token at position {position}")
            raise NonFinite.of("logits", bad, position)
        self.log_prob[rows] += log_probs
        stays = np.ones(len(rows), bool)
        for k, (i, token) in enumerate(zip(rows.tolist(), tokens.tolist(), strict=True)):
            if token in request.eos_token_ids:
                stays[k] = self.open[i] = False
                self.reason[i] = "eos"
            elif request.stop is not None:
                self.drawn[i].append(token)
                if request.stop(token, self.drawn[i]):
                    self.open[i], self.reason[i] = False, "stop"
        return stays


NO_TOKEN = np.inf  # the log-prob of a row that logits processors leave no token


@dataclass(eq=False)
class Drawn:
    """One token for every row of some `extend`s, drawn on the device; the host has yet to read them."""

    states: list[ExtendState]
    rows: list[NDArray[np.int64]]  # of each state, in the order of the tokens
    branches: list[Branch]  # whose tokens they are, [n]
    length: Int32Array  # of these before, [n]
    hidden: Tensor  # [n, H], what they were drawn from
    tokens: Tensor  # int64 [n]
    outcome: Download  # fp64 [2, n]: tokens, log-probs (NaN where the logits are not finite, NO_TOKEN)

    def parts(self) -> Iterator[tuple[ExtendState, NDArray[np.int64], slice]]:
        """Each state, its rows, and where these are among all."""
        first = 0
        for state, rows in zip(self.states, self.rows, strict=True):
            yield state, rows, slice(first, first := first + len(rows))

    def unchanged(self, tree: Tree, appended: bool) -> NDArray[np.bool_]:
        """Whether each branch is alive and as long as the draw left it, which may have `appended` a token. `[n]`"""
        ids = np.array([branch.id for branch in self.branches])
        return (ids >= 0) & (tree.branch_length[ids] == self.length + appended)

    def some(self, which: NDArray[np.bool_]) -> list[Branch]:
        """The branches of a mask `[n]`."""
        return [self.branches[k] for k in np.flatnonzero(which)]
