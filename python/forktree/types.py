"""Types of numpy arrays, named once, and the range of token ids."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

AnyArray = NDArray[Any]
BoolArray = NDArray[np.bool_]
Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
UInt64Array = NDArray[np.uint64]
Float64Array = NDArray[np.float64]
IntArray = NDArray[np.integer[Any]]  # of any width

MAX_TOKEN_ID = 2**31 - 1  # ids are int32
