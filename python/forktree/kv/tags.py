"""Tags: numbers by which a text is known again after its branch was forked, resampled or rewound."""

import itertools

import numpy as np

from forktree.types import Int32Array, Int64Array

_NUMBERS = itertools.count()  # shared by all trees of the process, so that no two texts ever have the same tag


class Tags:
    """One tag for each branch of a tree. Arrays are indexed by branch id and are for reading.

    Attributes:
        tag: int64, -1 = none.
        length: int32, the branch's length when it was given the tag.
    """

    def __init__(self) -> None:
        self.tag = np.zeros(0, np.int64)
        self.length = np.zeros(0, np.int32)

    def add_branches(self, count: int) -> None:
        """Room for `count` more branches, without tags."""
        self.tag = np.concatenate([self.tag, np.full(count, -1)])
        self.length = np.concatenate([self.length, np.zeros(count, np.int32)])

    def renew(self, ids: Int64Array, length: Int32Array) -> Int64Array:
        """Gives each branch of `ids`, which has this length, a tag that nothing else was ever given. Returns them."""
        self.tag[ids] = list(itertools.islice(_NUMBERS, len(ids)))
        self.length[ids] = length
        return self.tag[ids]

    def inherit(self, ids: Int64Array, parents: Int64Array | int) -> None:
        """Gives branches the tags of those whose text they see from now on."""
        self.tag[ids], self.length[ids] = self.tag[parents], self.length[parents]

    def rewind(self, id: int, length: int) -> None:
        """Takes the tag from a branch that is rewound to before the tag was given."""
        if length < self.length[id]:
            self.tag[id] = -1

    def clear(self, ids: list[int]) -> None:
        """Takes the tags from branches."""
        self.tag[ids] = -1
