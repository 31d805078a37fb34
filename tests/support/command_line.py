"""What the commands print and write."""

import json
from pathlib import Path
from typing import Any


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
