"""The tree of tokens: nodes, branches and the slots that hold their keys and values.

A token is written once, by its node, and never moves. A fork is a pair (node, length) and copies nothing, at any
offset. All state is arrays indexed by node or by branch; positions and lengths are absolute (counted from the
start of the text), so merging or trimming a node never touches those that hang off it.

A node's tokens and slots lie side by side in one run of two arena arrays, `token` and `slot_index`:

    begin             begin+computed      begin+length
      | KV written      | pending           | room        |
      | slot_index valid up to begin+held                 | begin+capacity

`computed <= held`; tokens past `computed` are *pending* (their KV is not written yet), slots past `length` are
the tip's reservation.
"""

import itertools
from collections.abc import Iterable, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forktree.checks import integer, integers
from forktree.errors import InvalidInput
from forktree.kv.slots import Ints, SlotAllocator, spans
from forktree.ops.splitmix import mix
from forktree.plan.layout import TreeLayout

_ID = attrgetter("id")
_MARKS = itertools.count()  # of all trees
_NUMBERS = itertools.count()  # a tree's, which tells it from others of its name
MAX_RESERVATION = 16
NOBODY = -1
UNKNOWN = -1  # stands for the newest token of a branch while only the device knows it; equal to no id
_FIRST_CAPACITY = 16
MAX_TOKEN = 2**31 - 1  # ids are int32
MAX_POSITION = 2**30  # so that no length overflows: a root begins below, and no tree holds as many tokens again
MAX_FORKS = 2**20  # in one call


class Chunk(NamedTuple):
    """Tokens `[begin, stop)` of `node` (offsets in the node) that one forward pass computes."""

    node: int
    begin: int
    stop: int


class Branch:
    """A live hypothesis: a handle to the tokens it sees. Equal handles are the same object."""

    __slots__ = ("_tree", "id")

    def __init__(self, tree: "Tree", id: int) -> None:
        self._tree = tree
        self.id = id

    @property
    def alive(self) -> bool:
        """False once dropped."""
        return self.id >= 0

    @property
    def length(self) -> int:
        """Position after its last token; for a text that starts at 0, the number of its tokens."""
        return int(self._tree.branch_length[self._checked()])

    @property
    def tokens(self) -> Ints:
        """Token ids from the root on, int32 `[length - position of the root]`; a copy."""
        return self._tree.tokens(self)

    @property
    def key(self) -> int:
        """What its random draws are keyed by, together with the position."""
        return int(self._tree.branch_key[self._checked()])

    def fork(self, n: int) -> list["Branch"]:
        """`n` more branches that see the same tokens. Takes no slots and copies no tokens."""
        return self._tree.fork(self, n)

    def append(self, tokens: ArrayLike) -> None:
        """Adds tokens behind its last one; they are pending until a forward pass computes them."""
        self._tree.append_text(self, tokens)

    def rewind(self, length: int) -> None:
        """Forgets the tokens from position `length` on."""
        self._tree.rewind(self, length)

    def drop(self) -> None:
        """Ends the branch; what nobody else sees returns its slots. Dropping twice is harmless."""
        if self.alive:
            self._tree.drop([self])

    def _checked(self) -> int:
        if self.id < 0:
            raise InvalidInput("branch was dropped: it can no longer be used")
        return self.id


