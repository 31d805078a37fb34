"""Repeated sampling: how often at least one of k samples is right (Brown et al. 2024, "Large Language Monkeys")."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from forktree.checks import integer
from forktree.errors import InvalidInput


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The probability that one of k of these samples, taken without replacement, is correct.

    The unbiased estimate of Chen et al. 2021: 1 - C(n - c, k) / C(n, k), as a product that does not overflow.

    Args:
        num_samples: n, the samples of one prompt.
        num_correct: c, how many of them are correct.
        k: from 1 to n.

    Raises:
        InvalidInput: a number is out of range.
    """
    n = integer("num_samples", num_samples, 1)
    c = integer("num_correct", num_correct, 0, n)
    k = integer("k", k, 1, n)
    return 1.0 if n - c < k else float(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)))


def fit_coverage(ks: Sequence[int], coverage: ArrayLike) -> tuple[float, float]:
    """a and b of the law `coverage(k) = exp(a * k^b)`, by least squares of `log(-log(coverage))` against `log(k)`.

    Both are negative where coverage rises with k.

    Args:
        ks: numbers of samples, `[m]`.
        coverage: the share of prompts that are solved by so many, each in (0, 1); 0 and 1 are left out. `[m]`.

    Raises:
        InvalidInput: fewer than two different numbers of samples are left.
    """
    k, c = np.asarray(ks, float), np.asarray(coverage, float)
    if k.shape != c.shape or k.ndim != 1 or not (k >= 1).all() or not ((c >= 0) & (c <= 1)).all():
        raise InvalidInput(f"ks and coverage must be [m], at least 1 and in [0, 1], got {k.tolist()} and {c.tolist()}")
    inside = (c > 0) & (c < 1)
    if len(np.unique(k[inside])) < 2:
        raise InvalidInput(f"coverage must be in (0, 1) at two numbers of samples at least, got {c.tolist()}")
    b, log_a = np.polyfit(np.log(k[inside]), np.log(-np.log(c[inside])), 1)
    return -float(np.exp(log_a)), float(b)
