"""Free slots of a KV pool, handed out as contiguous extents where possible."""

import numpy as np

from forktree.plan.layout import ranges
from forktree.types import BoolArray, Int32Array, Int64Array


class OutOfSlots(Exception):
    """The pool has fewer free slots than asked for. Nothing was taken."""

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(f"{needed} KV slots needed, {free} free of {total}")
        self.needed, self.free, self.total = needed, free, total


class SlotAllocator:
    """`num_slots` slots, low ones first. `allocate` obtains all it is asked for or raises `OutOfSlots`.

    A bitmap says which are free, as far as slots were ever looked at; beyond it all are.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        self.num_slots = num_slots
        self.num_free = num_slots
        self._free = np.ones(0, dtype=bool)
        self._lowest = 0  # no slot below it is free
        self._end = 0  # no slot from it on was ever allocated

    @property
    def in_use(self) -> int:
        """Slots that are allocated."""
        return self.num_slots - self.num_free

    def allocate(self, count: int, extent: int = 0) -> Int32Array:
        """`count` slots: the lowest contiguous run that holds them all, else the longest runs first.

        extent: the longest piece that the caller wants contiguous, at most and by default `count`. The search of
        all slots ever used is spared where the lowest free ones will do.
        """
        if count > self.num_free:
            raise OutOfSlots(count, self.num_free, self.num_slots)
        begin, length = self._runs(self._lowest, self._lowest + 8 * count + 1024)
        if length.max(initial=0) < (extent or count) or length.sum() < count:
            begin, length = self._runs(0, self._end + count)
        whole = length >= count
        if whole.any():
            first = begin[np.argmax(whole)]
            taken = np.arange(first, first + count, dtype=np.int32)
        else:
            longest = np.argsort(-length, kind="stable")
            taken = ranges(begin[longest], length[longest])[:count].astype(np.int32)
        self._free[taken] = False
        self._end = max(self._end, int(taken.max(initial=-1)) + 1)
        self.num_free -= count
        if count and taken[0] == self._lowest:
            self._lowest = int(taken[-1]) + 1
        return taken

    def _runs(self, begin: int, stop: int) -> tuple[Int64Array, Int64Array]:
        """First slot and length of every free run within `[begin, stop)`, ascending."""
        stop = min(stop, self.num_slots)
        if stop > len(self._free):
            more = min(max(stop, 2 * len(self._free)), self.num_slots) - len(self._free)
            self._free = np.concatenate([self._free, np.ones(more, dtype=bool)])
        edges = np.flatnonzero(np.diff(self._free[begin:stop].astype(np.int8), prepend=0, append=0)) + begin
        return edges[::2], edges[1::2] - edges[::2]

    def free(self, slots: Int32Array) -> None:
        """Takes back slots that were handed out by `allocate`."""
        assert not self._free[slots].any(), "a slot was given back twice"
        self._free[slots] = True
        self._lowest = min(self._lowest, int(slots.min(initial=self.num_slots)))
        self.num_free += len(slots)

    def is_free(self) -> BoolArray:
        """Bitmap, True where free, as far as slots were ever looked at; a copy. All beyond are free."""
        return self._free.copy()
