"""Checks of the numbers that callers give: types as well as ranges, before anything is done with them.

Nothing is rounded, wrapped or broadcast.
"""

import math
import operator
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch

from forktree.errors import InvalidInput
from forktree.types import AnyArray

INTEGER_TENSORS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_BOOLS = {bool, np.bool_}


def is_integer(value: Any) -> bool:
    """Whether `value` is one integer: Python's, numpy's, or an array or tensor without dimensions; not a bool."""
    if isinstance(value, np.ndarray | torch.Tensor):
        kind = value.dtype
        return value.ndim == 0 and (kind in INTEGER_TENSORS if isinstance(kind, torch.dtype) else kind.kind in "iu")
    return hasattr(value, "__index__") and type(value) not in _BOOLS


def integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """Returns `value` as an int.

    Raises:
        InvalidInput: It is not an integer from `minimum` to `maximum`, both included.
    """
    found = operator.index(value) if is_integer(value) else None
    if found is None or found < minimum or (maximum is not None and found > maximum):
        span = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise InvalidInput(f"{name} must be an integer {span}, got {shown(value)}")
    return found


def integers(
    name: str,
    values: Any,
    minimum: int,
    maximum: int,
    *,
    count: int | None = None,
    kind: type[np.integer[Any]] = np.int64,
) -> AnyArray:
    """Returns `values` as an array `[n]` of dtype `kind`.

    Raises:
        InvalidInput: They are not 1-D integers on the host from `minimum` to `maximum`, both included, or not `count`
            of them if that is given.
    """
    expected = f"{name} must be {'1-D' if count is None else count} integers from {minimum} to {maximum}"
    try:
        found = np.asarray(values)
        if found.size and found.dtype.kind not in "iu":  # or some of a list are 2^63 and more, which numpy rounds
            found = np.array(values, object)
        each = values if isinstance(values, list | tuple) else found
        slow = found.ndim == 1 and (
            found.dtype.kind == "O" or (each is values and not _BOOLS.isdisjoint(map(type, each)))
        )
        bad = next((i for i, value in enumerate(each) if not is_integer(value)), None) if slow else None
    except Exception:  # on a device, or an object of the caller's own class
        raise InvalidInput(f"{expected}, got {shown(values)}") from None
    if found.ndim != 1:
        raise InvalidInput(f"{expected}, got {shown(values)}")
    if bad is not None:
        raise InvalidInput(f"{expected}, got {shown(each[bad])} at index {bad}")
    if count is not None and len(found) != count:
        raise InvalidInput(f"{expected}, got {len(found)}")
    if found.size and not (found.min() >= minimum and found.max() <= maximum):
        bad = int(np.argmax((found < minimum) | (found > maximum)))
        raise InvalidInput(f"{expected}, got {shown(found.tolist()[bad])} at index {bad}")
    return np.ascontiguousarray(found, dtype=kind)


def number(name: str, value: Any, expected: str, inside: Callable[[float], bool]) -> float:
    """Returns `value` as a float.

    Raises:
        InvalidInput: It is not a finite number for which `inside` holds; `expected` says that in words.
    """
    found = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not math.isfinite(found) or not inside(found):
        raise InvalidInput(f"{name} must be {expected}, got {shown(value)}")
    return found


def shown(value: Any) -> str:
    """Returns the beginning of the representation of `value`, for messages."""
    try:
        return f"{value!r:.80}"
    except Exception:  # a number of more digits than Python prints, or a __repr__ of the user's own
        return f"a value of type {type(value).__name__}"
