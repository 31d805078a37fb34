"""Bookkeeping of the tree, in microseconds a call: 256 branches that append, are computed and are resampled.

    python bench/tree.py

`reassign` draws its ancestors as a particle filter does, with uneven weights; each step appends one token a branch.
Baseline: the same resampling of plain Python lists of tokens, by copying.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from forktree.kv import Tree, reassign, tree_layout

BRANCHES, PROMPT, STEPS = 256, 1024, 400


def copied(texts: list[list[int]], parents: np.ndarray) -> list[list[int]]:
    """What reassign does, by copying."""
    return [list(texts[p]) for p in parents]


def main() -> None:
    """Measures and prints medians."""
    rng = np.random.default_rng(0)
    tree = Tree(1 << 16)
    branches = tree.root(rng.integers(0, 1000, PROMPT)).fork(BRANCHES)
    copies = [list(range(PROMPT)) for _ in range(BRANCHES)]
    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[..., Any], *args: Any) -> Any:
        began = time.perf_counter()
        result = call(*args)
        times.setdefault(name, []).append(time.perf_counter() - began)
        return result

    for _ in range(STEPS):
        tokens = rng.integers(0, 1000, BRANCHES)
        timed("append", tree.append, branches, tokens)
        chunks = timed("pending", tree.pending, branches)
        timed("reserve", tree.reserve, chunks)
        timed("layout", tree_layout, tree, chunks)
        tree.mark_computed(chunks)
        weights = rng.random(BRANCHES) ** 2
        parents = np.sort(rng.choice(BRANCHES, BRANCHES, p=weights / weights.sum()))
        branches = timed("reassign", reassign, branches, parents)
        for copy, token in zip(copies, tokens.tolist(), strict=True):
            copy.append(token)
        copies = timed("copying lists", copied, copies, parents)
    tree.check()
    assert [b.tokens.tolist()[PROMPT:] for b in branches] == [c[PROMPT:] for c in copies]
    for name, values in times.items():
        print(f"{name:14} {median(values) * 1e6:8.0f} us   p90 {np.percentile(values, 90) * 1e6:8.0f} us")


if __name__ == "__main__":
    main()
