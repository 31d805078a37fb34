"""Checks of single numbers that callers give: types as well as ranges, before anything is done with them."""

import math
import operator
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch

from forktree.errors import InvalidInput


def is_integer(value: Any) -> bool:
    """Whether `value` is one integer: Python's, numpy's, or an array or tensor without dimensions; no bool."""
    if isinstance(value, np.ndarray | torch.Tensor):
        kind = value.dtype
        return value.ndim == 0 and (kind in INTEGER_TENSORS if isinstance(kind, torch.dtype) else kind.kind in "iu")
    return hasattr(value, "__index__") and not isinstance(value, bool | np.bool_)


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int. Raises `InvalidInput` unless it is an integer from `least` to `most`, both included."""
    if not is_integer(value) or (found := operator.index(value)) < least or (most is not None and found > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InvalidInput(f"{name} must be an integer {span}, got {shown(value)}")
    return found


def number(name: str, value: Any, expected: str, inside: Callable[[float], bool]) -> float:
    """`value` as a float. Raises `InvalidInput` unless it is a finite number for which `inside` holds; `expected` says
    so in words."""
    found = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not math.isfinite(found) or not inside(found):
        raise InvalidInput(f"{name} must be {expected}, got {shown(value)}")
    return found


def shown(value: Any) -> str:
    """The beginning of what `value` looks like, for messages."""
    try:
        return f"{value!r:.80}"
    except Exception:  # a number of more digits than Python prints, or a __repr__ of the user's own
        return f"a value of type {type(value).__name__}"


INTEGER_TENSORS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
