"""How far the branches of an `extend` have come, whoever samples their tokens."""

from typing import NoReturn

import numpy as np

from forktree.checks import integer
from forktree.errors import InvalidInput, NonFinite
from forktree.ops.sampling import Sampling
from forktree.search.processors import NO_TOKEN
from forktree.search.request import Extend, Extension
from forktree.types import Int64Array


class Progress:
    """Which branches of an `extend` go on, and why the others ended: a struct of arrays and lists, `[n]` each.

    Attributes:
        request: What was asked.
        sampling: How tokens of each branch are sampled.
        begin: Its length before. int64.
        open: Whether it goes on. bool.
        reason: Why it ended, see `Extension`.
        log_prob: Sum of its tokens' log-probs. fp64.
        num_tokens: Tokens sampled for it, EOS included. int64.
        shown: What `stop` sees.
    """

    def __init__(self, request: Extend) -> None:
        branches, n = request.branches, len(request.branches)
        self.request = request
        self.sampling = [request.sampling] * n if isinstance(request.sampling, Sampling) else list(request.sampling)
        self.begin = np.array([branch.length for branch in branches], np.int64)
        self.open = np.ones(n, bool)
        self.reason = ["length"] * n
        self.log_prob = np.zeros(n)
        self.num_tokens = np.zeros(n, np.int64)
        self.shown: list[list[int]] = [[] for _ in range(n)]
        if request.unfinished is not None:
            self.shown = [
                b.tokens[b.length - integer(f"unfinished of branch {i}", count, 0, b.length) :].tolist()
                for i, (b, count) in enumerate(zip(branches, request.unfinished, strict=True))
            ]

    def count(self, rows: Int64Array) -> None:
        """Counts a token sampled for each of `rows`, whatever it is; those that may have no more are closed."""
        self.num_tokens[rows] += 1
        self.open[rows] = self.num_tokens[rows] < self.request.max_tokens[rows]

    def take(self, i: int, token: int, log_prob: float) -> bool:
        """Whether a token, which was counted, becomes part of branch i: all but EOS. Closes the branch if it ends.

        Raises:
            NonFinite: There were no finite logits.
            InvalidInput: Processors left no token.
        """
        if not np.isfinite(log_prob):
            self._refuse(i, log_prob)
        self.log_prob[i] += log_prob
        if token in self.request.eos_token_ids:
            self.open[i], self.reason[i] = False, "eos"
            return False
        if self.request.stop is not None:
            self.shown[i].append(token)
            if self.request.stop(token, self.shown[i]):
                self.open[i], self.reason[i] = False, "stop"
        return True

    def _refuse(self, i: int, log_prob: float) -> NoReturn:
        position = int(self.begin[i] + self.num_tokens[i]) - 1
        if log_prob == NO_TOKEN:
            raise InvalidInput(f"logits processors leave branch {i} no token at position {position}")
        raise NonFinite.of("logits", i, position)

    def answer(self) -> Extension:
        """What was done to each branch, once none is open."""
        return Extension(self.reason, self.log_prob, self.num_tokens)
