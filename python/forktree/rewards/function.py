"""Rewards that a Python function gives, of the text or of token ids."""

import math
import queue
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from forktree.checks import number
from forktree.errors import InvalidInput, RewardError
from forktree.rewards.base import PendingReward, Reward, RewardInput, Rewards


class CallingReward(Reward):
    """Calls a Python function for every branch. It runs beside the decoding, in a thread.

    A call that raises, returns something other than a finite number, or takes too long costs its branch only. A call
    that never returns keeps its thread: Python cannot end it.

    Args:
        function: gives a finite number; a subclass says of what.
        time_limit: maximum number of seconds for a call.
    """

    def __init__(self, function: Callable[..., float], *, time_limit: float = 60.0) -> None:
        if not callable(function):
            raise InvalidInput(f"function must be callable, got {type(function).__name__}")
        if time_limit != math.inf:
            number("time_limit", time_limit, "more than 0 seconds", lambda t: t > 0)
        self.function, self.time_limit = function, time_limit

    @abstractmethod
    def arguments(self, given: RewardInput) -> list[tuple[Any, ...]]:
        """Of each branch what the function is called with, `[n]`."""

    def start(self, given: RewardInput) -> PendingReward:
        """See `Reward`."""
        return _PendingCalls(self, self.arguments(given))


class FunctionReward(CallingReward):
    """Any Python function of the text. It runs beside the decoding, in a thread.

    A call that raises, returns something other than a finite number, or takes too long costs its branch only. A call
    that never returns keeps its thread: Python cannot end it.

    Args:
        function: `(prompt, response) -> float`.
        time_limit: maximum number of seconds for a call.
    """

    def __init__(self, function: Callable[[str, str], float], *, time_limit: float = 60.0) -> None:
        super().__init__(function, time_limit=time_limit)

    def arguments(self, given: RewardInput) -> list[tuple[Any, ...]]:
        """Prompt and response."""
        return list(zip(given.prompts, given.responses(), strict=True))


class _PendingCalls(PendingReward):
    def __init__(self, reward: CallingReward, calls: list[tuple[Any, ...]]) -> None:
        self._reward, self._calls = reward, calls
        self._values = np.full(len(calls), np.nan)
        self._errors: list[RewardError | None] = [None] * len(calls)
        self._next = 0
        self._start()

    def _start(self) -> None:
        """A thread works through the calls that are left; it stops by itself when another one replaces it."""
        self._answers: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        self._since = time.monotonic()
        threading.Thread(target=self._work, args=(self._next, self._answers), daemon=True).start()

    def _work(self, first: int, answers: "queue.SimpleQueue[tuple[int, Any, BaseException | None]]") -> None:
        for i in range(first, len(self._calls)):
            if answers is not self._answers:
                return
            try:
                answers.put((i, self._reward.function(*self._calls[i]), None))
            except BaseException as error:  # a reward may raise anything, SystemExit included
                answers.put((i, None, error))

    def read(self, hidden: Tensor | None) -> Rewards | None:
        while not self._answers.empty():
            i, value, error = self._answers.get()
            self._record(i, value, error)
            self._since = time.monotonic()
        if self._next < len(self._calls) and time.monotonic() - self._since > self._reward.time_limit:
            self._fail(self._next, f"took longer than its time limit of {self._reward.time_limit:g} s")
            if self._next < len(self._calls):
                self._start()
        return Rewards(self._values, self._errors) if self._next == len(self._calls) else None

    def _record(self, i: int, value: Any, error: BaseException | None) -> None:
        if error is not None:
            return self._fail(i, f"raised {type(error).__name__}: {error}")
        try:
            if isinstance(value, str | bytes):  # float() would read its digits
                raise TypeError
            number = float(value)
        except Exception:  # a value's own __float__ may raise anything
            return self._fail(i, f"must return a number, got {type(value).__name__}")
        if not np.isfinite(number):
            return self._fail(i, f"must return a finite number, got {number}")
        self._values[i] = number
        self._next = i + 1

    def _fail(self, i: int, what: str) -> None:
        name = getattr(self._reward.function, "__qualname__", type(self._reward.function).__name__)
        self._errors[i] = RewardError(f"reward {name} {what} (branch {i})")
        self._next = i + 1

    def close(self) -> None:
        self._answers = queue.SimpleQueue()  # the thread sees that it is no longer wanted
