"""How much drafting pays: what a forward pass costs by its rows, against how much of a draft is accepted."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from forktree.types import BoolArray, Float64Array, Int64Array

BUSY = 32  # rows of a pass from which on nothing is drafted: a full batch gains nothing
MAX_STRETCH = 16  # tokens of plain decoding between two attempts
MAX_DRAFT = 256  # tokens of a draft of which records are kept

_MEMORY = 0.9  # weight of the past after another draft
_PRIOR = 2.0  # drafts that the expectation before the first is worth
_EXPECTED = 0.6  # of drafted tokens, of those whose parents are accepted; each further sibling of a token: a third
_SLOPE = 0.03  # of its time that a pass takes longer by a row more, until it is known
_ALLOWED = 0.02  # of the time so far, and two passes, may be lost by trying


class Payoff:
    """Costs and gains of drafts, as far as they are known.

    It decides only how much is drafted. As texts do not depend on that, they do not depend on the clock.

    Attributes:
        stretch: How many tokens to decode plainly before the next attempt.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.stretch = 2
        self._clock = clock
        self._seconds: dict[int, float] = {}  # of a pass, by its rows
        self._hit, self._seen = np.zeros(MAX_DRAFT), np.zeros(MAX_DRAFT)  # by place in a draft
        self._elapsed = self._lost = 0.0
        self._resting = False  # until the next plain pass
        self._rows = 0
        self._began = self._asked = 0.0
        self._kept: list[Int64Array] = []

    def begin(self, rows: int) -> None:
        """A pass of so many rows, or several, is about to be made."""
        self._rows = rows
        self._began = self._asked = self._clock()

    def tries(self) -> bool:
        """Whether it is worth asking for drafts."""
        return bool(self._seconds) and self._rows < BUSY and not self._resting and self._affordable(0)

    def choose(self, drafts: Sequence[Sequence[int]]) -> list[BoolArray]:
        """Which tokens of each draft, given as its parents, are worth a row."""
        rates = [self._rates(parents) for parents in drafts]
        rate, n = np.concatenate([*rates, np.zeros(0)]), self._rows
        order = np.argsort(-rate, kind="stable")
        gained = (n + np.cumsum(rate[order])) / n
        cost = self._times(n + np.arange(1 + len(rate)))
        best, count = 0, 0
        if len(rate):
            speed = gained * cost[0] / cost[1:]
            best = int(np.argmax(speed))
            if speed[best] > 1 or self._affordable(cost[1 + (best := min(3, len(rate) - 1))] - cost[0] * gained[best]):
                count = best + 1
        keep = np.zeros(len(rate), bool)
        keep[order[:count]] = True
        kept = np.split(keep, np.cumsum([len(parents) for parents in drafts])[:-1])
        self._kept = [np.flatnonzero(some) for some in kept]
        self._asked = self._clock()
        return kept

    def plain(self, passes: int, *, measured: bool) -> None:
        """So many plain passes were made. measured: whether they computed nothing else."""
        now = self._clock()
        tried, self._resting = self._asked > self._began, False
        if not measured:
            return
        self._learn(self._rows, (now - self._asked) / passes)
        self._elapsed += now - self._began
        self._lost += self._asked - self._began
        if tried or self.stretch > 2:
            self.stretch = min(2 * self.stretch, MAX_STRETCH)

    def verified(self, accepted: Sequence[Sequence[int]], *, measured: bool) -> None:
        """A pass verified what was chosen; of each draft the places, among those kept, of what was accepted."""
        n, drafted, won = self._rows, sum(map(len, self._kept)), sum(map(len, accepted))
        for kept, places in zip(self._kept, accepted, strict=True):
            known = kept[kept < MAX_DRAFT]
            self._seen[known] = _MEMORY * self._seen[known] + 1
            self._hit[known] *= _MEMORY
            hit = kept[list(places)]
            self._hit[hit[hit < MAX_DRAFT]] += 1
        if measured:
            spent = self._clock() - self._began
            worth = (n + won) / n * float(self._times(np.array([n]))[0])
            self._learn(n + drafted, spent)
            self._elapsed += spent
            self._lost = max(self._lost + spent - worth, -4 * worth)
            paid = spent <= worth
        else:
            paid = won > 0
        self._resting = not paid
        self.stretch = 1 if paid else min(2 * self.stretch, MAX_STRETCH)

    def _affordable(self, loss: float) -> bool:
        pass_time = float(self._times(np.array([self._rows]))[0])
        return self._lost + loss <= _ALLOWED * self._elapsed + 2 * pass_time

    def _rates(self, parents: Sequence[int]) -> Float64Array:
        """How often each token of a draft is likely to be accepted, never more often than its parent. `[n]`."""
        rate = np.zeros(len(parents))
        siblings: dict[int, int] = {}
        hit, seen = self._hit[: len(parents)].tolist(), self._seen[: len(parents)].tolist()
        for j, parent in enumerate(parents[:MAX_DRAFT]):
            above = 1.0 if parent < 0 else float(rate[parent])
            nth = siblings[parent] = siblings.get(parent, -1) + 1
            rate[j] = min(above, (hit[j] + _PRIOR * _EXPECTED * above / 3**nth) / (seen[j] + _PRIOR))
        return rate

    def _learn(self, rows: int, seconds: float) -> None:
        known = self._seconds.get(rows)
        # a pass that took far longer than ever did something else too
        self._seconds[rows] = seconds if known is None else known + 0.25 * (min(seconds, 2 * known) - known)

    def _times(self, rows: Int64Array) -> Float64Array:
        """Seconds of passes of so many rows, between and beyond those that were made. `[n]`."""
        known = sorted(self._seconds)
        seconds = [self._seconds[k] for k in known]
        if not known or min(seconds) <= 0:
            return np.ones(len(rows))
        beyond = np.maximum(rows - known[-1], 0)
        return np.asarray(np.interp(rows, known, seconds) * (1 + _SLOPE * beyond))
