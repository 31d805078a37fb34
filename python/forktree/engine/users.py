"""Who uses an engine: runs of one thread at a time, whose calls are critical sections."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from forktree.engine.critical import CriticalSection
from forktree.errors import DecoderInUse

T = TypeVar("T")


@dataclass(eq=False)
class Run:
    """One user of an engine, such as a call of `Decoder.search`: its searches end with it."""

    calls_back: bool = False  # code of the user's own is being called between two steps


class Users:
    """The runs that use an engine.

    Args:
        end: Cancels the searches of a run, within a critical section.
        recover: See `CriticalSection`.
    """

    def __init__(self, end: Callable[[Run], None], recover: Callable[[BaseException | None], None]) -> None:
        self._end = end
        self._critical = CriticalSection(recover)
        self._runs: set[Run] = set()
        self._left: deque[Run] = deque()  # runs that are over, whose searches have yet to be cancelled
        self._thread = 0  # of the last run

    @contextmanager
    def run(self) -> Iterator[Run]:
        """A run: what is left of its searches is cancelled when it ends, by whatever way.

        Raises:
            DecoderInUse: A run of another thread uses the engine, or one that is just calling its user's code; those go
                on undisturbed.
        """
        run = Run()
        try:
            try:
                self._open(run)
                yield run
            finally:
                self._close(run)
        finally:
            self._close(run)  # again, in case an interrupt cut that short

    def check_free(self, run: Run | None = None) -> None:
        """Raises `DecoderInUse` as `run` does, unless `run` was let in."""
        runs = list(self._runs)
        if run in runs:
            return
        if runs and self._thread != threading.get_ident():
            who = "in another thread"
        elif self._critical.mine or any(r.calls_back for r in runs):
            who = "by the very search that is calling it (a reward, stop, logits processor, on_step or run of its own)"
        else:
            return
        raise DecoderInUse(f"this Decoder is in use {who}: read or close those results first, or make a second Decoder")

    def call(self, call: Callable[[], T]) -> T:
        """What `call` returns or raises, run as a critical section."""

        def whole() -> T:
            self._end_left()
            result = call()
            self._end_left()
            return result

        return self._critical.run(whole)

    def _open(self, run: Run) -> None:
        self.check_free()
        self._thread = threading.get_ident()
        self._runs.add(run)

    def _close(self, run: Run) -> None:
        """Ends a run: now, or once the call under way is done. From any thread, any number of times."""
        self._runs.discard(run)
        self._left.append(run)
        if not self._critical.occupied:
            self.call(lambda: None)

    def _end_left(self) -> None:
        while self._left:
            self._end(self._left.popleft())
