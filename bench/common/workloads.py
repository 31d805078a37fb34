"""What benchmarks of attention compute: trees of tokens, who looks at them, and where their slots lie.

A tree is a list of nodes, whose children follow all of their tokens. A row is one query at the last token of a node.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from forktree import TreeLayout

TRACES = Path(__file__).parents[1] / "traces"
EXTENT = 16  # slots in a row that a growing branch gets
PROMPT, STRETCH = 4096, 8  # of a trace: tokens of its prompt, tokens for each one it generated


@dataclass(frozen=True)
class Tree:
    parent: list[int]  # of each node, above it in the list; -1 = root
    length: list[int]
    rows: list[int]  # nodes that look, in depth-first order

    @cached_property
    def path(self) -> list[list[int]]:
        """Nodes from the root to each row's, top first."""
        paths: list[list[int]] = []
        for node, above in enumerate(self.parent):
            paths.append([*(paths[above] if above >= 0 else []), node])
        return [paths[node] for node in self.rows]

    @property
    def depth(self) -> int:
        """Nodes of the longest path."""
        return max(map(len, self.path))

    @property
    def is_regular(self) -> bool:
        """Whether all paths have as many nodes."""
        return len({len(path) for path in self.path}) == 1

    @property
    def distinct(self) -> int:
        """Tokens that any row sees."""
        return sum(self.length[node] for node in {node for path in self.path for node in path})

    @property
    def attended(self) -> int:
        """(row, token) pairs."""
        return sum(self.length[node] for path in self.path for node in path)

    def partials(self, split: int) -> int:
        """(row, piece of a node) pairs, nodes cut every `split` tokens."""
        return sum(-(-self.length[node] // split) for path in self.path for node in path)


def levels(nodes: Sequence[int], lengths: Sequence[int]) -> Tree:
    """A tree with so many nodes, evenly below those above, and of such lengths at each level; its leaves look."""
    parent, length, above = [], [], [-1]
    for count, size in zip(nodes, lengths, strict=True):
        if count % len(above):
            raise ValueError(f"nodes of a level must be a multiple of {len(above)}, those above, got {count}")
        first = len(parent)
        parent += [node for node in above for _ in range(count // len(above))]
        length += [size] * count
        above = list(range(first, first + count))
    return Tree(parent, length, above)


def star(branches: int, shared: int, own: int) -> Tree:
    """A prompt and its branches."""
    return levels([1, branches], [shared, own])


def from_paths(paths: Sequence[Sequence[int]]) -> Tree:
    """The tree of token lists that share prefixes: chains are one node, rows come in depth-first order."""
    parent: list[int] = []
    length: list[int] = []
    ends: list[int] = []

    def grow(above: int, group: list[Sequence[int]], begin: int) -> None:
        node, stop = len(parent), begin
        while all(len(p) > stop for p in group) and len({p[stop] for p in group}) == 1:
            stop += 1
        parent.append(above)
        length.append(stop - begin)
        ends.extend([node] * sum(len(p) == stop for p in group))
        below: dict[int, list[Sequence[int]]] = {}
        for p in group:
            if len(p) > stop:
                below.setdefault(p[stop], []).append(p)
        for some in below.values():
            grow(node, some, stop)

    grow(-1, list(paths), 0)
    return Tree(parent, length, ends)


def trace(name: str) -> Tree:
    """A recorded search (`traces.py`) at realistic lengths: a prompt of 4,096 tokens, 8 for each one generated."""
    stored = json.loads((TRACES / f"{name}.json").read_text())
    length = [PROMPT, *(STRETCH * n for n in stored["length"][1:])]
    return Tree(stored["parent"], length, stored["rows"])


def slots(tree: Tree, extent: int | None, *, grown_only: bool = True) -> np.ndarray:
    """[tokens] a slot for each token, node by node. Nodes lie in pieces of `extent` slots, the pieces in random order.

    grown_only: only nodes below another are in pieces, as a prompt gets its slots at once. None: no pieces.
    """
    pieces: list[np.ndarray] = []
    begin = 0
    for above, length in zip(tree.parent, tree.length, strict=True):
        whole = extent is None or (grown_only and above < 0)
        cuts = [] if whole else range(extent or 1, length, extent or 1)
        pieces += np.split(np.arange(begin, begin + length), cuts)
        begin += length
    if extent is not None:
        pieces = [pieces[i] for i in np.random.default_rng(0).permutation(len(pieces))]
    slot_of = np.empty(begin, np.int64)
    slot_of[np.concatenate(pieces)] = np.arange(begin)
    return slot_of


def layout(tree: Tree, slot_index: np.ndarray) -> TreeLayout:
    """One row a context: a decode step."""
    parent, length, rows = np.array(tree.parent), np.array(tree.length), np.array(tree.rows)
    pos = np.zeros_like(length)
    for node, above in enumerate(tree.parent):
        pos[node] = pos[above] + length[above] if above >= 0 else 0
    return TreeLayout(
        slot_index=slot_index,
        node_begin=np.cumsum(length) - length,
        node_len=length,
        node_parent=parent,
        node_fork=np.where(parent >= 0, length[parent], 0),
        node_pos=pos,
        row_indptr=np.arange(rows.size + 1),
        path_indptr=np.arange(rows.size + 1),
        path_node=rows,
        path_stop=np.full(rows.size, TreeLayout.ALL),
        path_top=np.full(rows.size, -1),
        causal=np.zeros(rows.size, np.int64),
        row_token=np.arange(rows.size),
        row_pos=pos[rows] + length[rows] - 1,
    )


FIVE = {  # nodes / tokens of each level: the trees that tree-attention papers measure
    "1,10/4000,400": levels([1, 10], [4000, 400]),
    "1,256/256,32": levels([1, 256], [256, 32]),
    "1,1024/2048,32": levels([1, 1024], [2048, 32]),
    "1,4,16,512/1024,256,128,32": levels([1, 4, 16, 512], [1024, 256, 128, 32]),
    "9 levels to 1024/256 to 16": levels([1, 2, 4, 8, 16, 32, 64, 128, 1024], [256, 128, 64, *[16] * 6]),
}
STARS = {
    f"{branches} branches, {shared // 1024}k": star(branches, shared, 64)
    for shared in (1024, 8192, 32768)
    for branches in (16, 64, 256)
}
