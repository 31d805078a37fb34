"""The tree of tokens: nodes, and the branches that end in them.

A token is written once, by its node, and never moves. A fork is a pair (node, length) and copies nothing, at any
offset. A node with several readers is never written in place: a branch that appends gets a child node of its own.
"""

import itertools
from collections.abc import Iterable, Sequence
from operator import attrgetter, is_
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike

from forktree.checks import integer, integers
from forktree.errors import InvalidInput
from forktree.kv.check import check_nodes
from forktree.kv.nodes import Chunk, Nodes
from forktree.kv.tags import Tags
from forktree.ops.splitmix import splitmix64
from forktree.types import MAX_TOKEN_ID, Int32Array, Int64Array, IntArray, UInt64Array

_ID = attrgetter("id")
_NUMBERS = itertools.count()  # shared by all trees of the process: tells trees of one name apart in messages
NO_OWNER = -1
PENDING_TOKEN = -1  # stands for the last token of a branch while only the device knows it; equal to no id
_FIRST_CAPACITY = 16
MAX_POSITION = 2**30  # so that no length overflows: a root begins below, and no tree holds as many tokens again
MAX_FORKS = 2**20  # in one call


class Branch:
    """A live hypothesis: a handle to the tokens it sees. Handles are compared by identity.

    Attributes:
        tree: The tree it belongs to.
        id: Index of the tree's branch arrays, -1 once dropped.
    """

    __slots__ = ("id", "tree")

    def __init__(self, tree: "Tree", id: int) -> None:
        self.tree = tree
        self.id = id

    @property
    def alive(self) -> bool:
        """False once dropped."""
        return self.id >= 0

    @property
    def length(self) -> int:
        """Position after its last token; for a text that starts at 0, the number of its tokens."""
        return int(self.tree.branch_length[self._checked()])

    @property
    def tokens(self) -> Int32Array:
        """Token ids from the root on, int32 `[length - position of the root]`; a copy."""
        return self.tree.tokens(self)

    @property
    def key(self) -> int:
        """Key of its random numbers; together with a position it determines each of them."""
        return int(self.tree.branch_key[self._checked()])

    def fork(self, n: int) -> list["Branch"]:
        """`n` more branches that see the same tokens. Takes no slots and copies no tokens."""
        return self.tree.fork(self, n)

    def append(self, tokens: ArrayLike) -> None:
        """Adds tokens after its last one; they are pending until a forward pass computes them."""
        self.tree.append_text(self, tokens)

    def rewind(self, length: int) -> None:
        """Forgets the tokens from position `length` on."""
        self.tree.rewind(self, length)

    def drop(self) -> None:
        """Ends the branch and frees the slots that nobody else sees. Dropping it twice is harmless."""
        if self.alive:
            self.tree.drop([self])

    def _checked(self) -> int:
        if self.id < 0:
            raise InvalidInput("branch was dropped: it can no longer be used")
        return self.id


