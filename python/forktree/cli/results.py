"""Results of the command line: JSON Lines that outlive a kill, and that one run at a time writes."""

import contextlib
import fcntl
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import forktree
from forktree.errors import ForktreeError, InvalidInput


class ResultFile:
    """One line a result, synced to disk when written, after a header line that says what they were made with.

    A result line has its input's number, the input itself and the result. The file is locked as long as it is open.
    What it holds is looked at under the lock, and only the beginning of a line of this very run, cut short by a kill,
    is ever removed. A run that leaves no result leaves no file.

    Args:
        command: whose results they are.
        path: where they are written to.
        source: where the inputs come from.
        inputs: what each result is of.
        made_with: all that decides the results but the inputs.
        keys: of every result, in order.
        resume: continue a file that was made with the same.

    Raises:
        InvalidInput: the file cannot be written, is in use, or holds something else.
    """

    def __init__(
        self,
        command: str,
        path: Path,
        source: Path,
        inputs: list[dict[str, str]],
        made_with: dict[str, Any],
        keys: Sequence[str],
        *,
        resume: bool,
    ) -> None:
        self.path, self.total = path, len(inputs)
        self._what, self._inputs, self._keys = f"forktree {command}", inputs, tuple(keys)
        self._header = _line({"header": {"command": command, "forktree": forktree.__version__, **made_with}})
        self._done: set[int] = set()
        self._size = 0  # bytes of complete lines
        self._open(source)
        try:
            self._lock()
            content = self._file.read()
            if content and not resume:
                raise InvalidInput(f"--out {path} exists: name another file, or go on with it by --resume")
            self._read(content)
        except BaseException:
            self._file.close()
            raise

    def _open(self, source: Path) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            if not self.path.parent.is_dir():
                raise InvalidInput(f"--out {self.path}: directory {self.path.parent} does not exist")
            if self.path.exists():
                if not self.path.is_file():
                    raise InvalidInput(f"--out {self.path}: expected a file, got a directory, pipe or device")
                if self.path.samefile(source):
                    raise InvalidInput(f"--out {self.path} is the file that the inputs are read from: name another")
            try:
                descriptor = os.open(self.path, flags | os.O_EXCL, 0o666)
                self._is_new = True
            except FileExistsError:
                descriptor = os.open(self.path, flags, 0o666)
                self._is_new = False
        except OSError as error:
            raise InvalidInput(f"--out {self.path}: cannot be opened: {error.strerror}") from None
        self._file = io.FileIO(descriptor, "a+")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(f"--out {self.path}: another run, or what it left running, is writing to it") from None
        except OSError as error:  # some network file systems have no locks
            warnings.warn(
                f"--out {self.path}: no lock here ({error.strerror}): let no other run write to it", stacklevel=2
            )
        if not self.path.exists() or not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
            raise InvalidInput(f"--out {self.path}: another run has just removed it: try again")
        self._file.seek(0)

    def _read(self, content: bytes) -> None:
        self._size = content.rfind(b"\n") + 1
        *lines, tail = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise InvalidInput(f"{self.path}, line {number}: not a result of {self._what}")
            if number == 1:
                self._compare(record)
            else:
                self._count(number, line, record)
        begun = (self._beginning(i) for i in self.missing()) if lines else iter([self._header])
        if tail and not any(start.startswith(tail) or tail.startswith(start) for start in begun):
            raise InvalidInput(
                f"{self.path}: what follows its last complete line is not the beginning of a result of {self._what}: "
                f"{tail[:40]!r}"
            )

    def _compare(self, record: dict[str, Any]) -> None:
        there, now = (dict(_flat(r.get("header", {}))) for r in (record, json.loads(self._header)))
        if there.get("command") != now["command"]:
            raise InvalidInput(f"{self.path}, line 1: not the header of a result file of {self._what}")
        for name in sorted({*there, *now}):
            if there.get(name) != now.get(name):
                old, new = (json.dumps(x[name]) if name in x else "nothing" for x in (there, now))
                raise InvalidInput(
                    f"{self.path} was made with another {name}: {old:.60} there, {new:.60} now; go on with the same, "
                    "or name another --out"
                )

    def _count(self, number: int, line: bytes, record: dict[str, Any]) -> None:
        index = record.get("index")
        if type(index) is not int or tuple(record)[-len(self._keys) :] != self._keys or index in self._done:
            raise InvalidInput(f"{self.path}, line {number}: not a result of {self._what}, or one that is there twice")
        if not 0 <= index < self.total or not line.startswith(self._beginning(index)):
            raise InvalidInput(f"{self.path}, line {number}: what it was made of is not number {index} of the inputs")
        self._done.add(index)

    def _beginning(self, index: int) -> bytes:
        """How every result of this input begins."""
        given = _line({"index": index, **self._inputs[index]})
        return given.removesuffix(b"}\n") + f', "{self._keys[0]}": '.encode()

    def missing(self) -> list[int]:
        """Numbers of the inputs that have no result yet."""
        return [i for i in range(self.total) if i not in self._done]

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_new and not os.fstat(self._file.fileno()).st_size:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def write(self, index: int, result: dict[str, Any]) -> None:
        """Appends one result, whose keys are those named, and waits until it is on disk."""
        assert tuple(result) == self._keys
        lines = _line({"index": index, **self._inputs[index], **result})
        if not self._size:
            lines = self._header + lines
        try:
            self._file.truncate(self._size)
            rest = memoryview(lines)
            while rest:
                rest = rest[self._file.write(rest) :]
            self._size += len(lines)
            self._done.add(index)  # an interrupt while the disk is waited for finds it counted
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise ForktreeError(
                f"{self.path}: cannot be written: {error.strerror}; {len(self._done)} of {self.total} results are in "
                "it, go on with --resume"
            ) from None


def _line(record: dict[str, Any]) -> bytes:
    """One line of JSON; a lone surrogate becomes the escape by which JSON writes it."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything within nested objects, by dotted names."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{name}.{key}" if name else key)
