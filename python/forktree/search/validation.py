"""Checks of settings that several searches have."""

from collections.abc import Collection, Sequence

from forktree.errors import InvalidInput


def check_texts(name: str, value: object) -> None:
    """Raises InvalidInput unless `value` is a sequence of texts; a single text would be taken for its characters."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise InvalidInput(f"{name} must be a tuple of texts, got {value!r}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises InvalidInput unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidInput(f"{name} must be one of {', '.join(choices)}, got {value!r}")