class Tree(Nodes):
    """Nodes and the branches on them: struct of arrays, by node (see `Nodes`) or by branch id.

    Every call checks, before it changes anything, that the branches it is given are live branches of this tree and
    that values are in range; it raises `InvalidInput` otherwise.

    Attributes:
        branch_node: Node of the last token; -1 = no such branch.
        branch_length: Position after the last token.
        branch_key: Names the branch's random numbers.
        branch_owner: A number of the caller's; forks inherit it.
        tags: Numbers by which a caller knows texts again.
    """

    def __init__(self, num_slots: int, *, name: str = "a model") -> None:
        """name: of its model, for messages."""
        self.name = f"tree {next(_NUMBERS)} of {name}"
        self._begin(num_slots)

    def _begin(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self.branch_node = np.zeros(0, np.int32)
        self.branch_length = np.zeros(0, np.int32)
        self.branch_key = np.zeros(0, np.uint64)
        self.branch_owner = np.zeros(0, np.int32)
        self.tags = Tags()
        self._branch_forks = np.zeros(0, np.uint64)
        self._handles: list[Branch | None] = []
        self._free_branches: list[int] = []

    def clear(self) -> None:
        """Ends every branch and begins anew, whatever state a call that was cut short left behind."""
        for handle in self._handles:
            if handle is not None:
                handle.id = -1
        self._begin(self.slots.num_slots)

    # ---------------------------------------------------------------- branches

    def root(self, tokens: ArrayLike, *, position: int = 0, key: int = 0, owner: int = NO_OWNER) -> Branch:
        """A new text.

        Args:
            tokens: Its ids, at least one.
            position: Where the first of them stands.
            key: 64 bits that seed the branch's random numbers.
            owner: A number of the caller's; forks inherit it, and `drop_owned` drops all branches that carry it.
        """
        text = _text(tokens)
        position = integer("position", position, 0, MAX_POSITION)
        key, owner = _key_and_owner(key, owner)
        node = self._new_nodes(np.array([-1]), np.array([position]), np.array([owner]), len(text))
        branch = self._new_branches(node, np.array([position]), np.array([key], np.uint64), owner)[0]
        self._append(branch, text)
        return branch

    def match(self, tokens: ArrayLike, *, key: int = 0, owner: int = NO_OWNER) -> Branch | None:
        """A branch on the longest prefix of `tokens` that the tree already has, or None. Copies nothing."""
        text = _text(tokens)
        key, owner = _key_and_owner(key, owner)
        node, length = self.longest_prefix(text)
        if node < 0:
            return None
        return self._new_branches(np.array([node]), np.array([length]), np.array([key], np.uint64), owner)[0]

    def fork(self, branch: Branch, n: int, *, owner: int | None = None, counted: bool = True) -> list[Branch]:
        """See `Branch.fork`.

        Args:
            branch: What is forked.
            n: How often.
            owner: Of the forks; default: the branch's.
            counted: Whether later forks have other random numbers than they would have without these.
        """
        id = self._id(branch)
        n = integer("n", n, 0, MAX_FORKS)
        owner = int(self.branch_owner[id]) if owner is None else _owner(owner)
        nth = self._branch_forks[id] + np.arange(1, n + 1, dtype=np.uint64)
        if counted:
            self._branch_forks[id] += np.uint64(n)
        keys = splitmix64(self.branch_key[id : id + 1] ^ splitmix64(nth))
        node, length = np.repeat(self.branch_node[id], n), np.repeat(self.branch_length[id], n)
        forks = self._new_branches(node, length, keys, owner)
        self.tags.inherit(self.ids(forks), id)
        return forks

    def rewind(self, branch: Branch, length: int) -> None:
        """See `Branch.rewind`. The branch's later random numbers differ from those it had before."""
        id = self._id(branch)
        node, have = int(self.branch_node[id]), int(self.branch_length[id])
        minimum = 1 + int(self.start[self.path(node, have)[-1][0]])  # the root keeps a token
        length = integer("rewind length", length, minimum, have)
        while length <= self.start[node]:
            node = int(self.parent[node])
        if length < have:
            self.branch_key[id] = splitmix64(self.branch_key[id : id + 1])[0]
        self.tags.rewind(id, length)
        self._move(np.array([id]), np.array([node]), np.array([length]))

    def follow(self, branch: Branch, other: Branch, length: int) -> None:
        """Lets `branch` see the first `length` tokens of `other`, a fork of it that went on, and at least its own.

        Unlike after `reassign`, its random numbers and those of its later forks stay as they are.
        """
        ids = self.ids((branch, other))
        have, most = self.branch_length[ids].tolist()
        end = np.array([integer("length to follow", length, have, most)])
        self._move(ids[:1], self.nodes_at(ids[1:], end - 1), end)

    def drop(self, branches: Iterable[Branch]) -> None:
        """Ends many branches at once; those already dropped, or named before, are passed over."""
        ids = np.unique(self.ids([b for b in _listed(branches) if not isinstance(b, Branch) or b.alive]))
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
        self._collect_garbage(nodes)

    def owned(self, owner: int) -> list[Branch]:
        """The live branches of `owner`."""
        ids = np.flatnonzero((self.branch_node >= 0) & (self.branch_owner == owner))
        return [handle for id in ids.tolist() if (handle := self._handles[id]) is not None]

    def has_owners(self) -> bool:
        """Whether any live branch has an owner."""
        return bool(((self.branch_node >= 0) & (self.branch_owner != NO_OWNER)).any())

    def drop_owned(self, owner: int) -> None:
        """Ends every branch of `owner`."""
        self.drop(self.owned(owner))

    def reassign(self, branches: Sequence[Branch], parents: ArrayLike) -> list[Branch]:
        """Branch `i` of the result sees what `branches[parents[i]]` sees now: fork and drop in one array call.

        The first `len(parents)` handles are reused, missing ones made, surplus ones dropped. Each branch keeps random
        numbers of its own; they are new where it sees another text than before.
        """
        branches = _listed(branches)
        ids = self.ids(branches, distinct=True)
        count = len(ids)
        ancestors = integers("parents", parents, 0, count - 1)
        more = ancestors[count:]
        forks = {a: iter(self.fork(branches[a], n)) for a, n in zip(*_counted(more), strict=True)}
        extra = [next(forks[a]) for a in more.tolist()]
        kept, source = ids[: len(ancestors)], ids[ancestors[:count]]
        old, new = self.branch_node[kept], self.branch_node[source]
        come, gone = (np.bincount(nodes, minlength=self.num_nodes) for nodes in (new, old))
        self.readers += (come - gone).astype(np.int32)
        self.branch_node[kept], self.branch_length[kept] = new, self.branch_length[source]
        self.tags.inherit(kept, source)
        moved = kept[kept != source]
        self.branch_key[moved] = splitmix64(self.branch_key[moved])  # it may be at a position it already sampled at
        self.drop(branches[len(ancestors) :])
        self._collect_garbage(old)
        return [*branches[: len(ancestors)], *extra]

    def join(self, branches: Sequence[Branch], tokens: ArrayLike) -> Branch:
        """A branch whose `tokens` follow, and see, all of `branches` (each shared token once).

        Its first token stands after the longest of them. The joined texts stay alive as long as it does.
        """
        text, joined = _text(tokens), _listed(branches)
        ids = self.ids(joined)
        if not len(ids):
            raise InvalidInput("join needs at least one branch, got none")
        position = integer("position", self.branch_length[ids].max(), 0, MAX_POSITION)
        ends, lengths, first = self.branch_node[ids], self.branch_length[ids], ids[0]
        np.add.at(self.readers, ends, 1)
        key, owner = int(self.branch_key[first]), int(self.branch_owner[first])
        branch = self.root(text, position=position, key=key, owner=owner)
        of = np.full(len(ids), self.branch_node[branch.id])
        self.source_of = np.concatenate([self.source_of, of])
        self.source_node = np.concatenate([self.source_node, ends])
        self.source_length = np.concatenate([self.source_length, lengths])
        return branch

    # ---------------------------------------------------------------- text

    def append(self, branches: Sequence[Branch] | Int64Array, tokens: ArrayLike) -> None:
        """One more token for each of many branches. `tokens` int `[len(branches)]`."""
        ids = self.ids(branches, distinct=True)
        self._append_each(ids, integers("tokens", tokens, 0, MAX_TOKEN_ID, count=len(ids)))

    def append_pending(self, branches: Sequence[Branch] | Int64Array) -> None:
        """One more token for each branch, `PENDING_TOKEN` until `resolve_last_tokens` or `undo_append`."""
        self._append_each(self.ids(branches, distinct=True), PENDING_TOKEN)

    def resolve_last_tokens(self, branches: Sequence[Branch] | Int64Array, tokens: ArrayLike) -> None:
        """Fills in the ids of tokens that were appended as `PENDING_TOKEN`. `tokens` int `[len(branches)]`."""
        ids = self.ids(branches, distinct=True)
        tokens = integers("tokens", tokens, 0, MAX_TOKEN_ID, count=len(ids))
        node, length = self.branch_node[ids], self.branch_length[ids]
        at = self.arena.begin[node] + length - self.start[node] - 1
        assert (self.arena.token[at] == PENDING_TOKEN).all(), "the last token of a branch is known already"
        self.arena.token[at] = tokens

    def undo_append(self, branches: Sequence[Branch] | Int64Array) -> None:
        """Takes back the token that `append` gave each of the branches last.

        Unlike after a rewind, their random numbers are what they would have been without it.
        """
        ids = self.ids(branches, distinct=True)
        old = self.branch_node[ids]
        if ((self.parent[old] < 0) & (self.branch_length[ids] == self.start[old] + 1)).any():
            raise InvalidInput("undo_append needs branches of more than one token (the root keeps a token)")
        length = self.branch_length[ids] - 1
        self._move(ids, np.where(length > self.start[old], old, self.parent[old]), length)

    def append_text(self, branch: Branch, tokens: ArrayLike) -> None:
        """See `Branch.append`."""
        self._id(branch)
        text = integers("tokens", tokens, 0, MAX_TOKEN_ID)
        if len(text):
            self._append(branch, text)

    def tokens(self, branch: Branch) -> Int32Array:
        """See `Branch.tokens`."""
        id = self._id(branch)
        begin, token = self.arena.begin, self.arena.token
        path = self.path(int(self.branch_node[id]), int(self.branch_length[id]))
        return np.concatenate([token[begin[node] : begin[node] + count] for node, count in path[::-1]])

    def _append_each(self, ids: Int64Array, tokens: IntArray | int) -> None:
        node = self._own_nodes(ids)
        self._ensure_capacity(node, 1)
        self.arena.token[self.arena.begin[node] + self.length[node]] = tokens
        self.length[node] += 1
        self.branch_length[ids] += 1

    def _append(self, branch: Branch, tokens: IntArray) -> None:
        id = np.array([branch.id])
        node = self._own_nodes(id)
        self._ensure_capacity(node, len(tokens))
        end = int(self.arena.begin[node[0]] + self.length[node[0]])
        self.arena.token[end : end + len(tokens)] = tokens
        self.length[node] += len(tokens)
        self.branch_length[id] += len(tokens)

    # ---------------------------------------------------------------- what is to be computed

    def ids(self, branches: Iterable[Branch] | Int64Array, *, distinct: bool = False) -> Int64Array:
        """Indices of the branch arrays, `[len(branches)]`.

        Every call here takes such an array in place of the branches, and trusts it: it is good as long as none of these
        is dropped.

        Raises:
            InvalidInput: a branch is not a live one of this tree or, if `distinct`, two are the same.
        """
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

    def nodes_at(self, ids: Int64Array, positions: IntArray) -> Int32Array:
        """Node that holds the token that each of the branches `ids` has at a position, int32 `[len(ids)]`."""
        node = self.branch_node[ids]
        while (earlier := self.start[node] > positions).any():
            node = np.where(earlier, self.parent[node], node)
        return node

    def first_positions(self, ids: Int64Array) -> Int32Array:
        """Position of the first token of each of the branches `ids`, int32 `[len(ids)]`."""
        node = self.branch_node[ids]
        while (below := self.parent[node] >= 0).any():
            node = np.where(below, self.parent[node], node)
        return self.start[node]

    def tips(self, branches: Sequence[Branch] | Int64Array) -> tuple[Int32Array, Int32Array]:
        """Node of each branch and its length, int32 `[len(branches)]`."""
        ids = self.ids(branches)
        return self.branch_node[ids], self.branch_length[ids]

    def view(self, branches: Sequence[Branch] | Int64Array) -> Int32Array:
        """How many tokens of each node the branches see together, int32 `[num_nodes]`."""
        return self.visible_lengths(*self.tips(branches))

    def pending(self, branches: Sequence[Branch] | Int64Array, positions: IntArray | None = None) -> list[Chunk]:
        """What must be computed before tokens of the branches have hidden states: ancestors first.

        A node has at most one chunk of tokens without KV. Where only hidden states are missing (after a rewind, or in a
        reused prefix), their tokens are computed again, which `num_computed` already covers; a node may have several
        such chunks.

        Args:
            branches: `[n]`; one may be named several times.
            positions: Of the token that each branch is named for, `[n]`. Default: its last.
        """
        ids = self.ids(branches)
        if self._unmerged:
            self._merge()
        if positions is None:
            node, last = self.branch_node[ids], self.branch_length[ids] - 1
        else:
            node, last = self.nodes_at(ids, positions), positions.astype(np.int32)
        unseen = self.hidden_position[node] != last
        node, last = node[unseen], last[unseen]
        offset = last - self.start[node]
        again = offset < self.num_computed[node]
        needs = self.visible_lengths(node, last + 1)
        late = np.flatnonzero(needs > self.num_computed)
        late = late[np.argsort(self.start[late], kind="stable")]
        chunks = list(map(Chunk, late.tolist(), self.num_computed[late].tolist(), needs[late].tolist()))
        return self._computed_again(node[again], offset[again], chunks) if again.any() else chunks

    def _computed_again(self, node: IntArray, offset: IntArray, late: list[Chunk]) -> list[Chunk]:
        """Chunks of tokens that have KV, at an offset in a node each, then `late`, those of tokens that have none.

        A chunk of `late` that begins where one of the others ends becomes one with it.
        """
        first_late = {chunk.node: i for i, chunk in enumerate(late)}
        token = np.unique(node.astype(np.int64) << 32 | offset)
        chunks = []
        for run in np.split(token, np.flatnonzero(np.diff(token) != 1) + 1):
            at, begin, stop = int(run[0] >> 32), int(run[0] & MAX_TOKEN_ID), int(run[-1] & MAX_TOKEN_ID) + 1
            if at in first_late and stop == self.num_computed[at]:
                i = first_late[at]
                late[i] = late[i]._replace(begin=begin)
            else:
                chunks.append(Chunk(at, begin, stop))
        return chunks + late

    def check(self) -> None:
        """Raises AssertionError unless every invariant of the bookkeeping holds."""
        reading = np.flatnonzero(self.branch_node >= 0)
        check_nodes(self, self.branch_node[reading], self.branch_length[reading])

    # ---------------------------------------------------------------- inner workings

    def _id(self, branch: Branch) -> int:
        return int(self.ids((branch,))[0])

    def _refuse(self, given: list[Any]) -> NoReturn:
        """Says which of them is not a live branch of this tree."""
        for i, branch in enumerate(given):
            which = f"branch {i} of {len(given)}"
            if not isinstance(branch, Branch):
                raise InvalidInput(f"{which} must be a Branch, got {type(branch).__name__}")
            if not branch.alive:
                raise InvalidInput(f"{which} was dropped: it can no longer be used")
            if branch.tree is not self:
                raise InvalidInput(f"{which} belongs to {branch.tree.name}, expected one of {self.name}")
        raise InvalidInput(f"branches must be those that {self.name} gave, got other handles")

    def _new_branches(self, node: IntArray, length: IntArray, key: UInt64Array, owner: int) -> list[Branch]:
        count = len(node)
        if len(self._free_branches) < count:
            size = len(self.branch_node)
            more = max(count, size, 16)
            for name in _BRANCH_FIELDS:
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros(more, old.dtype)]))
            self.branch_node[size:] = -1
            self.tags.add_branches(more)
            self._handles.extend([None] * more)
            self._free_branches.extend(range(size + more - 1, size - 1, -1))
        ids = [self._free_branches.pop() for _ in range(count)]
        self.branch_node[ids], self.branch_length[ids] = node, length
        self.branch_key[ids], self.branch_owner[ids], self._branch_forks[ids] = key, owner, 0
        self.tags.clear(ids)
        np.add.at(self.readers, node, 1)
        handles = [Branch(self, id) for id in ids]
        for handle in handles:
            self._handles[handle.id] = handle
        return handles

    def _move(self, ids: Int64Array, node: IntArray, length: IntArray) -> None:
        """Lets each of the branches `ids` end in a node, at a length."""
        old = self.branch_node[ids]
        np.subtract.at(self.readers, old, 1)
        np.add.at(self.readers, node, 1)
        self.branch_node[ids], self.branch_length[ids] = node, length
        self._collect_garbage(np.concatenate([old, node]))

    def _own_nodes(self, ids: Int64Array) -> Int64Array:
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
            self._release(forked[self.num_slots[forked] > self.length[forked]], self.length)
        return self.branch_node[ids].astype(np.int64)

    def _collect_garbage(self, nodes: IntArray) -> None:
        """After readers left `nodes`: frees dead nodes, trims unread tails, remembers what may be merged."""
        touched = np.zeros(self.num_nodes, bool)
        touched[nodes] = True
        near = np.flatnonzero(touched & (self.arena.capacity > 0))
        dead: list[Int64Array] = []
        while len(near := near[(self.readers[near] | self.children[near]) == 0]):
            dead.append(near)
            up = self.parent[near]
            up = up[up >= 0]
            np.subtract.at(self.children, up, 1)
            reached = np.zeros(self.num_nodes, bool)
            reached[up] = True
            if len(self.source_of):
                reached[self._remove_sources(near)] = True
            touched |= reached
            near = np.flatnonzero(reached)
        if dead:
            self._free(np.concatenate(dead))
        near = np.flatnonzero(touched & (self.arena.capacity > 0))
        if not len(near):
            return
        furthest = np.zeros(self.num_nodes, np.int32)
        reading = np.flatnonzero(self.branch_node >= 0)
        np.maximum.at(furthest, self.branch_node[reading], self.branch_length[reading])
        np.maximum.at(furthest, self.source_node, self.source_length)
        child = np.flatnonzero(self.parent >= 0)
        np.maximum.at(furthest, self.parent[child], self.start[child])
        self._trim(near[furthest[near] < self.start[near] + self.length[near]], furthest)
        self._unmerged.update(near.tolist())


