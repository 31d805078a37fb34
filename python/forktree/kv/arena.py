"""Runs of tokens and of their slots: one run a node, in two arrays side by side."""

import numpy as np

from forktree.plan.layout import ranges
from forktree.types import Int64Array, IntArray


class Arena:
    """Gives every node a run of two parallel arrays, and moves the runs that grow too long for their place.

    Attributes:
        token: int32, token ids.
        slot_index: int32, the slots of these tokens.
        begin: int64 `[num_nodes]`, where each node's run begins in both.
        capacity: int32 `[num_nodes]`, entries of the run; 0 = the node has none.
        moves: counts the calls that moved a run: a `begin` read before may be out of date.
    """

    def __init__(self) -> None:
        self.token = np.zeros(0, np.int32)
        self.slot_index = np.zeros(0, np.int32)
        self.begin = np.zeros(0, np.int64)
        self.capacity = np.zeros(0, np.int32)
        self.moves = 0
        self._end = 0  # no run reaches beyond

    def add_nodes(self, count: int) -> None:
        """Room for `count` more nodes, without runs."""
        self.begin = np.concatenate([self.begin, np.zeros(count, np.int64)])
        self.capacity = np.concatenate([self.capacity, np.zeros(count, np.int32)])

    def open(self, node: Int64Array, capacity: IntArray) -> None:
        """Gives nodes without a run one of `capacity` entries each."""
        begin = self._new_runs(capacity)
        self.begin[node], self.capacity[node] = begin, capacity

    def grow(self, node: Int64Array, used: IntArray, wanted: IntArray) -> None:
        """Makes the runs of `node` (distinct) at least `wanted` long; the first `used` entries of each stay in it."""
        tight = wanted > self.capacity[node]
        if not tight.any():
            return
        node, used = node[tight], used[tight]
        capacity = np.maximum(wanted[tight], 2 * self.capacity[node])
        begin = self._new_runs(capacity)
        to, at = ranges(begin, used), ranges(self.begin[node], used)
        self.token[to], self.slot_index[to] = self.token[at], self.slot_index[at]
        self.begin[node], self.capacity[node] = begin, capacity
        self.moves += 1

    def close(self, node: IntArray) -> None:
        """Takes the runs of `node` back."""
        self.capacity[node] = 0

    def _new_runs(self, capacity: IntArray) -> Int64Array:
        """Begins of new runs. A full arena is packed first, and left with twice the size of its content or more."""
        total = int(capacity.sum())
        if self._end + total > len(self.token):
            live = np.flatnonzero(self.capacity > 0)
            packed = np.cumsum(self.capacity[live], dtype=np.int64) - self.capacity[live]
            used = int(self.capacity[live].sum())
            at, to = ranges(self.begin[live], self.capacity[live]), ranges(packed, self.capacity[live])
            size = max(1024, 2 * (used + total))
            token, slot_index = np.zeros(size, np.int32), np.zeros(size, np.int32)
            token[to], slot_index[to] = self.token[at], self.slot_index[at]
            self.token, self.slot_index, self.begin[live], self._end = token, slot_index, packed, used
            self.moves += 1
        begin = self._end + np.cumsum(capacity, dtype=np.int64) - capacity
        self._end += total
        return begin
