"""Calls that change an engine: one at a time, and whole or not at all."""

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from forktree.engine.interrupts import DeferredInterrupts
from forktree.errors import DecoderInUse

T = TypeVar("T")


class CriticalSection:
    """Runs calls one at a time, with interrupts deferred.

    A call made by a call that is under way is refused; a call of another thread waits.

    Args:
        recover: makes the state new, whatever it was, after an exception passed through a call. It is told which; it
            may be called again if it was itself cut short.
    """

    def __init__(self, recover: Callable[[BaseException | None], None]) -> None:
        self._recover = recover
        self._lock = threading.RLock()
        self._inside: int | None = None  # the thread
        self._whole = True  # no call has changed half of the state

    @property
    def occupied(self) -> bool:
        """Whether a call is under way, in any thread."""
        return self._inside is not None

    @property
    def mine(self) -> bool:
        """Whether a call is under way in this thread."""
        return self._inside == threading.get_ident()

    def run(self, call: Callable[[], T]) -> T:
        """What `call` returns or raises. Raises `DecoderInUse` inside another call of this thread."""
        if self.mine:
            raise DecoderInUse(
                "this Decoder is in use by the very search that is calling it (from a reward, a stop, a logits "
                "processor or its own code); await requests instead, or make a second Decoder on the same model"
            )
        entry = _Entry()
        try:
            try:
                entry.begin()
                entry.holds = True  # or is about to
                self._lock.acquire()
                self._inside = threading.get_ident()
                self._whole = False
                result = call()
                self._whole = True
                return result
            finally:
                self._leave(entry)
        finally:
            self._leave(entry)  # again, in case an interrupt cut that short

    def _leave(self, entry: "_Entry") -> None:
        if entry.holds:
            if self.mine:
                if not self._whole:
                    self._recover(sys.exception())
                    self._whole = True
                self._inside = None
            with suppress(RuntimeError):  # it was not acquired, or is released already
                self._lock.release()
            entry.holds = False
        entry.end()


class _Entry(DeferredInterrupts):
    """One call under way."""

    holds = False  # the lock