def reassign(branches: Sequence[Branch], parents: ArrayLike) -> list[Branch]:
    """See `Tree.reassign`: branch `i` of the result sees what `branches[parents[i]]` sees now."""
    return _tree_of(branches).reassign(branches, parents)


def append(branches: Sequence[Branch], tokens: ArrayLike) -> None:
    """See `Tree.append`: one more token for each branch."""
    _tree_of(branches).append(branches, tokens)


_BRANCH_FIELDS = ("branch_node", "branch_length", "branch_key", "branch_owner", "_branch_forks")


def _listed(branches: Any) -> list[Any]:
    try:
        return list(branches)
    except TypeError:
        raise InvalidInput(f"branches must be a sequence of branches, got {type(branches).__name__}") from None


def _counted(values: Int64Array) -> tuple[list[int], list[int]]:
    """The different values, and how often each occurs."""
    different, count = np.unique(values, return_counts=True)
    return different.tolist(), count.tolist()


def _tree_of(branches: Sequence[Branch]) -> Tree:
    """A tree that knows whether all of them are its own."""
    return next((b.tree for b in _listed(branches) if isinstance(b, Branch)), None) or Tree(1)


def _text(tokens: ArrayLike) -> IntArray:
    text = integers("tokens", tokens, 0, MAX_TOKEN_ID)
    if not len(text):
        raise InvalidInput("tokens must be at least one id, got none")
    return text


def _owner(owner: int) -> int:
    return integer("owner", owner, NO_OWNER, MAX_TOKEN_ID)


def _key_and_owner(key: int, owner: int) -> tuple[int, int]:
    return integer("key", key, 0, 2**64 - 1), _owner(owner)
