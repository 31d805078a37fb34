"""Whether two mathematical expressions are the same, by math-verify, in a process that can be stopped."""

import importlib.util
import json
import queue
import subprocess
import sys
import threading
import weakref
from functools import cache
from pathlib import Path
from typing import Any

from forktree.errors import InvalidInput

START = 120.0  # seconds that the process may take to import sympy


class MathEquality:
    """Whether two texts are the same by math-verify: 1/2 and 0.5, x+1 and 1+x, sets in any order.

    An expression may keep sympy busy for ever, inside C where no signal or thread can end it: `9^9^9^9` does. So this
    runs in a process of its own, which is begun at the first comparison, ended when one takes too long, and begun anew.

    Args:
        time_limit: maximum number of seconds for a comparison; texts that take longer count as different.

    Raises:
        InvalidInput: math-verify is not installed.
    """

    def __init__(self, *, time_limit: float = 1.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise InvalidInput("equal='math' needs math-verify: pip install 'forktree[math]'")
        self.time_limit = time_limit
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __call__(self, a: Any, b: Any) -> bool:
        """Whether two texts are the same; anything else is so if it is equal in Python."""
        if not (isinstance(a, str) and isinstance(b, str)):
            return bool(a == b)
        with self._lock:
            process = self._running()
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps([a, b]) + "\n")
                process.stdin.flush()
                return self._answers.get(timeout=self.time_limit) == "true\n"
            except (queue.Empty, BrokenPipeError):
                self._end()
                return False

    def _running(self) -> "subprocess.Popen[str]":
        """The process, once it is ready."""
        if self._process is None or self._process.poll() is not None:
            # -P: the modules beside the script are not to hide those of the standard library
            command = [sys.executable, "-P", str(Path(__file__).with_name("math_process.py"))]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
            self._process, self._answers = process, queue.SimpleQueue()
            self._stop = weakref.finalize(self, _kill, process)
            threading.Thread(target=_forward, args=(process.stdout, self._answers), daemon=True).start()
            try:
                if self._answers.get(timeout=START) == "ready\n":
                    return process
            except queue.Empty:
                pass
            self._end()
            raise InvalidInput("equal='math' cannot import math-verify: try `python -c 'import math_verify'`")
        return self._process

    def _end(self) -> None:
        self._stop()
        self._process = None


@cache
def shared_math_equality() -> MathEquality:
    """The one that all searches use: its process takes seconds to begin, and lives as long as this one."""
    return MathEquality()


def _forward(lines: Any, answers: "queue.SimpleQueue[str]") -> None:
    for line in lines:
        answers.put(line)
    answers.put("")  # the process has ended


def _kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
