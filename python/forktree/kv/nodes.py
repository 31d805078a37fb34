"""The nodes of a tree: runs of tokens, the slots that hold their keys and values, and which of these are computed.

All state is arrays indexed by node. Positions are absolute (counted from the start of the text), so merging or trimming
a node never touches those that hang off it. A node's tokens and slots lie in one run of the arena:

    begin             begin+num_computed  begin+length
      | KV written      | pending           | reservation |
      | slot_index valid up to begin+num_slots            | begin+capacity

`num_computed <= num_slots`. Tokens from `num_computed` on are *pending*: their KV is not written yet. Slots from
`length` on are the tip's reservation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from forktree.kv.arena import Arena
from forktree.kv.slots import SlotAllocator
from forktree.plan.layout import ranges
from forktree.types import BoolArray, Int32Array, Int64Array, IntArray

MAX_RESERVATION = 16


class Chunk(NamedTuple):
    """Tokens `[begin, stop)` of `node` (offsets in the node) that one forward pass computes."""

    node: int
    begin: int
    stop: int


def columns(chunks: Sequence[Chunk]) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Nodes, begins and stops, `[len(chunks)]` each."""
    node, begin, stop = np.array(chunks, dtype=np.int64).reshape(-1, 3).T
    return node, begin, stop


class Nodes:
    """Struct of arrays over nodes, `[num_nodes]` each. Public arrays are for reading.

    Attributes:
        parent: -1 = root.
        start: Position of the first token.
        length: Tokens.
        num_slots: Slots, of the first tokens on.
        num_computed: Tokens whose KV is written, from the first on.
        hidden_position: Position of the token whose hidden state the model kept for this node, -1 = none.
        children: Nodes that name it as parent.
        readers: Branches and joins whose last visible token is in it.
        owner: That of the branch that wrote it.
        source_of, source_node, source_length: Joined texts, `[sources]` each: all tokens of the text with root
            `source_of` see the text of `source_length` positions that ends in `source_node`.
    """

    def __init__(self, num_slots: int) -> None:
        self.slots = SlotAllocator(num_slots)
        self.arena = Arena()
        self.num_nodes = 0
        self.parent = np.zeros(0, np.int32)
        self.start = np.zeros(0, np.int32)
        self.length = np.zeros(0, np.int32)
        self.num_slots = np.zeros(0, np.int32)
        self.num_computed = np.zeros(0, np.int32)
        self.hidden_position = np.zeros(0, np.int32)
        self.children = np.zeros(0, np.int32)
        self.readers = np.zeros(0, np.int32)
        self.owner = np.zeros(0, np.int32)
        self.source_of = np.zeros(0, np.int32)
        self.source_node = np.zeros(0, np.int32)
        self.source_length = np.zeros(0, np.int32)
        self._changes = 0
        self._free_nodes: list[int] = []
        self._unmerged: set[int] = set()  # nodes that may have one child and no reader

    @property
    def version(self) -> int:
        """Changes whenever a layout built before no longer describes the nodes' shape."""
        return self._changes + self.arena.moves

    # ---------------------------------------------------------------- what nodes see

    def visible_nodes(self, nodes: ArrayLike) -> Int64Array:
        """The given nodes and everything they see: ancestors and joined texts. Sorted."""
        seen = np.zeros(self.num_nodes, bool)
        frontier = np.asarray(nodes, dtype=np.int64)
        while len(frontier):
            seen[frontier] = True
            up, _ = self._above(frontier)
            reached = np.zeros(self.num_nodes, bool)
            reached[up] = True
            frontier = np.flatnonzero(reached & ~seen)
        return np.flatnonzero(seen)

    def visible_lengths(self, node: IntArray, stop: IntArray) -> Int32Array:
        """How many tokens of each node are seen by the texts of `stop` positions that end in `node`.

        Returns:
            int32 `[num_nodes]`.
        """
        seen = np.zeros(self.num_nodes, np.int32)
        at = node
        while len(at):
            np.maximum.at(seen, at, stop - self.start[at])
            reached = np.zeros(self.num_nodes, bool)
            reached[at] = True
            at, stop = self._above(np.flatnonzero(reached))
        return seen

    def sees_any(self, nodes: Sequence[int], others: set[int]) -> BoolArray:
        """Whether each of `nodes` sees, besides itself, any of `others`. `[len(nodes)]`."""
        if len(self.source_of):
            return np.array([not others.isdisjoint({*self.visible_nodes([n]).tolist()} - {n}) for n in nodes])
        wanted = np.zeros(self.num_nodes + 1, bool)  # the last entry stands for what is above the roots
        wanted[list(others)] = True
        above = np.append(self.parent, -1)
        at = above[np.asarray(nodes, dtype=np.int64)]
        found = wanted[at]
        while (at >= 0).any():
            at = above[at]
            found |= wanted[at]
        return found

    def longest_prefix(self, text: IntArray) -> tuple[int, int]:
        """Node and length of the longest prefix of `text` that some text from position 0 on has; (-1, 0) if none.

        Texts that join others are passed over: their tokens mean something else.
        """
        begin, token = self.arena.begin, self.arena.token
        nodes = np.flatnonzero((self.arena.capacity > 0) & (self.length > 0))
        best, best_length = -1, 0
        roots = (self.parent[nodes] == -1) & (self.start[nodes] == 0) & (token[begin[nodes]] == text[0])
        roots &= ~np.isin(nodes, self.source_of)
        frontier = nodes[roots].tolist()
        while frontier:
            node = frontier.pop()
            start = int(self.start[node])
            count = min(int(self.length[node]), len(text) - start)
            differs = np.flatnonzero(token[begin[node] : begin[node] + count] != text[start : start + count])
            reached = start + (int(differs[0]) if len(differs) else count)
            if reached > best_length:
                best, best_length = node, reached
            hangs = nodes[(self.parent[nodes] == node) & (self.start[nodes] <= min(reached, len(text) - 1))]
            frontier += [int(c) for c in hangs if token[begin[c]] == text[self.start[c]]]
        return best, best_length

    def path(self, node: int, stop: int) -> list[tuple[int, int]]:
        """(node, tokens of it) of the text of `stop` positions that ends in `node`, from there up to its root."""
        path = []
        while node >= 0:
            path.append((node, stop - int(self.start[node])))
            stop, node = int(self.start[node]), int(self.parent[node])
        return path

    def sources_of(self, node: ArrayLike) -> tuple[Int32Array, Int32Array]:
        """The texts that `node` (those of them that are roots) joins: the node in which each ends, and its length."""
        joined = np.isin(self.source_of, node)
        return self.source_node[joined], self.source_length[joined]

    def _above(self, node: IntArray) -> tuple[Int32Array, Int32Array]:
        """What `node` see directly: parents and joined texts, as nodes and the position up to which these are seen."""
        at, stop = self.parent[node], self.start[node]
        hung = at >= 0
        at, stop = at[hung], stop[hung]
        if len(self.source_of):
            joined, ends = self.sources_of(node)
            at, stop = np.concatenate([at, joined]), np.concatenate([stop, ends])
        return at, stop

    # ---------------------------------------------------------------- KV

    def reserve(self, chunks: Sequence[Chunk]) -> None:
        """Obtains every slot that the chunks write, or raises `OutOfSlots` and changes nothing.

        A tip also gets a reservation: as many slots again as it has, at most 16, while the pool has plenty. When the
        pool runs short, all reservations are reclaimed first.
        """
        node, _, stop = columns(chunks)
        short = self.num_slots[node] < stop
        node, stop = node[short], stop[short]
        if not len(node):
            return
        tip = (self.children[node] == 0) & (stop == self.length[node])
        spare = np.where(tip & (self.num_computed[node] > 0), np.clip(self.num_slots[node], 1, MAX_RESERVATION) - 1, 0)
        if (stop - self.num_slots[node] + spare).sum() > self.slots.num_free:
            self.reclaim()
            spare[:] = 0
        count = stop + spare - self.num_slots[node]
        new = self.slots.allocate(int(count.sum()), int(count.max()))
        grown = self.num_slots[node] + count
        self._ensure_capacity(node, np.maximum(grown - self.length[node], 0))
        self.arena.slot_index[ranges(self.arena.begin[node] + self.num_slots[node], count)] = new
        self.num_slots[node] = grown

    def reclaim(self) -> None:
        """Takes back every tip's unused reservation."""
        self._release(np.flatnonzero(self.num_slots > self.length), self.length)

    def mark_computed(self, chunks: Sequence[Chunk]) -> None:
        """Records that a forward pass computed `chunks` and kept the hidden state of each node's last token in them."""
        node, _, stop = columns(chunks)
        order = np.argsort(stop)  # of several chunks of a node, the last one counts
        node, stop = node[order], stop[order]
        self.num_computed[node] = np.maximum(self.num_computed[node], stop)
        self.hidden_position[node] = self.start[node] + stop - 1

    def forget(self) -> None:
        """Makes all tokens pending again: from now on their KV and hidden states are worthless."""
        self.num_computed[:], self.hidden_position[:] = 0, -1
        self._changes += 1

    def slots_of(self, chunks: Sequence[Chunk]) -> Int32Array:
        """Slot that each token of the chunks is written to, -1 where its KV is already there. int32 `[T]`."""
        node, first, stop = columns(chunks)
        slots = self.arena.slot_index[ranges(self.arena.begin[node] + first, stop - first)].copy()
        slots[ranges(first, stop - first) < np.repeat(self.num_computed[node], stop - first)] = -1
        return slots

    def tokens_of(self, chunks: Sequence[Chunk]) -> tuple[Int32Array, Int32Array]:
        """Token ids and positions of the chunks' tokens, int32 `[T]` each."""
        node, first, stop = columns(chunks)
        ids = self.arena.token[ranges(self.arena.begin[node] + first, stop - first)]
        return ids, ranges(self.start[node] + first, stop - first).astype(np.int32)

    def evict(self, view: Int32Array, wanted: int) -> int:
        """Takes slots of tokens outside `view [num_nodes]` until `wanted` are free, furthest from the roots first.

        The tokens stay, pending again. Returns the number of slots freed: 0 if all slots in use are in view.
        """
        node = np.flatnonzero(self.num_slots > view)
        node = node[np.argsort(-self.start[node], kind="stable")]
        freed = np.cumsum(self.num_slots[node] - view[node])
        node = node[: int(np.searchsorted(freed, wanted)) + 1]
        before = self.slots.num_free
        self._release(node, view)
        return self.slots.num_free - before

    def _release(self, node: Int64Array, keep: Int32Array) -> None:
        """Frees the slots of `node` after the first `keep[node]`, and with them their KV."""
        if not len(node):
            return
        kept = keep[node]
        self.slots.free(self.arena.slot_index[ranges(self.arena.begin[node] + kept, self.num_slots[node] - kept)])
        self.num_slots[node] = kept
        self.num_computed[node] = np.minimum(self.num_computed[node], kept)

    # ---------------------------------------------------------------- making, freeing and merging nodes

    def _new_nodes(self, parent: IntArray, start: IntArray, owner: IntArray, capacity: int) -> Int64Array:
        count = len(parent)
        if len(self._free_nodes) < count:
            size = len(self.parent)
            more = max(count, size, 16)
            for name in _FIELDS:
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros(more, old.dtype)]))
            self.parent[size:] = -1
            self.arena.add_nodes(more)
            self._free_nodes.extend(range(size + more - 1, size - 1, -1))
            self.num_nodes = size + more
        ids = np.array([self._free_nodes.pop() for _ in range(count)])
        self.arena.open(ids, np.full(count, capacity))
        self.parent[ids], self.start[ids], self.owner[ids] = parent, start, owner
        for field in (self.length, self.num_slots, self.num_computed, self.children, self.readers):
            field[ids] = 0
        self.hidden_position[ids] = -1
        np.add.at(self.children, parent[parent >= 0], 1)
        self._changes += 1
        return ids

    def _ensure_capacity(self, node: Int64Array, extra: ArrayLike) -> None:
        """Makes the runs of `node` (distinct) long enough for `extra` more tokens each."""
        used = np.maximum(self.length[node], self.num_slots[node])
        self.arena.grow(node, used, self.length[node] + np.asarray(extra))

    def _free(self, dead: Int64Array) -> None:
        """Frees nodes that nobody reads and nothing hangs off."""
        self._release(dead[self.num_slots[dead] > 0], np.zeros(self.num_nodes, np.int32))
        self.arena.close(dead)
        self.length[dead], self.parent[dead] = 0, -1
        self._free_nodes.extend(dead.tolist())
        self._changes += 1

    def _trim(self, node: Int64Array, stop: Int32Array) -> None:
        """Cuts `node` off at positions `stop [num_nodes]`, before their ends."""
        if not len(node):
            return
        self.length[node] = stop[node] - self.start[node]
        self._release(node[self.num_slots[node] > self.length[node]], self.length)
        self.hidden_position[node[self.hidden_position[node] >= stop[node]]] = -1
        self._changes += 1

    def _remove_sources(self, node: Int64Array) -> Int32Array:
        """Ends what roots among `node` join; returns the nodes in which the joined texts end."""
        ends = np.isin(self.source_of, node)
        nodes = self.source_node[ends]
        if len(nodes):
            np.subtract.at(self.readers, nodes, 1)
            self.source_of, self.source_node = self.source_of[~ends], self.source_node[~ends]
            self.source_length = self.source_length[~ends]
        return nodes

    def _merge(self) -> None:
        """Where a node has one child and no reader, the child takes over its tokens and slots."""
        lone = np.zeros(self.num_nodes, bool)
        lone[list(self._unmerged)] = True
        lone &= (self.readers == 0) & (self.children == 1)
        child = np.flatnonzero(self.parent >= 0)
        low = child[lone[self.parent[child]]]
        # a hole in the middle of a run would lose KV: an evicted node stays apart until it is recomputed
        high = self.parent[low]
        whole = (self.num_computed[high] == self.length[high]) | (self.num_slots[low] == 0)
        self._unmerged = set(high[~whole].tolist())
        low = low[whole]
        while len(low):
            waits = np.isin(self.parent[low], low)  # its parent is itself about to take over a parent
            self._take_over(self.parent[low[~waits]], low[~waits])
            low = low[waits]

    def _take_over(self, high: Int32Array, low: Int64Array) -> None:
        """Nodes `low` become one with their parents `high`: their tokens and slots follow the parents'."""
        arena = self.arena
        head, tail, num_slots = self.length[high], self.length[low], self.num_slots[low]
        self._ensure_capacity(high.astype(np.int64), np.maximum(tail, num_slots))
        to, at = arena.begin[high] + head, arena.begin[low]
        arena.token[ranges(to, tail)] = arena.token[ranges(at, tail)]
        arena.slot_index[ranges(to, num_slots)] = arena.slot_index[ranges(at, num_slots)]
        whole = self.num_computed[high] == head
        self.num_computed[low] = np.where(whole, head + self.num_computed[low], self.num_computed[high])
        self.num_slots[low] = np.where(num_slots > 0, head + num_slots, self.num_slots[high])
        self.length[low] = head + tail
        for field in (self.start, self.parent, arena.begin, arena.capacity):
            field[low] = field[high]
        for field in (self.length, self.num_slots, self.num_computed, self.children):
            field[high] = 0
        arena.close(high)
        self.parent[high] = -1
        self._free_nodes.extend(high.tolist())
        self._changes += 1
        for above, node in zip(high.tolist(), low.tolist(), strict=True) if len(self.source_of) else ():
            self.source_of[self.source_of == above] = node


_FIELDS = (
    "parent",
    "start",
    "length",
    "num_slots",
    "num_computed",
    "hidden_position",
    "children",
    "readers",
    "owner",
)
