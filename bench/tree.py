"""Bookkeeping of the tree, in microseconds a call: 256 branches that append, are computed and are resampled.

    python bench/tree.py

`reassign` draws its ancestors as a particle filter does, with uneven weights; each step appends one token a branch.
Baseline: the same resampling of plain Python lists of tokens, by copying.
"""

import time
from collections.abc import Callable
from statistics import median

import numpy as np

from forktree.kv import Tree, reassign

BRANCHES, PROMPT, STEPS = 256, 1024, 400


def main() -> None:
    """Measures and prints medians."""
    rng = np.random.default_rng(0)
    tree = Tree(1 << 16)
    branches = tree.root(rng.integers(0, 1000, PROMPT)).fork(BRANCHES)
    copies = [list(range(PROMPT)) for _ in range(BRANCHES)]
    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], object]) -> object:
        began = time.perf_counter()
        result = call()
        times.setdefault(name, []).append(time.perf_counter() - began)
        return result

    for _ in range(STEPS):
        tokens = rng.integers(0, 1000, BRANCHES)
        timed("append", lambda tokens=tokens: tree.append(branches, tokens))
        chunks = timed("pending", lambda: tree.pending(branches))
        timed("reserve", lambda chunks=chunks: tree.reserve(chunks))
        timed("layout", lambda chunks=chunks: tree.layout(chunks))
        tree.mark_computed(chunks)
        weights = rng.random(BRANCHES) ** 2
        parents = np.sort(rng.choice(BRANCHES, BRANCHES, p=weights / weights.sum()))
        branches = timed("reassign", lambda parents=parents: reassign(branches, parents))
        for copy, token in zip(copies, tokens.tolist(), strict=True):
            copy.append(token)
        copies = timed("copying lists", lambda parents=parents: [list(copies[p]) for p in parents])
    tree.check()
    assert [b.tokens.tolist()[PROMPT:] for b in branches] == [c[PROMPT:] for c in copies]
    for name, values in times.items():
        print(f"{name:14} {median(values) * 1e6:8.0f} us   p90 {np.percentile(values, 90) * 1e6:8.0f} us")


if __name__ == "__main__":
    main()
