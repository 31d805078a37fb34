"""`extend` being answered: which branches go on, and what has been sampled for each."""

import numpy as np
from torch import Tensor

from forktree.checks import integer
from forktree.engine.request_state import Places, RequestState, RowsState
from forktree.engine.token_rows import in_order
from forktree.engine.worker import ModelWorker
from forktree.errors import InvalidInput, NonFinite
from forktree.ops.sampling import Sampling
from forktree.search.request import Extend, Extension
from forktree.types import BoolArray, Float64Array, Int64Array

NO_TOKEN = np.inf  # the log-prob of a row that logits processors leave no token


class ExtendState(RequestState):
    """Branches that are open have tokens to come.

    In a race all of them are sampled together, so that they have as many tokens each; their first hidden states are
    kept here until all have one, as the tree keeps only one for branches that end in one node.
    """

    def __init__(self, request: Extend, worker: ModelWorker) -> None:
        super().__init__(worker, request.branches)
        n = len(request.branches)
        self.request = request
        self.sampling = [request.sampling] * n if isinstance(request.sampling, Sampling) else list(request.sampling)
        _, self._begin = worker.tree.tips(self.ids)  # their lengths
        beyond = self._begin + request.max_tokens - 1 > worker.runner.max_position  # the last token is not computed
        if beyond.any():
            bad = int(np.argmax(beyond))
            raise InvalidInput(
                f"branch {bad} has {self._begin[bad]} tokens: with max_tokens = {request.max_tokens[bad]} the model's "
                f"limit of {worker.runner.max_position} positions is passed"
            )
        if len(np.unique(self.ids)) < n:
            raise InvalidInput(f"extend needs distinct branches, got {n} of which some are the same")
        self.open = np.ones(n, bool)
        self._reason = ["length"] * n
        self._log_prob = np.zeros(n)
        self._num_tokens = np.zeros(n, np.int64)
        self._shown: list[list[int]] = [[] for _ in range(n)]  # what `stop` sees
        if request.unfinished is not None:
            self._shown = [
                b.tokens[b.length - integer(f"unfinished of branch {i}", count, 0, b.length) :].tolist()
                for i, (b, count) in enumerate(zip(request.branches, request.unfinished, strict=True))
            ]
        self._ended = 0
        self._first = None if request.race is None else _FirstRows(worker, request.branches)

    @property
    def num_wanted(self) -> int:
        return int(self.open.sum())

    def wanted(self) -> Places:
        if self._first is not None:
            return self._first.wanted()
        self.check()
        ids = self.ids[self.open]
        return ids, self.worker.tree.branch_length[ids].astype(np.int64) - 1

    def take_kept(self) -> None:
        if self._first is not None:
            self._first.take_kept()

    def take_computed(self) -> None:
        if self._first is not None:
            self._first.take_computed()

    def restart(self) -> None:
        if self._first is not None:
            self._first.restart()

    def ready(self) -> Int64Array:
        """Open branches whose next token can be sampled: in a race all of them or none."""
        self.check()
        rows = np.flatnonzero(self.open)
        if self._first is not None:
            return rows[:0] if self._first.num_wanted else rows
        ready = self.worker.is_ready(self.ids[rows])
        return rows[:0] if self.request.race is not None and not ready.all() else rows[ready]

    @property
    def has_own_hidden(self) -> bool:
        """Whether hidden states of ready rows are here, not in the worker."""
        return self._first is not None

    def hidden(self, rows: Int64Array) -> Tensor:
        """Hidden states of ready rows, `[len(rows), H]`."""
        return self.worker.hidden(self.ids[rows]) if self._first is None else self._first.answer()

    def count(self, rows: Int64Array) -> None:
        """Counts a token sampled for each of `rows`, whatever it is; those that may have no more are closed."""
        self._num_tokens[rows] += 1
        self.open[rows] = self._num_tokens[rows] < self.request.max_tokens[rows]
        self._first = None

    def take(self, rows: Int64Array, tokens: Int64Array, log_probs: Float64Array) -> BoolArray:
        """Records the tokens that were sampled and closes the branches that stop.

        Returns which tokens become part of their branch, bool `[len(rows)]`: all but EOS, and those after the end of a
        race. Raises if a row had no finite logits or no token left.
        """
        stays = np.zeros(len(rows), bool)
        for k, (i, token) in enumerate(zip(rows.tolist(), tokens.tolist(), strict=True)):
            if not np.isfinite(log_probs[k]):
                self._refuse(i, float(log_probs[k]))
            stays[k] = self._take(i, token)
            self._log_prob[i] += log_probs[k]
            self._ended += not self.open[i]
            if self._ended == self.request.race and (self.open.any() or k + 1 < len(rows)):
                self._num_tokens[rows[k + 1 :]] -= 1
                self.open[rows[k + 1 :]] = True
                for other in np.flatnonzero(self.open):
                    self._reason[other] = "running"
                self.open[:] = False
                break
        return stays

    def _take(self, i: int, token: int) -> bool:
        """Whether a token becomes part of branch i, which is closed if it ends."""
        request = self.request
        if token in request.eos_token_ids:
            self.open[i], self._reason[i] = False, "eos"
            return False
        if request.stop is not None:
            self._shown[i].append(token)
            if request.stop(token, self._shown[i]):
                self.open[i], self._reason[i] = False, "stop"
        return True

    def _refuse(self, i: int, log_prob: float) -> None:
        position = int(self._begin[i] + self._num_tokens[i]) - 1
        if log_prob == NO_TOKEN:
            raise InvalidInput(f"logits processors leave branch {i} no token at position {position}")
        raise NonFinite.of("logits", i, position)

    def answer(self) -> Extension:
        """What was done to each branch, once none is open and all tokens were read."""
        return Extension(self._reason, self._log_prob, self._num_tokens)


class _FirstRows(RowsState):
    def answer(self) -> Tensor:
        return in_order(self._taken)
