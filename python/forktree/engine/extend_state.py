"""`extend` being answered: which branches go on, and what has been sampled for each."""

import numpy as np
from torch import Tensor

from forktree.engine.request_state import Places, RequestState, RowsState
from forktree.engine.token_rows import in_order
from forktree.engine.worker import ModelWorker
from forktree.errors import InvalidInput
from forktree.ops.sampling import Sampling
from forktree.search.progress import Progress
from forktree.search.request import Extend, Extension
from forktree.types import BoolArray, Float64Array, Int64Array


class ExtendState(RequestState):
    """Branches that are open have tokens to come.

    In a race all of them are sampled together, so that they have as many tokens each; their first hidden states are
    kept here until all have one, as the tree keeps only one for branches that end in one node.
    """

    def __init__(self, request: Extend, worker: ModelWorker) -> None:
        super().__init__(worker, request.branches)
        self.request, self.progress = request, Progress(request)
        begin = self.progress.begin
        beyond = begin + request.max_tokens - 1 > worker.runner.max_position  # the last token is not computed
        if beyond.any():
            bad = int(np.argmax(beyond))
            raise InvalidInput(
                f"branch {bad} has {begin[bad]} tokens: with max_tokens = {request.max_tokens[bad]} the model's "
                f"limit of {worker.runner.max_position} positions is passed"
            )
        if len(np.unique(self.ids)) < len(self.ids):
            raise InvalidInput(f"extend needs distinct branches, got {len(self.ids)} of which some are the same")
        self._ended = 0
        self._first = None if request.race is None else _FirstRows(worker, request.branches)

    @property
    def open(self) -> BoolArray:
        """Which branches have tokens to come, `[n]`."""
        return self.progress.open

    @property
    def sampling(self) -> list[Sampling]:
        """How tokens of each branch are sampled, `[n]`."""
        return self.progress.sampling

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
        self.progress.count(rows)
        self._first = None

    def take(self, rows: Int64Array, tokens: Int64Array, log_probs: Float64Array) -> BoolArray:
        """Records the tokens that were sampled and closes the branches that stop.

        Returns which tokens become part of their branch, bool `[len(rows)]`: all but EOS, and those after the end of a
        race. Raises if a row had no finite logits or no token left.
        """
        progress = self.progress
        stays = np.zeros(len(rows), bool)
        for k, (i, token, log_prob) in enumerate(
            zip(rows.tolist(), tokens.tolist(), log_probs.tolist(), strict=True)
        ):
            stays[k] = progress.take(i, token, log_prob)
            self._ended += not self.open[i]
            if self._ended == self.request.race and (self.open.any() or k + 1 < len(rows)):
                progress.num_tokens[rows[k + 1 :]] -= 1
                self.open[rows[k + 1 :]] = True
                for other in np.flatnonzero(self.open):
                    progress.reason[other] = "running"
                self.open[:] = False
                break
        return stays

    def answer(self) -> Extension:
        """What was done to each branch, once none is open and all tokens were read."""
        return self.progress.answer()


class _FirstRows(RowsState):
    def answer(self) -> Tensor:
        return in_order(self._taken)
