"""SplitMix64: counter-based random numbers that key the sampling of branches, on the host and on a device."""

import numpy as np
from torch import Tensor

from forktree.types import UInt64Array


def splitmix64(values: UInt64Array) -> UInt64Array:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection on 64-bit integers that looks random."""
    z = np.atleast_1d(values) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def splitmix64_torch(z: Tensor) -> Tensor:
    """`splitmix64` on the bits of int64, whose shifts keep the sign and must not."""
    z = z + (0x9E3779B97F4A7C15 - 2**64)
    z = (z ^ (z >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ (z >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)
    return z ^ (z >> 31 & 2**33 - 1)
