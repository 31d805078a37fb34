"""Integers that callers give: checked before anything is changed, never rounded, wrapped or broadcast."""

import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forktree.errors import InvalidInput

_BOOLS = {bool, np.bool_}


def integers(name: str, values: Any, low: int, high: int, *, count: int | None = None) -> NDArray[np.integer]:
    """`values` as a 1-D array; `InvalidInput` unless they are integers in [low, high), `count` of them if it is given.

    values: a sequence, array or tensor on the host. Booleans are no integers, nor are whole floats.
    """
    expected = f"{name} must be {'1-D' if count is None else count} integers in [{low}, {high})"
    try:
        found = np.asarray(values)
    except Exception:  # ragged, on a device, or an object of one's own
        raise InvalidInput(f"{expected}, got {values!r:.80}") from None
    kinds = map(type, values) if isinstance(values, list | tuple) else ()
    if found.ndim != 1 or (found.size and (found.dtype.kind not in "iu" or not _BOOLS.isdisjoint(kinds))):
        raise InvalidInput(f"{expected}, got {values!r:.80}")
    if count is not None and len(found) != count:
        raise InvalidInput(f"{expected}, got {len(found)}")
    if found.size == 0:
        return found.astype(np.int64)
    if not (found.min() >= low and found.max() < high):
        bad = int(np.argmax((found < low) | (found >= high)))
        raise InvalidInput(f"{expected}, got {found[bad]} at index {bad}")
    return found


def integer(name: str, value: Any, low: int, high: int) -> int:
    """`value` as an int; `InvalidInput` unless it is an integer in [low, high)."""
    try:
        found = None if type(value) in _BOOLS else operator.index(value)
    except Exception:
        found = None
    if found is None or not low <= found < high:
        raise InvalidInput(f"{name} must be an integer in [{low}, {high}), got {value!r:.80}")
    return found
