"""From the nodes of a tree to the `TreeLayout` of a step: what each chunk's tokens see."""

from collections.abc import Sequence

import numpy as np

from forktree.kv.nodes import Chunk, Nodes, columns
from forktree.plan.layout import TreeLayout, ranges


def tree_layout(nodes: Nodes, chunks: Sequence[Chunk]) -> TreeLayout:
    """One context a chunk, its rows the chunk's tokens, causal. `slot_index` is the arena's own array."""
    node, first, stop = columns(chunks)
    used = nodes.visible_nodes(node)
    compact = np.full(nodes.num_nodes + 1, -1, np.int32)  # the last entry maps parent -1 to -1
    compact[used] = np.arange(len(used))
    rows = stop - first
    row_indptr = np.concatenate(([0], np.cumsum(rows)))
    grows = (stop == nodes.length[node]) & (stop > nodes.num_computed[node])
    path_node, path_stop, path_top = compact[node], np.where(grows, TreeLayout.ALL, stop), np.full(len(chunks), -1)
    path_indptr = np.arange(len(chunks) + 1)
    if len(nodes.source_of):
        paths = [[*_joined_paths(nodes, n), (n, s, -1)] for n, s in zip(node.tolist(), path_stop.tolist(), strict=True)]
        path_indptr = np.concatenate(([0], np.cumsum([len(p) for p in paths])))
        raw_node, path_stop, raw_top = np.array([entry for p in paths for entry in p]).T
        path_node, path_top = compact[raw_node], compact[raw_top]
    parent = nodes.parent[used]
    return TreeLayout(
        slot_index=nodes.arena.slot_index,
        node_begin=nodes.arena.begin[used],
        node_len=nodes.length[used].copy(),
        node_parent=compact[parent],
        node_fork=np.where(parent >= 0, nodes.start[used] - nodes.start[parent], 0),
        node_pos=nodes.start[used],
        row_indptr=row_indptr,
        path_indptr=path_indptr,
        path_node=path_node,
        path_stop=path_stop,
        path_top=path_top,
        causal=np.ones(len(chunks), np.int32),
        row_token=np.arange(row_indptr[-1]),
        row_pos=ranges(nodes.start[node] + first, rows),
    )


def _joined_paths(nodes: Nodes, node: int) -> list[tuple[int, int, int]]:
    """(node, stop, top) of paths that cover what the text of `node` joins, each token once.

    The union of the joined texts is cut into chains: a chain goes on from a child into its parent where the parent's
    visible part ends just at the child's fork, for one child only.
    """
    view: dict[int, int] = {}  # node -> how many of its tokens some joined text sees
    todo = [nodes.path(node, 0)[-1][0]]  # roots whose joins are to be followed
    while todo:
        for end, length in zip(*(x.tolist() for x in nodes.sources_of(todo.pop())), strict=True):
            path = nodes.path(end, length)
            for at, seen in path:
                view[at] = max(view.get(at, 0), seen)
            todo.append(path[-1][0])
    goes_on: dict[int, int] = {}
    for child in sorted(view):
        up = int(nodes.parent[child])
        if up >= 0 and nodes.start[child] - nodes.start[up] == view[up]:
            goes_on.setdefault(up, child)
    entries = []
    for tip in sorted(view.keys() - goes_on.keys()):
        top = tip
        while nodes.parent[top] >= 0 and goes_on.get(int(nodes.parent[top])) == top:
            top = int(nodes.parent[top])
        entries.append((tip, view[tip], int(nodes.parent[top])))
    return entries
