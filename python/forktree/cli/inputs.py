"""Inputs of the command line: JSON Lines, every line checked before anything runs."""

import json
from pathlib import Path

from forktree.errors import InvalidInput


def read_inputs(option: str, path: Path, forms: list[tuple[str, ...]]) -> list[dict[str, str]]:
    """The inputs of a JSON Lines file: of each line the texts that one of `forms` names. Every line is checked."""
    expected = " or ".join(json.dumps(dict.fromkeys(form, "some text")) for form in forms)
    known = {key for form in forms for key in form}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{option} {path}: cannot be read: {error}") from None
    inputs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidInput(f"{path}, line {number}: expected a JSON object, got {line[:40]!r}: {error}") from None
        one = {key: record[key] for key in record if key in known} if isinstance(record, dict) else {}
        fine = (isinstance(text, str) and (text or key == "response") for key, text in one.items())
        if set(one) not in map(set, forms) or not all(fine):
            raise InvalidInput(f"{path}, line {number}: expected {expected}, got {line[:60]!r}")
        inputs.append(one)
    if not inputs:
        raise InvalidInput(f"{path}: expected at least one line {expected}, got none")
    return inputs
