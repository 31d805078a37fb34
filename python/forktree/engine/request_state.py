"""Requests being answered: which of their branches still wait, and what has been found for the others."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from forktree.checks import integer
from forktree.engine.token_rows import in_order, joined, rows_of
from forktree.engine.worker import ModelWorker
from forktree.errors import InvalidInput, NonFinite, RewardError
from forktree.kv import Branch
from forktree.ops.token_request import TokenScores
from forktree.plan.layout import ranges
from forktree.rewards.base import PendingReward, RewardInput, Rewards
from forktree.search.request import NextLogits, ScoreSuffixes, ScoreTokens, SuffixScores
from forktree.types import BoolArray, Int64Array

Places = tuple[Int64Array, Int64Array]  # branches' ids, and a position in the text of each


class RequestState(ABC):
    """A request being answered, whose branches are all of one worker."""

    def __init__(self, worker: ModelWorker, branches: Sequence[Branch]) -> None:
        self.worker, self.branches = worker, tuple(branches)
        self.ids = worker.tree.ids(self.branches)
        self._numbers = self.ids.tolist()

    def check(self) -> None:
        """Raises if a branch was dropped meanwhile, by code of whoever."""
        if [branch.id for branch in self.branches] != self._numbers:
            self.worker.tree.ids(self.branches)

    def alive(self, rows: Int64Array) -> BoolArray:
        """Whether some of the branches were not dropped, `[len(rows)]`."""
        return np.array([self.branches[i].id >= 0 for i in rows.tolist()], bool)

    @property
    @abstractmethod
    def num_wanted(self) -> int:
        """How many hidden states are still wanted."""

    @abstractmethod
    def answer(self) -> Any:
        """What the search awaits; None if it is not there yet."""

    @abstractmethod
    def wanted(self) -> Places:
        """The tokens whose hidden states are still wanted. Raises as `check` does."""

    def fault(self) -> Exception | None:
        """Why the request cannot be answered any more, if so."""
        try:
            self.worker.check(*self.wanted())
        except Exception as failure:
            return failure
        return None

    def close(self) -> None:
        """Lets go of what it held; called exactly once."""
        return None

    def take_kept(self) -> None:
        """Takes wanted hidden states that the worker has kept."""
        return None

    def take_computed(self) -> None:
        """Takes wanted hidden states from the forward pass that has just been made."""
        return None

    def restart(self) -> None:
        """Forgets what was taken: it was computed with weights that the model no longer has."""
        return None


class RowsState(RequestState):
    """A request that wants the hidden states of the last tokens of each branch, one or more, whenever they come.

    Their rows are those of branch 0 from position `since[0]` to its end, then those of branch 1, …
    """

    def __init__(self, worker: ModelWorker, branches: Sequence[Branch], since: Int64Array | None = None) -> None:
        super().__init__(worker, branches)
        self._length = worker.tree.branch_length[self.ids].astype(np.int64)
        since = self._length - 1 if since is None else since
        self.indptr = np.concatenate([[0], np.cumsum(self._length - since)])
        self._id, self.position = np.repeat(self.ids, self._length - since), ranges(since, self._length - since)
        self.restart()

    def restart(self) -> None:
        self._left = np.arange(self.indptr[-1])  # rows
        self._taken: list[tuple[Int64Array, Tensor]] = []  # rows, and their hidden states

    def wanted(self) -> Places:
        self.check()
        if (self.worker.tree.branch_length[self.ids] != self._length).any():
            raise InvalidInput("branches of a request were changed while it was answered")
        return self._id[self._left], self.position[self._left]

    @property
    def num_wanted(self) -> int:
        return len(self._left)

    def take_kept(self) -> None:
        if len(self._left):
            self._take(*self.worker.kept(*self.wanted()))

    def take_computed(self) -> None:
        if len(self._left):
            self._take(*self.worker.computed(self._id[self._left], self.position[self._left]))

    def _take(self, found: BoolArray, hidden: Tensor) -> None:
        if found.any():
            self._taken.append((self._left[found], hidden))
            self._left = self._left[~found]

    def collected(self) -> list[tuple[Int64Array, Tensor]]:
        """What was taken since the last call: rows, and their hidden states."""
        self.take_kept()
        taken, self._taken = self._taken, []
        return taken

    def branch_of(self, row: int) -> int:
        """The branch that has a row."""
        return int(np.searchsorted(self.indptr, row, side="right")) - 1


class RewardState(RowsState):
    """Rewards of branches."""

    def __init__(self, pending_reward: PendingReward, given: RewardInput) -> None:
        if not isinstance(pending_reward, PendingReward):
            raise RewardError(f"a reward's start must return a PendingReward, got {type(pending_reward).__name__}")
        own = pending_reward.worker
        super().__init__(own or given.worker, pending_reward.branches if own else ())
        self.pending_reward, self.judged = pending_reward, given.branches

    def restart(self) -> None:
        super().restart()
        self._parts: list[tuple[Int64Array, Tensor]] = []

    def close(self) -> None:
        self.pending_reward.close()

    def answer(self) -> Rewards | None:
        """What the reward says, None while it is at work. Raises if it gives no finite number and no reason why."""
        hidden = None
        if self.pending_reward.worker is not None:
            self._parts += self.collected()
            if self.num_wanted:
                return None
            hidden = in_order(self._parts) if self._parts else self.worker.hidden(self.ids)
        rewards = self.pending_reward.read(hidden)
        if rewards is None:
            return None
        if not isinstance(rewards, Rewards):
            raise RewardError(f"a reward must give Rewards, got {type(rewards).__name__}")
        n = len(self.judged)
        if not len(rewards.values) == len(rewards.errors) == n:
            raise RewardError(f"a reward must give {n} rewards and errors, one a branch, got {len(rewards.values)}")
        for i in np.flatnonzero(~np.isfinite(rewards.values)).tolist():
            if rewards.errors[i] is None:  # the model's own numbers: not one branch's fault
                fine = [k for k, error in enumerate(rewards.errors) if error is None]  # these were read, in this order
                read = dict(zip(fine, self.branches, strict=False)).get(i, self.judged[i])
                raise NonFinite.of("reward", i, read.length)
        return rewards


class TokensState(RowsState):
    """Scores or logits of the tokens that follow rows.

    Each pass's rows are scored as they come, so that the hidden states of a long text are never all held at once.
    """

    def __init__(self, request: ScoreTokens | ScoreSuffixes | NextLogits, worker: ModelWorker) -> None:
        since = None if isinstance(request, ScoreTokens) else request.since
        if since is not None:
            ids = worker.tree.ids(request.branches)
            ends = zip(worker.tree.first_positions(ids).tolist(), worker.tree.branch_length[ids].tolist(), strict=True)
            for i, (first, length) in enumerate(ends):
                integer(f"since of branch {i}", int(since[i]), first, length)
        self.request = request
        super().__init__(worker, request.branches, since)

    def restart(self) -> None:
        super().restart()
        self._scores: list[tuple[Int64Array, TokenScores]] = []
        self._logits: list[tuple[Int64Array, Tensor]] = []

    def answer(self) -> Tensor | TokenScores | SuffixScores | None:
        """None while rows are missing. Raises if rows are not finite, or left no token, and are to be checked."""
        for rows, hidden in self.collected():
            self._ask(rows, hidden)
        if self.num_wanted:
            return None
        if not (self._scores or self._logits):  # nothing was wanted
            self._ask(self._left, self.worker.hidden(self.ids[:0]))
        request = self.request
        if isinstance(request, NextLogits):
            logits = in_order(self._logits)
            if request.checked:
                self._check(logits.amax(dim=-1))
            return logits
        scores = joined(self._scores, request.request)
        if request.checked:
            try:
                scores.check()
            except NonFinite:
                if "lse" in scores:
                    self._check(scores.lse)  # names the branch
                raise
        return SuffixScores(scores, self.indptr) if isinstance(request, ScoreSuffixes) else scores

    def _ask(self, rows: Int64Array, hidden: Tensor) -> None:
        request, runner = self.request, self.worker.runner
        if isinstance(request, NextLogits):
            self._logits.append((rows, runner.logits(hidden)))
        else:
            asked, count = request.request, int(self.indptr[-1])
            if not np.array_equal(rows, np.arange(count)):
                self.worker.check_request(asked, count)
                asked = rows_of(asked, rows)
            self._scores.append((rows, runner.score(hidden, asked)))

    def _check(self, numbers: Tensor) -> None:
        finite = numbers.isfinite().cpu().numpy()
        if not finite.all():
            bad = int(np.argmin(finite))
            raise NonFinite.of("logits", self.branch_of(bad), int(self.position[bad]) + 1)