class Tree:
    """Struct of arrays over nodes and branches. Public arrays are for reading.

    name: of its model, for messages. Every call checks that the branches it is given are this tree's, and live, and
    that values are in range, before it changes anything; it raises `InvalidInput` otherwise.
    """

    def __init__(self, num_slots: int, *, name: str = "a model") -> None:
        self.name = f"tree {next(_NUMBERS)} of {name}"
        self._begin(num_slots)

    def _begin(self, num_slots: int) -> None:
        self.slots = SlotAllocator(num_slots)
        self.version = 0  # changes whenever a layout built before no longer describes the tree's shape
        self.num_nodes = 0
        # nodes
        self.parent = np.zeros(0, np.int32)  # -1 = root
        self.start = np.zeros(0, np.int32)  # position of the first token
        self.length = np.zeros(0, np.int32)  # tokens
        self.computed = np.zeros(0, np.int32)  # of these, with KV
        self.held = np.zeros(0, np.int32)  # slots
        self.begin = np.zeros(0, np.int64)  # its run in the arena
        self.capacity = np.zeros(0, np.int32)  # room of the run; 0 = the node is free
        self.children = np.zeros(0, np.int32)  # nodes that name it as parent
        self.readers = np.zeros(0, np.int32)  # branches whose last token (or fork point) is here
        self.owner = np.zeros(0, np.int32)  # of the branch that wrote it
        self.hidden_at = np.zeros(0, np.int32)  # position whose hidden state the model kept for this node, -1 = none
        self._free_nodes: list[int] = []
        self._sources: dict[int, list[Branch]] = {}  # join node -> what it joins
        self._unmerged: set[int] = set()  # nodes that may have one child and no reader; `pending` merges them
        # branches
        self.branch_node = np.zeros(0, np.int32)  # -1 = free
        self.branch_length = np.zeros(0, np.int32)
        self.branch_key = np.zeros(0, np.uint64)  # names the branch's random draws
        self.branch_owner = np.zeros(0, np.int32)
        self.branch_mark = np.zeros(0, np.int64)  # see `mark`; -1 = none
        self.branch_marked_at = np.zeros(0, np.int32)  # its length then
        self._handles: list[Branch | None] = []
        self._branch_forks = np.zeros(0, np.uint64)
        self._free_branches: list[int] = []
        # arena
        self.token = np.zeros(0, np.int32)
        self.slot_index = np.zeros(0, np.int32)
        self._arena_end = 0

    def clear(self) -> None:
        """Ends every branch and begins anew, whatever state a call that was cut short left behind."""
        for handle in self._handles:
            if handle is not None:
                handle.id = -1
        self._begin(self.slots.num_slots)

    # ---------------------------------------------------------------- branches

    def root(self, tokens: ArrayLike, *, position: int = 0, key: int = 0, owner: int = NOBODY) -> Branch:
        """A new text. `tokens` is not empty; the first stands at `position`; `key`, 64 bits, seeds its draws.

        `owner` is a number of the caller's; forks inherit it, and `drop_owned` drops all that carry it.
        """
        text = _text(tokens)
        position = integer("position", position, 0, MAX_POSITION)
        key, owner = _key_and_owner(key, owner)
        node = self._new_nodes(np.array([-1]), np.array([position]), np.array([owner]), len(text))
        branch = self._new_branches(node, np.array([position]), np.array([key], np.uint64), owner)[0]
        self._append(branch, text)
        return branch

    def fork(self, branch: Branch, n: int, *, owner: int | None = None) -> list[Branch]:
        """See `Branch.fork`. The forks belong to the branch's owner unless another is named."""
        id = self._id(branch)
        n = integer("n", n, 0, MAX_FORKS)
        owner = int(self.branch_owner[id]) if owner is None else _owner(owner)
        nth = self._branch_forks[id] + np.arange(1, n + 1, dtype=np.uint64)
        self._branch_forks[id] += np.uint64(n)
        keys = mix(self.branch_key[id : id + 1] ^ mix(nth))
        node, length = np.repeat(self.branch_node[id], n), np.repeat(self.branch_length[id], n)
        forks = self._new_branches(node, length, keys, owner)
        ids = self._ids(forks)
        self.branch_mark[ids], self.branch_marked_at[ids] = self.branch_mark[id], self.branch_marked_at[id]
        return forks

    def rewind(self, branch: Branch, length: int) -> None:
        """See `Branch.rewind`. The branch's later draws differ from those it made before."""
        id = self._id(branch)
        node, have = int(self.branch_node[id]), int(self.branch_length[id])
        least = 1 + int(self.start[self._path(id)[-1][0]])  # the root keeps a token
        length = integer("rewind length", length, least, have)
        while length <= self.start[node]:
            node = int(self.parent[node])
        if length < have:
            self.branch_key[id] = mix(self.branch_key[id : id + 1])[0]
        if length < self.branch_marked_at[id]:
            self.branch_mark[id] = -1
        old = self.branch_node[id]
        self.readers[old] -= 1
        self.readers[node] += 1
        self.branch_node[id], self.branch_length[id] = node, length
        self._settle(np.array([old, node]))

    def drop(self, branches: Iterable[Branch]) -> None:
        """Ends many branches at once; those already dropped, or named before, are passed over."""
        ids = np.unique(self._ids([b for b in _listed(branches) if not isinstance(b, Branch) or b.alive]))
        if not len(ids):
            return
        for id in ids.tolist():
            if (handle := self._handles[id]) is not None:
                handle.id = -1
            self._handles[id] = None
        nodes = self.branch_node[ids]
        np.subtract.at(self.readers, nodes, 1)
        self.branch_node[ids] = -1
        self._free_branches.extend(ids.tolist())
        self._settle(nodes)

    def owned(self, owner: int) -> list[Branch]:
        """The live branches of `owner`."""
        ids = np.flatnonzero((self.branch_node >= 0) & (self.branch_owner == owner))
        return [handle for id in ids.tolist() if (handle := self._handles[id]) is not None]

    def has_owners(self) -> bool:
        """Whether any live branch has an owner."""
        return bool(((self.branch_node >= 0) & (self.branch_owner != NOBODY)).any())

    def drop_owned(self, owner: int) -> None:
        """Ends every branch of `owner`."""
        self.drop(self.owned(owner))

    def reassign(self, branches: Sequence[Branch], parents: ArrayLike) -> list[Branch]:
        """Branch `i` of the result sees what `branches[parents[i]]` sees now: fork and drop in one array call.

        The first `len(parents)` handles are reused, missing ones made, surplus ones dropped. Their random draws stay
        their own, and are new where the text is.
        """
        branches = _listed(branches)
        ids = self._ids(branches, distinct=True)
        count = len(ids)
        ancestors = integers("parents", parents, 0, count - 1)
        source = ids[ancestors]
        new_node, new_length = self.branch_node[source], self.branch_length[source]
        extra = [self.fork(branches[a], 1)[0] for a in ancestors[count:]]
        kept = ids[: len(ancestors)]
        old = self.branch_node[kept]
        come, gone = (np.bincount(nodes, minlength=self.num_nodes) for nodes in (new_node[: len(kept)], old))
        self.readers += (come - gone).astype(np.int32)
        self.branch_node[kept], self.branch_length[kept] = new_node[: len(kept)], new_length[: len(kept)]
        for field in (self.branch_mark, self.branch_marked_at):
            field[kept] = field[source[: len(kept)]]
        moved = kept[ancestors[: len(kept)] != np.arange(len(kept))]
        self.branch_key[moved] = mix(self.branch_key[moved])  # it may stand where it has drawn before
        self.drop(branches[len(ancestors) :])
        self._settle(old)
        return [*branches[: len(ancestors)], *extra]

    def join(self, branches: Sequence[Branch], tokens: ArrayLike) -> Branch:
        """A branch whose `tokens` follow, and see, all of `branches` (each shared token once).

        Its first token stands behind the longest of them. The joined texts stay alive as long as it does.
        """
        text, joined = _text(tokens), _listed(branches)
        ids = self._ids(joined)
        if not len(ids):
            raise InvalidInput("join needs at least one branch, got none")
        position = integer("position", self.branch_length[ids].max(), 0, MAX_POSITION)
        sources = [self.fork(b, 1, owner=NOBODY)[0] for b in joined]
        first = ids[0]
        key, owner = int(self.branch_key[first]), int(self.branch_owner[first])
        branch = self.root(text, position=position, key=key, owner=owner)
        self._sources[int(self.branch_node[branch.id])] = sources
        return branch

    def mark(self, branches: Sequence[Branch]) -> NDArray[np.int64]:
        """Gives each branch a number that nothing else was ever given, `[len(branches)]`. Its forks and what is
        reassigned to it inherit the number; a branch that is rewound to before the mark loses it."""
        ids = self._ids(branches, distinct=True)
        marks = np.fromiter(itertools.islice(_MARKS, len(ids)), np.int64, len(ids))
        self.branch_mark[ids], self.branch_marked_at[ids] = marks, self.branch_length[ids]
        return marks

    def marks_of(self, branches: Sequence[Branch]) -> tuple[NDArray[np.int64], Ints]:
        """The mark of each branch, -1 where it has none, and its length when it was marked, `[len(branches)]`."""
        ids = self._ids(branches)
        return self.branch_mark[ids], self.branch_marked_at[ids]

    def match(self, tokens: ArrayLike, *, key: int = 0, owner: int = NOBODY) -> Branch | None:
        """A branch on the longest prefix of `tokens` that the tree already has, or None. Copies nothing."""
        text = _text(tokens)
        key, owner = _key_and_owner(key, owner)
        nodes = np.flatnonzero((self.capacity > 0) & (self.length > 0))
        first = self.token[self.begin[nodes]]
        best, best_length = -1, 0
        roots = (self.parent[nodes] == -1) & (self.start[nodes] == 0) & (first == text[0])
        frontier = [int(n) for n in nodes[roots] if int(n) not in self._sources]
        while frontier:
            node = frontier.pop()
            begin, start = self.begin[node], int(self.start[node])
            count = min(int(self.length[node]), len(text) - start)
            differs = np.flatnonzero(self.token[begin : begin + count] != text[start : start + count])
            reached = start + (int(differs[0]) if len(differs) else count)
            if reached > best_length:
                best, best_length = node, reached
            hangs = nodes[(self.parent[nodes] == node) & (self.start[nodes] <= min(reached, len(text) - 1))]
            frontier += [int(c) for c in hangs if self.token[self.begin[c]] == text[self.start[c]]]
        if best < 0:
            return None
        keys = np.array([key], np.uint64)
        return self._new_branches(np.array([best]), np.array([best_length]), keys, owner)[0]

    # ---------------------------------------------------------------- text

    def append(self, branches: Sequence[Branch] | NDArray[np.int64], tokens: ArrayLike) -> None:
        """One more token for each of many branches. `tokens` int `[len(branches)]`."""
        ids = self._ids(branches, distinct=True)
        self._append_each(ids, integers("tokens", tokens, 0, MAX_TOKEN, count=len(ids)))

    def append_unknown(self, branches: Sequence[Branch] | NDArray[np.int64]) -> None:
        """One more token for each branch, `UNKNOWN` until `name_newest` or `retract`."""
        self._append_each(self._ids(branches, distinct=True), UNKNOWN)

    def _append_each(self, ids: NDArray[np.int64], tokens: NDArray[np.integer] | int) -> None:
        node = self._own_nodes(ids)
        self._ensure_capacity(node, 1)
        self.token[self.begin[node] + self.length[node]] = tokens
        self.length[node] += 1
        self.branch_length[ids] += 1

    def append_text(self, branch: Branch, tokens: ArrayLike) -> None:
        """See `Branch.append`."""
        self._id(branch)
        text = integers("tokens", tokens, 0, MAX_TOKEN)
        if len(text):
            self._append(branch, text)

    def _append(self, branch: Branch, tokens: NDArray[np.integer]) -> None:
        id = np.array([branch.id])
        node = self._own_nodes(id)
        self._ensure_capacity(node, len(tokens))
        end = int(self.begin[node[0]] + self.length[node[0]])
        self.token[end : end + len(tokens)] = tokens
        self.length[node] += len(tokens)
        self.branch_length[id] += len(tokens)

    def name_newest(self, branches: Sequence[Branch] | NDArray[np.int64], tokens: ArrayLike) -> None:
        """The ids of tokens that were appended as `UNKNOWN`. `tokens` int `[len(branches)]`."""
        ids = self._ids(branches, distinct=True)
        tokens = integers("tokens", tokens, 0, MAX_TOKEN, count=len(ids))
        node, length = self.branch_node[ids], self.branch_length[ids]
        at = self.begin[node] + length - self.start[node] - 1
        assert (self.token[at] == UNKNOWN).all(), "the newest token of a branch is known already"
        self.token[at] = tokens

    def retract(self, branches: Sequence[Branch] | NDArray[np.int64]) -> None:
        """Takes back the token that `append` gave each of the branches last. Unlike after a rewind, their draws are
        what they would have been without it."""
        ids = self._ids(branches, distinct=True)
        old = self.branch_node[ids]
        if ((self.parent[old] < 0) & (self.branch_length[ids] == self.start[old] + 1)).any():
            raise InvalidInput("retract needs branches of more than one token (the root keeps a token)")
        self.branch_length[ids] -= 1
        node = np.where(self.branch_length[ids] > self.start[old], old, self.parent[old])
        np.subtract.at(self.readers, old, 1)
        np.add.at(self.readers, node, 1)
        self.branch_node[ids] = node
        self._settle(np.concatenate([old, node]))

    def tokens(self, branch: Branch) -> Ints:
        """See `Branch.tokens`."""
        pieces = [self.token[self.begin[n] : self.begin[n] + stop] for n, stop in self._path(self._id(branch))]
        return np.concatenate(pieces[::-1])

    def ids(self, branches: Sequence[Branch]) -> NDArray[np.int64]:
        """Numbers of live branches of this tree, `[len(branches)]`. Every call here takes them instead of the branches,
        and trusts them as long as none of these is dropped."""
        return self._ids(branches)

    def nodes_at(self, ids: NDArray[np.int64], positions: NDArray[np.integer]) -> Ints:
        """Node that holds the token that each of the branches `ids` has at a position, int32 `[len(ids)]`."""
        node = self.branch_node[ids]
        while (earlier := self.start[node] > positions).any():
            node = np.where(earlier, self.parent[node], node)
        return node

    def first_positions(self, ids: NDArray[np.int64]) -> Ints:
        """Position of the first token of each of the branches `ids`, int32 `[len(ids)]`."""
        node = self.branch_node[ids]
        while (below := self.parent[node] >= 0).any():
            node = np.where(below, self.parent[node], node)
        return self.start[node]

    def positions_of(self, branches: Sequence[Branch] | NDArray[np.int64]) -> tuple[Ints, Ints]:
        """Node of each branch and its length, int32 `[len(branches)]`: what `hidden_at` is compared with."""
        ids = self._ids(branches)
        return self.branch_node[ids], self.branch_length[ids]

    # ---------------------------------------------------------------- KV

    def pending(
        self, branches: Sequence[Branch] | NDArray[np.int64], positions: NDArray[np.integer] | None = None
    ) -> list[Chunk]:
        """What must be computed before tokens of the branches have hidden states: ancestors first.

        positions: of the token that each branch is named for, `[len(branches)]`, which may name a branch more than
        once; default: their last. A node has one chunk of tokens without KV. Where only hidden states are missing
        (after a rewind, of a reused prefix), their tokens are computed again: `computed` already covers them, and a
        node may have several such chunks.
        """
        ids = self._ids(branches)
        if self._unmerged:
            self._merge()
        if positions is None:
            node, last = self.branch_node[ids], self.branch_length[ids] - 1
        else:
            node, last = self.nodes_at(ids, positions), positions.astype(np.int32)
        unseen = self.hidden_at[node] != last
        node, upto = node[unseen], (last - self.start[node])[unseen] + 1
        again = upto <= self.computed[node]
        needs = self._view(node, upto)
        late = np.flatnonzero(needs > self.computed)
        late = late[np.argsort(self.start[late], kind="stable")]
        chunks = list(map(Chunk, late.tolist(), self.computed[late].tolist(), needs[late].tolist()))
        return self._computed_again(node[again], upto[again] - 1, chunks) if again.any() else chunks

    def _computed_again(
        self, node: NDArray[np.integer], offset: NDArray[np.integer], late: list[Chunk]
    ) -> list[Chunk]:
        """Chunks of tokens that have KV, at an offset in a node each, and behind them `late`, of tokens that have none;
        one that goes on where such a chunk ends becomes one with it."""
        first_late = {chunk.node: i for i, chunk in enumerate(late)}
        token = np.unique(node.astype(np.int64) << 32 | offset)
        runs = np.split(token, np.flatnonzero(np.diff(token) != 1) + 1)
        chunks = []
        for run in runs:
            at, begin, stop = int(run[0] >> 32), int(run[0] & MAX_TOKEN), int(run[-1] & MAX_TOKEN) + 1
            if at in first_late and stop == self.computed[at]:
                i = first_late[at]
                late[i] = late[i]._replace(begin=begin)
            else:
                chunks.append(Chunk(at, begin, stop))
        return chunks + late

    def view(self, branches: Sequence[Branch] | NDArray[np.int64]) -> Ints:
        """How many tokens of each node the branches see together, int32 `[num_nodes]`."""
        node, stop = self.positions_of(branches)
        return self._view(node, stop - self.start[node])

    def _view(self, node: NDArray[np.integer], upto: NDArray[np.integer]) -> Ints:
        """`view` of paths that end with the first `upto` tokens of `node`."""
        seen = np.zeros(self.num_nodes, np.int32)
        np.maximum.at(seen, node, upto)
        frontier = node
        while len(frontier):
            at, stop = self.parent[frontier], self.start[frontier]
            if self._sources:
                joined, ends = self.positions_of([s for n in frontier.tolist() for s in self._sources.get(n, ())])
                at, stop = np.concatenate([at, joined]), np.concatenate([stop, ends])
            at, stop = at[at >= 0], stop[at >= 0]
            np.maximum.at(seen, at, stop - self.start[at])
            reached = np.zeros(self.num_nodes, bool)
            reached[at] = True
            frontier = np.flatnonzero(reached)
        return seen

    def reserve(self, chunks: Sequence[Chunk]) -> None:
        """Obtains every slot that the chunks write, or raises `OutOfSlots` and changes nothing.

        A tip also reserves room: as many slots again as it has, at most 16, while the pool has plenty. When
        the pool runs short, all reservations are reclaimed first.
        """
        node, _, stop = _columns(chunks)
        short = self.held[node] < stop
        node, stop = node[short], stop[short]
        if not len(node):
            return
        tip = (self.children[node] == 0) & (stop == self.length[node])
        room = np.where(tip & (self.computed[node] > 0), np.clip(self.held[node], 1, MAX_RESERVATION) - 1, 0)
        if (stop - self.held[node] + room).sum() > self.slots.num_free:
            self.reclaim()
            room[:] = 0
        count = stop + room - self.held[node]
        taken = self.slots.take(int(count.sum()), int(count.max()))
        grown = self.held[node] + count
        self._ensure_capacity(node, np.maximum(grown - self.length[node], 0))
        self.slot_index[spans(self.begin[node] + self.held[node], count)] = taken
        self.held[node] = grown

    def reclaim(self) -> None:
        """Takes back every tip's unused reservation."""
        self._release(np.flatnonzero(self.held > self.length), self.length)

    def mark_computed(self, chunks: Sequence[Chunk]) -> None:
        """Records that a forward pass computed `chunks` and kept the hidden state of each node's last token in them."""
        node, _, stop = _columns(chunks)
        order = np.argsort(stop)  # of several chunks of a node, the last one counts
        node, stop = node[order], stop[order]
        self.computed[node] = np.maximum(self.computed[node], stop)
        self.hidden_at[node] = self.start[node] + stop - 1

    def forget(self) -> None:
        """Makes all tokens pending again, as the KV and hidden states of all are worthless from now on."""
        self.computed[:], self.hidden_at[:] = 0, -1
        self.version += 1

    def slots_of(self, chunks: Sequence[Chunk]) -> Ints:
        """Slot that each token of the chunks is written to, -1 where its KV is already there. int32 `[T]`."""
        node, first, stop = _columns(chunks)
        slots = self.slot_index[spans(self.begin[node] + first, stop - first)].copy()
        slots[spans(first, stop - first) < np.repeat(self.computed[node], stop - first)] = -1
        return slots

    def tokens_of(self, chunks: Sequence[Chunk]) -> tuple[Ints, Ints]:
        """Token ids and positions of the chunks' tokens, int32 `[T]` each."""
        node, first, stop = _columns(chunks)
        ids = self.token[spans(self.begin[node] + first, stop - first)]
        return ids, spans(self.start[node] + first, stop - first).astype(np.int32)

    def nodes_seen(self, nodes: ArrayLike) -> NDArray[np.int64]:
        """The given nodes and everything they see: ancestors and joined texts. Sorted."""
        seen = np.zeros(self.num_nodes, bool)
        frontier = np.asarray(nodes, dtype=np.int64)
        while len(frontier):
            seen[frontier] = True
            up = self.parent[frontier]
            if self._sources:
                joined = [s for n in frontier.tolist() for s in self._sources.get(n, ())]
                up = np.concatenate([up, self.positions_of(joined)[0]])
            up = up[up >= 0]
            reached = np.zeros(self.num_nodes, bool)
            reached[up] = True
            frontier = np.flatnonzero(reached & ~seen)
        return np.flatnonzero(seen)

    def sees_any(self, nodes: Sequence[int], others: set[int]) -> NDArray[np.bool_]:
        """Whether each of `nodes` sees, besides itself, any of `others`. `[len(nodes)]`."""
        if self._sources:
            return np.array([not others.isdisjoint({*self.nodes_seen([n]).tolist()} - {n}) for n in nodes])
        wanted = np.zeros(self.num_nodes + 1, bool)  # the last entry stands for what is above the roots
        wanted[list(others)] = True
        above = np.append(self.parent, -1)
        at = above[np.asarray(nodes, dtype=np.int64)]
        found = wanted[at]
        while (at >= 0).any():
            at = above[at]
            found |= wanted[at]
        return found

    def evict(self, view: Ints, wanted: int) -> int:
        """Takes slots of tokens outside `view [num_nodes]` until `wanted` are free, furthest from the roots first.

        The tokens stay, pending again. Returns the number of slots freed, 0 if all that is held is in view.
        """
        node = np.flatnonzero(self.held > view)
        node = node[np.argsort(-self.start[node], kind="stable")]
        freed = np.cumsum(self.held[node] - view[node])
        node = node[: int(np.searchsorted(freed, wanted)) + 1]
        before = self.slots.num_free
        self._release(node, view)
        return self.slots.num_free - before

    # ---------------------------------------------------------------- layout

    def layout(self, chunks: Sequence[Chunk]) -> TreeLayout:
        """One context a chunk, its rows the chunk's tokens, causal. `slot_index` is the arena itself."""
        node, first, stop = _columns(chunks)
        used = self.nodes_seen(node)
        compact = np.full(self.num_nodes + 1, -1, np.int32)  # the last entry maps parent -1 to -1
        compact[used] = np.arange(len(used))
        rows = stop - first
        row_indptr = np.concatenate(([0], np.cumsum(rows)))
        live = np.where((stop == self.length[node]) & (stop > self.computed[node]), TreeLayout.ALL, stop)
        path_indptr = np.arange(len(chunks) + 1)
        path_node, path_stop, path_top = compact[node], live, np.full(len(chunks), -1)
        if self._sources:
            paths = [self._paths(int(n), int(s)) for n, s in zip(node, live, strict=True)]
            path_indptr = np.concatenate(([0], np.cumsum([len(p) for p in paths])))
            raw_node, path_stop, raw_top = np.array([entry for p in paths for entry in p]).T
            path_node, path_top = compact[raw_node], compact[raw_top]
        positions = spans(self.start[node] + first, rows)
        parent = self.parent[used]
        fork = np.where(parent >= 0, self.start[used] - self.start[parent], 0)
        length = self.length[used].copy()
        return TreeLayout(
            slot_index=self.slot_index,
            node_begin=self.begin[used],
            node_len=length,
            node_parent=compact[parent],
            node_fork=fork,
            node_pos=self.start[used],
            row_indptr=row_indptr,
            path_indptr=path_indptr,
            path_node=path_node,
            path_stop=path_stop,
            path_top=path_top,
            causal=np.ones(len(chunks), np.int32),
            row_token=np.arange(row_indptr[-1]),
            row_pos=positions,
        )

    def _paths(self, node: int, stop: int) -> list[tuple[int, int, int]]:
        """(node, stop, top) entries that cover what `node[:stop]` sees exactly once; its own chain comes last.

        The union of the joined texts is cut into chains: a chain goes on from a child into its parent where the
        parent's visible part ends just at the child's fork, for one child only.
        """
        root = node
        while self.parent[root] >= 0:
            root = int(self.parent[root])
        view: dict[int, int] = {}  # node -> how many of its tokens some joined text sees
        todo = list(self._sources.get(root, ()))
        while todo:
            source = todo.pop()
            at, seen = int(self.branch_node[source.id]), int(self.branch_length[source.id])
            while at >= 0:
                view[at] = max(view.get(at, 0), seen - int(self.start[at]))
                seen = int(self.start[at])
                todo += self._sources.get(at, ())
                at = int(self.parent[at])
        goes_on: dict[int, int] = {}
        for child in sorted(view):
            up = int(self.parent[child])
            if up >= 0 and self.start[child] - self.start[up] == view[up]:
                goes_on.setdefault(up, child)
        entries = []
        for tip in sorted(view.keys() - goes_on.keys()):
            top = tip
            while self.parent[top] >= 0 and goes_on.get(int(self.parent[top])) == top:
                top = int(self.parent[top])
            entries.append((tip, view[tip], int(self.parent[top])))
        return [*entries, (node, stop, -1)]

    # ---------------------------------------------------------------- inner workings

    def _ids(self, branches: Iterable[Branch] | NDArray[np.int64], *, distinct: bool = False) -> NDArray[np.int64]:
        """`[len(branches)]`. Raises unless all are live branches of this tree and, if asked, no two are the same. What
        `ids` gave is let through."""
        if isinstance(branches, np.ndarray):
            return branches
        given = _listed(branches)
        try:
            ids = list(map(_ID, given))
            mine = all(map(is_, map(self._handles.__getitem__, ids), given))
        except (TypeError, AttributeError, IndexError):
            mine = False
        if not mine:
            self._refuse(given)
        if distinct and len(set(ids)) < len(ids):
            again = next(i for i, id in enumerate(ids) if id in ids[:i])
            raise InvalidInput(f"branches must be distinct, got branch {again} of {len(ids)} a second time")
        return np.array(ids, np.int64)

    def _id(self, branch: Branch) -> int:
        return int(self._ids((branch,))[0])

    def _refuse(self, given: list[Any]) -> NoReturn:
        """Says which of them is not a live branch of this tree."""
        for i, branch in enumerate(given):
            which = f"branch {i} of {len(given)}"
            if not isinstance(branch, Branch):
                raise InvalidInput(f"{which} must be a Branch, got {type(branch).__name__}")
            if not branch.alive:
                raise InvalidInput(f"{which} was dropped: it can no longer be used")
            if branch._tree is not self:
                raise InvalidInput(f"{which} belongs to {branch._tree.name}, expected one of {self.name}")
        raise InvalidInput(f"branches must be those that {self.name} gave, got other handles")

    def _path(self, id: int) -> list[tuple[int, int]]:
        """(node, tokens of it that are seen) from the branch's node up to its root."""
        node, stop = int(self.branch_node[id]), int(self.branch_length[id])
        path = []
        while node >= 0:
            path.append((node, stop - int(self.start[node])))
            stop, node = int(self.start[node]), int(self.parent[node])
        return path

    def _new_branches(
        self, node: NDArray[np.integer], length: NDArray[np.integer], key: NDArray[np.uint64], owner: int
    ) -> list[Branch]:
        count = len(node)
        if len(self._free_branches) < count:
            size = len(self.branch_node)
            more = max(count, size, 16)
            for name in _BRANCH_FIELDS:
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros(more, old.dtype)]))
            self.branch_node[size:] = -1
            self._handles.extend([None] * more)
            self._free_branches.extend(range(size + more - 1, size - 1, -1))
        ids = [self._free_branches.pop() for _ in range(count)]
        self.branch_node[ids], self.branch_length[ids] = node, length
        self.branch_key[ids], self.branch_owner[ids], self._branch_forks[ids] = key, owner, 0
        self.branch_mark[ids] = -1
        np.add.at(self.readers, node, 1)
        handles = [Branch(self, id) for id in ids]
        for handle in handles:
            self._handles[handle.id] = handle
        return handles

    def _new_nodes(
        self, parent: NDArray[np.integer], start: NDArray[np.integer], owner: NDArray[np.integer], capacity: int
    ) -> NDArray[np.int64]:
        count = len(parent)
        begin = self._new_runs(np.full(count, capacity))
        if len(self._free_nodes) < count:
            size = len(self.parent)
            more = max(count, size, 16)
            for name in _NODE_FIELDS:
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros(more, old.dtype)]))
            self.parent[size:] = -1
            self._free_nodes.extend(range(size + more - 1, size - 1, -1))
            self.num_nodes = size + more
        ids = np.array([self._free_nodes.pop() for _ in range(count)])
        self.parent[ids], self.start[ids], self.begin[ids], self.capacity[ids] = parent, start, begin, capacity
        for field in (self.length, self.computed, self.held, self.children, self.readers):
            field[ids] = 0
        self.owner[ids] = owner
        self.hidden_at[ids] = -1
        np.add.at(self.children, parent[parent >= 0], 1)
        self.version += 1
        return ids

    def _own_nodes(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The node each branch appends to: its own if nobody else looks at it, else a new child."""
        node, end = self.branch_node[ids], self.branch_length[ids]
        own = (self.readers[node] == 1) & (self.children[node] == 0) & (end == self.start[node] + self.length[node])
        if not own.all():
            away, parent = ids[~own], node[~own]
            new = self._new_nodes(parent, end[~own], self.branch_owner[away], _FIRST_CAPACITY)
            np.subtract.at(self.readers, parent, 1)
            self.readers[new] = 1
            self.branch_node[away] = new
            forked = np.unique(parent)
            self._release(forked[self.held[forked] > self.length[forked]], self.length)
        return self.branch_node[ids].astype(np.int64)

    def _ensure_capacity(self, node: NDArray[np.int64], extra: ArrayLike) -> None:
        """Makes the runs of `node` (distinct) long enough for `extra` more tokens each."""
        wanted = self.length[node] + np.asarray(extra)
        tight = wanted > self.capacity[node]
        if tight.any():
            self._move_runs(node[tight], np.maximum(wanted[tight], 2 * self.capacity[node[tight]]))

    def _move_runs(self, node: NDArray[np.int64], capacity: NDArray[np.integer]) -> None:
        begin = self._new_runs(capacity)
        length = np.maximum(self.length[node], self.held[node])
        to, at = spans(begin, length), spans(self.begin[node], length)
        self.token[to], self.slot_index[to] = self.token[at], self.slot_index[at]
        self.begin[node], self.capacity[node] = begin, capacity
        self.version += 1

    def _new_runs(self, capacity: NDArray[np.integer]) -> NDArray[np.int64]:
        """Begins of new runs in the arena, which is packed anew, and at least twice its content, when full."""
        total = int(capacity.sum())
        if self._arena_end + total > len(self.token):
            live = np.flatnonzero(self.capacity > 0)
            packed = np.cumsum(self.capacity[live], dtype=np.int64) - self.capacity[live]
            used = int(self.capacity[live].sum())
            at, to = spans(self.begin[live], self.capacity[live]), spans(packed, self.capacity[live])
            size = max(1024, 2 * (used + total))
            token, slot_index = np.zeros(size, np.int32), np.zeros(size, np.int32)
            token[to], slot_index[to] = self.token[at], self.slot_index[at]
            self.token, self.slot_index, self.begin[live], self._arena_end = token, slot_index, packed, used
            self.version += 1
        begin = self._arena_end + np.cumsum(capacity, dtype=np.int64) - capacity
        self._arena_end += total
        return begin

    def _release(self, node: NDArray[np.int64], keep: NDArray[np.int32]) -> None:
        """Gives back the slots of `node` behind the first `keep[node]`, and with them their KV."""
        if not len(node):
            return
        kept = keep[node]
        self.slots.give(self.slot_index[spans(self.begin[node] + kept, self.held[node] - kept)])
        self.held[node] = kept
        self.computed[node] = np.minimum(self.computed[node], kept)

    def _settle(self, nodes: NDArray[np.integer]) -> None:
        """After readers left `nodes`: frees dead nodes, trims unread tails, remembers what may be merged."""
        touched = np.zeros(self.num_nodes, bool)
        touched[nodes] = True
        near = np.flatnonzero(touched & (self.capacity > 0))
        dead: list[NDArray[np.int64]] = []
        while len(near := near[(self.readers[near] | self.children[near]) == 0]):
            dead.append(near)
            up = self.parent[near]
            up = up[up >= 0]
            np.subtract.at(self.children, up, 1)
            reached = np.zeros(self.num_nodes, bool)
            reached[up] = True
            touched |= reached
            near = np.flatnonzero(reached)
        if dead:
            self._free(np.concatenate(dead))
        near = np.flatnonzero(touched & (self.capacity > 0))
        if not len(near):
            return
        furthest = np.zeros(self.num_nodes, np.int32)
        reading = np.flatnonzero(self.branch_node >= 0)
        np.maximum.at(furthest, self.branch_node[reading], self.branch_length[reading])
        child = np.flatnonzero(self.parent >= 0)
        np.maximum.at(furthest, self.parent[child], self.start[child])
        unread = near[furthest[near] < self.start[near] + self.length[near]]
        if len(unread):
            self.length[unread] = furthest[unread] - self.start[unread]
            self._release(unread[self.held[unread] > self.length[unread]], self.length)
            lost = unread[self.hidden_at[unread] >= furthest[unread]]
            self.hidden_at[lost] = -1
            self.version += 1
        self._unmerged.update(near.tolist())

    def _free(self, dead: NDArray[np.int64]) -> None:
        self._release(dead[self.held[dead] > 0], np.zeros(self.num_nodes, np.int32))
        self.capacity[dead], self.length[dead], self.parent[dead] = 0, 0, -1
        self._free_nodes.extend(dead.tolist())
        self.version += 1
        for node in dead.tolist() if self._sources else ():
            self.drop(self._sources.pop(node, ()))

    def _merge(self) -> None:
        """Where a node has one child and no reader, the child takes over its tokens and slots."""
        lone = np.zeros(self.num_nodes, bool)
        lone[list(self._unmerged)] = True
        lone &= (self.readers == 0) & (self.children == 1)
        child = np.flatnonzero(self.parent >= 0)
        low = child[lone[self.parent[child]]]
        # a hole in the middle of a run would lose KV: an evicted node stays apart until it is recomputed
        high = self.parent[low]
        whole = (self.computed[high] == self.length[high]) | (self.held[low] == 0)
        self._unmerged = set(high[~whole].tolist())
        low = low[whole]
        while len(low):
            waits = np.isin(self.parent[low], low)  # its parent is itself about to take over a parent
            self._take_over(self.parent[low[~waits]], low[~waits])
            low = low[waits]

    def _take_over(self, high: NDArray[np.int32], low: NDArray[np.int64]) -> None:
        """Nodes `low` become one with their parents `high`, tokens and slots behind theirs."""
        head, tail, held = self.length[high], self.length[low], self.held[low]
        self._ensure_capacity(high.astype(np.int64), np.maximum(tail, held))
        self.token[spans(self.begin[high] + head, tail)] = self.token[spans(self.begin[low], tail)]
        self.slot_index[spans(self.begin[high] + head, held)] = self.slot_index[spans(self.begin[low], held)]
        whole = self.computed[high] == head
        self.computed[low] = np.where(whole, head + self.computed[low], self.computed[high])
        self.held[low] = np.where(held > 0, head + held, self.held[high])
        self.length[low] = head + tail
        for field in (self.start, self.parent, self.begin, self.capacity):
            field[low] = field[high]
        for field in (self.capacity, self.length, self.held, self.computed, self.children):
            field[high] = 0
        self.parent[high] = -1
        self._free_nodes.extend(high.tolist())
        self.version += 1
        for above, node in zip(high.tolist(), low.tolist(), strict=True) if self._sources else ():
            if above in self._sources:
                self._sources[node] = self._sources.pop(above)

    # ---------------------------------------------------------------- checking

    def check(self) -> None:
        """Raises AssertionError unless every invariant of the bookkeeping holds."""
        live = np.flatnonzero(self.capacity > 0)
        reading = np.flatnonzero(self.branch_node >= 0)
        assert (self.capacity[self.branch_node[reading]] > 0).all(), "a branch reads a freed node"
        readers = np.bincount(self.branch_node[reading], minlength=self.num_nodes)
        assert (readers[live] == self.readers[live]).all(), "readers differ from branches"
        parents = self.parent[live]
        assert (self.capacity[parents[parents >= 0]] > 0).all(), "a node hangs off a freed one"
        children = np.bincount(parents[parents >= 0], minlength=self.num_nodes)
        assert (children[live] == self.children[live]).all(), "children differ from parents"
        assert (children[live] + readers[live] > 0).all(), "a node nobody reads is still there"
        end = self.start[live] + self.length[live]
        hung = live[parents >= 0]
        fork = self.start[hung]
        above = self.parent[hung]
        assert (fork > self.start[above]).all() and (fork <= self.start[above] + self.length[above]).all(), (
            "a node forks outside its parent"
        )
        furthest = np.zeros(self.num_nodes, np.int32)
        np.maximum.at(furthest, self.branch_node[reading], self.branch_length[reading])
        np.maximum.at(furthest, above, fork)
        assert (furthest[live] == end).all(), "a node has tokens that nobody sees"
        chain = above[(readers[above] == 0) & (children[above] == 1)]
        assert self._unmerged.issuperset(chain.tolist()), "a node with one child and no reader will not be merged"
        assert (self.computed[live] <= self.held[live]).all(), "KV without a slot"
        assert (self.computed[live] <= self.length[live]).all(), "KV of tokens that are gone"
        assert (np.maximum(self.length, self.held)[live] <= self.capacity[live]).all(), "a run overflows"
        reserved = self.held[live] - self.length[live]
        assert (reserved < MAX_RESERVATION).all(), "a reservation is too large"
        assert not (reserved[self.children[live] > 0] > 0).any(), "a forked node keeps a reservation"
        owned = self.slot_index[spans(self.begin[live], self.held[live])]
        free = self.slots.is_free()
        assert len(np.unique(owned)) == len(owned), "a slot has two owners"
        assert not free[owned].any(), "an owned slot is free"
        assert len(owned) + free.sum() == len(free), "a slot is lost"
        assert self.slots.in_use == len(owned), "the count of free slots is wrong"
        order = live[np.argsort(self.begin[live])]
        assert (np.diff(self.begin[order]) >= self.capacity[order][:-1]).all(), "two runs overlap"
        assert len(live) + len(self._free_nodes) == self.num_nodes, "a node is lost"


def reassign(branches: Sequence[Branch], parents: ArrayLike) -> list[Branch]:
    """See `Tree.reassign`: branch `i` of the result sees what `branches[parents[i]]` sees now."""
    return _tree_of(branches).reassign(branches, parents)


_BRANCH_FIELDS = (
    "branch_node",
    "branch_length",
    "branch_key",
    "branch_owner",
    "branch_mark",
    "branch_marked_at",
    "_branch_forks",
)
_NODE_FIELDS = (
    "parent",
    "start",
    "length",
    "computed",
    "held",
    "begin",
    "capacity",
    "children",
    "readers",
    "owner",
    "hidden_at",
)


def append(branches: Sequence[Branch], tokens: ArrayLike) -> None:
    """See `Tree.append`: one more token for each branch."""
    _tree_of(branches).append(branches, tokens)


def _listed(branches: Any) -> list[Any]:
    try:
        return list(branches)
    except TypeError:
        raise InvalidInput(f"branches must be a sequence of branches, got {type(branches).__name__}") from None


def _tree_of(branches: Sequence[Branch]) -> Tree:
    """A tree that knows whether all of them are its own."""
    return next((b._tree for b in _listed(branches) if isinstance(b, Branch)), None) or Tree(1)


def _text(tokens: ArrayLike) -> NDArray[np.integer]:
    text = integers("tokens", tokens, 0, MAX_TOKEN)
    if not len(text):
        raise InvalidInput("tokens must be at least one id, got none")
    return text


def _owner(owner: int) -> int:
    return integer("owner", owner, NOBODY, MAX_TOKEN)


def _key_and_owner(key: int, owner: int) -> tuple[int, int]:
    return integer("key", key, 0, 2**64 - 1), _owner(owner)


def _columns(chunks: Sequence[Chunk]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Nodes, begins and stops, `[len(chunks)]` each."""
    node, begin, stop = np.array(chunks, dtype=np.int64).reshape(-1, 3).T
    return node, begin, stop
