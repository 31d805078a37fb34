"""Inputs of the command line: JSON Lines and texts of options, all checked before anything runs."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

from forktree.errors import InvalidInput
from forktree.terminal import one_line


def read_inputs(option: str, path: Path, forms: list[tuple[str, ...]]) -> list[dict[str, str]]:
    """The inputs of a JSON Lines file: of each line the texts that one of `forms` names. Every line is checked.

    The file is UTF-8, with or without a byte order mark. Lines end with a line feed, or carriage return and line
    feed; no other character ends one. Empty lines count, and give nothing.
    """
    expected = " or ".join(json.dumps(dict.fromkeys(form, "some text")) for form in forms)
    known = {key for form in forms for key in form}
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise InvalidInput(f"{option} {path}: cannot be read: {error.strerror}") from None
    inputs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _parse(line, f"{path}, line {number}")
        one = {key: record[key] for key in record if key in known} if isinstance(record, dict) else {}
        fine = (isinstance(text, str) and (text or key == "response") for key, text in one.items())
        if set(one) not in map(set, forms) or not all(fine):
            raise InvalidInput(f"{path}, line {number}: expected {expected}, got {_start(line)}")
        for key, text in one.items():
            _check_characters(text, f"{path}, line {number}: {key}")
        inputs.append(one)
    if not inputs:
        raise InvalidInput(f"{path}: expected at least one line {expected}, got none")
    return inputs


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers of too many digits, nesting too deep
        raise InvalidInput(f"{where}: expected a JSON object, got {_start(line)}: {one_line(error)}") from None


def _start(line: bytes) -> str:
    return repr(line[:60].decode(errors="replace"))


def option_text(option: str, text: str, *, escape: bool) -> str:
    """The text of an option as it is; with `escape`, read as what stands between the quotes of a JSON string."""
    if escape:
        quoted = re.sub(r'\\.|"', lambda found: found[0] if found[0] != '"' else '\\"', text, flags=re.DOTALL)
        try:
            text = json.loads(f'"{quoted}"', strict=False)
        except ValueError:
            raise InvalidInput(
                rf"{option}: --escape reads the escapes of JSON (\n, \t, \\, \u00e9), and no others, got {text!r}"
            ) from None
    elif re.fullmatch(r"(\\[ntr])+", text):
        warnings.warn(
            f"{option} {text} is a backslash and a letter; --escape makes it a line feed or tab", stacklevel=2
        )
    _check_characters(text, option)
    return text


def _check_characters(text: str, what: str) -> None:
    if surrogate := re.search("[\ud800-\udfff]", text):
        at = surrogate.start()
        raise InvalidInput(f"{what} must be text, got half of a character, {surrogate[0]!r}, at {at}")
