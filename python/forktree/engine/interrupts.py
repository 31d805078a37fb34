"""Ctrl-C and calls that must not be cut short."""

import signal
import threading
from types import FrameType
from typing import Any


class DeferredInterrupts:
    """From `begin` to `end`, SIGINT waits; `end` delivers it to the handler that was there before.

    A second one while the first waits is delivered at once, wherever the call is: the way out of one that hangs. What
    is delivered may raise (`KeyboardInterrupt`, by default). In threads other than the main one, where Python handles
    no signals, inside another such call, and where SIGINT is ignored or not Python's own, nothing changes.
    """

    def __init__(self) -> None:
        self._before: Any = None  # the handler, while it is replaced
        self._waits = False

    def begin(self) -> None:
        """Once."""
        if threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGINT)
        if before in (None, signal.SIG_IGN) or isinstance(getattr(before, "__self__", None), DeferredInterrupts):
            return
        self._before = before  # first: from the next line on it has to be put back
        signal.signal(signal.SIGINT, self._receive)

    def end(self) -> None:
        """Any number of times: one that an interrupt cuts short is to be repeated."""
        if self._before is not None:
            before = self._before
            signal.signal(signal.SIGINT, before)
            self._before = None
            if self._waits:
                self._waits = False
                _deliver(before, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._waits:
            self._waits = True
            return
        self._waits = False
        signal.signal(signal.SIGINT, self._before)
        _deliver(self._before, frame)


def _deliver(handler: Any, frame: FrameType | None) -> None:
    if callable(handler):
        handler(signal.SIGINT, frame)
    else:  # SIG_DFL
        signal.raise_signal(signal.SIGINT)
