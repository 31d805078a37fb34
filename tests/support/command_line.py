"""The commands as their users call them, and what they print and write."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tiny
from forktree import cli


def saved_model(path: Path) -> None:
    """A model that ends at 256 positions, and its tokenizer."""
    tiny.new_model(rope_parameters=tiny.LIMITED).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)


def called(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of `forktree` with these words, in this process."""
    monkeypatch.setattr(sys, "argv", ["forktree", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def interrupted(words: list[str], out: Path, by: signal.Signals, **variables: str) -> tuple[int, str, list[bytes]]:
    """`forktree` in a process of its own, sent a signal after its first result.

    Returns exit code, standard error and the whole lines of `out`.
    """
    command = [sys.executable, "-c", "from forktree.cli import main; main()", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not (out.exists() and out.read_bytes().count(b"\n")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(by)
    error = process.communicate(timeout=60)[1]
    lines = out.read_bytes().splitlines(keepends=True)
    return process.returncode, error, [line for line in lines if line.endswith(b"\n")]


def records(path: Path) -> list[dict[str, Any]]:
    """Results, without the header line; a line ends with a line feed only."""
    _, *lines = (path / "out.jsonl").read_bytes().removesuffix(b"\n").split(b"\n")
    return sorted(map(json.loads, lines), key=lambda r: r["index"])


def complaint(error: str) -> str:
    """The only complaint on standard error."""
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]
