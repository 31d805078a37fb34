"""Results of the command line: JSON Lines that outlive a kill."""

import json
import os
from pathlib import Path
from typing import Any

from forktree.errors import InvalidInput


class ResultFile:
    """JSON Lines of results, each synced to disk when written. A line cut short by a kill is dropped on resume.

    A line has its input's number, the input itself, the result and the settings it was made with.
    """

    def __init__(
        self, command: str, path: Path, inputs: list[dict[str, str]], settings: dict[str, Any], *, resume: bool
    ) -> None:
        self.path, self.total = path, len(inputs)
        self._command, self._inputs, self._settings = command, inputs, json.loads(json.dumps(settings))
        self._done: set[int] = set()
        self._whole = 0  # bytes of complete lines
        if path.exists() and not resume:
            raise InvalidInput(f"--out {path} exists: name another file, or go on with it by --resume")
        if not path.parent.is_dir():
            raise InvalidInput(f"--out {path}: directory {path.parent} does not exist")
        if path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        self._whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[: self._whole].splitlines(), 1):
            try:
                record = json.loads(line)
                index, settings = record["index"], record["settings"]
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
                raise InvalidInput(f"{self.path}, line {number}: not a result of forktree {self._command}") from None
            known = isinstance(index, int) and 0 <= index < self.total
            if not known or not self._inputs[index].items() <= record.items():
                raise InvalidInput(
                    f"{self.path}, line {number}: what it was made of is not number {index} of the inputs"
                )
            if settings != self._settings:
                raise InvalidInput(
                    f"{self.path}, line {number}: made with {json.dumps(settings)}, expected "
                    f"{json.dumps(self._settings)}: use the same options, or another --out"
                )
            self._done.add(index)

    def missing(self) -> list[int]:
        """Numbers of the inputs that have no result yet."""
        return [i for i in range(self.total) if i not in self._done]

    def __enter__(self) -> "ResultFile":
        self._file = open(self.path, "ab")
        self._file.truncate(self._whole)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, index: int, result: dict[str, Any]) -> None:
        """Appends one result and waits until it is on disk."""
        record = {"index": index, **self._inputs[index], **result, "settings": self._settings}
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self._done.add(index)  # an interrupt while the disk is waited for finds it counted
        os.fsync(self._file.fileno())
