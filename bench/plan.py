"""Planning, in microseconds a call, and what comes of it: branches over trees that split evenly.

    python bench/plan.py

plan: `plan_attention` as a whole; grow: the same plan one token later; validate: the check of all that a kernel reads,
once in every plan that is made and part of its time; check: what is left of it in every layer's call, the header alone,
in constant time (what shows here is the call from Python). predicted: time of one layer under the cost model; reread:
tokens read for one distinct token.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from forktree import _core
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import plan_attention

HEADS = dict(num_qo_heads=16, num_kv_heads=8, head_dim=128)
PROMPT, OWN, ROOM = 1024, 16, 4


def even_tree(levels: int, branches: int) -> TreeLayout:
    """Each level has as many more nodes as the one before; nodes below the prompt have about OWN tokens."""
    rng = np.random.default_rng(0)
    parent, fork, pos, length, layer = [-1], [0], [0], [PROMPT], [0]
    for level in range(1, levels):
        width, above, layer = round(branches ** (level / (levels - 1))), layer, []
        for i in range(width):
            p = above[i * len(above) // width]
            layer.append(len(parent))
            parent.append(p)
            fork.append(length[p])
            pos.append(pos[p] + length[p])
            length.append(int(rng.integers(1, 2 * OWN)))
    node_len, tips = np.array(length), np.array(layer)
    return TreeLayout(
        slot_index=np.arange((node_len + ROOM).sum()),
        node_begin=np.cumsum(node_len + ROOM) - node_len - ROOM,
        node_len=node_len,
        node_parent=parent,
        node_fork=fork,
        node_pos=pos,
        row_indptr=np.arange(branches + 1),
        path_indptr=np.arange(branches + 1),
        path_node=tips,
        path_stop=np.full(branches, TreeLayout.ALL),
        path_top=np.full(branches, -1),
        causal=np.zeros(branches, np.int32),
        row_token=np.arange(branches),
        row_pos=np.array(pos)[tips] + node_len[tips] - 1,
    )


def microseconds(repeats: int, call: Callable[..., Any], *args: Any, **options: Any) -> float:
    """Median of one call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call(*args, **options)
        times.append(time.perf_counter() - began)
    return median(times) * 1e6


def main() -> None:
    """Measures and prints medians."""
    print(
        "branches levels nodes  options         plan   grow validate  check   items segments partials predicted reread "
        "padding"
    )
    for branches, levels, repeats in ((16, 5, 400), (256, 9, 400), (4096, 16, 40)):
        layout = even_tree(levels, branches)
        for name, options in (("", {}), ("window 256", {"window": 256}), ("invariant", {"invariant": True})):
            made = plan_attention(layout, **HEADS, **options)
            length, position = layout.node_len.copy(), layout.row_pos + 1
            length[layout.tip] += 1
            us = [
                microseconds(repeats, plan_attention, layout, **HEADS, **options),
                microseconds(repeats, made.grow, length, position),
                microseconds(repeats, _core.check_plan_buffer, made.buffer),
                microseconds(repeats, _core.check_plan_header, made.buffer),
            ]
            stats = made.stats()
            print(
                f"{branches:8} {levels:6} {layout.num_nodes:5}  {name:12} "
                f"{us[0]:7.0f} {us[1]:6.0f} {us[2]:8.1f} {us[3]:6.1f}  "
                f"{len(made.item):6} {len(made.seg):8} {made.num_partials:8} {stats.predicted:9.0f} "
                f"{stats.planned_tokens / stats.distinct_tokens:6.2f} {stats.padding:7.2f}"
            )


if __name__ == "__main__":
    main()
