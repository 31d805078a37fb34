"""The tree against a naive model: every branch is a list of token objects, nothing is shared but identity."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from forktree.kv import Branch, OutOfSlots, PrefixIndex, Tree, reassign
from forktree.kv.tree import MAX_RESERVATION

NUM_SLOTS = 160


class Token:
    """One written token. `sees` are the tokens of joined texts that everything behind it sees too."""

    def __init__(self, id: int, position: int, sees: frozenset["Token"] = frozenset()) -> None:
        self.id, self.position, self.sees = id, position, sees


class TreeMachine(RuleBasedStateMachine):
    """Drives fork, append, rewind, drop, reassign, join, prefix reuse, computing and evicting at random."""

    branches = Bundle("branches")

    def __init__(self) -> None:
        super().__init__()
        self.tree = Tree(NUM_SLOTS)
        self.prefixes = PrefixIndex(self.tree)
        self.naive: dict[Branch, list[Token]] = {}
        self.kept: dict[bytes, list[Token]] = {}

    @rule(target=branches, tokens=st.lists(st.integers(0, 3), min_size=1, max_size=12))
    def root(self, tokens: list[int]) -> Branch:
        branch = self.tree.root(tokens)
        self.naive[branch] = [Token(t, i) for i, t in enumerate(tokens)]
        return branch

    @rule(target=branches, branch=branches, n=st.integers(1, 3))
    def fork(self, branch: Branch, n: int):
        if not branch.alive:
            return multiple()
        in_use = self.tree.slots.in_use
        forks = branch.fork(n)
        assert self.tree.slots.in_use == in_use, "a fork took slots"
        for fork in forks:
            self.naive[fork] = list(self.naive[branch])
        return multiple(*forks)

    @rule(branch=branches, tokens=st.lists(st.integers(0, 3), min_size=1, max_size=20))
    def append(self, branch: Branch, tokens: list[int]) -> None:
        if branch.alive:
            branch.append(tokens)
            path = self.naive[branch]
            path += [Token(t, path[-1].position + 1 + i) for i, t in enumerate(tokens)]

    @rule(data=st.data())
    def append_one_to_many(self, data: st.DataObject) -> None:
        if self.naive:
            some = data.draw(st.lists(st.sampled_from(list(self.naive)), min_size=1, unique=True))
            tokens = [data.draw(st.integers(0, 3)) for _ in some]
            self.tree.append(some, tokens)
            for branch, t in zip(some, tokens, strict=True):
                self.naive[branch].append(Token(t, self.naive[branch][-1].position + 1))

    @rule(branch=branches, data=st.data())
    def rewind(self, branch: Branch, data: st.DataObject) -> None:
        if branch.alive:
            path = self.naive[branch]
            length = data.draw(st.integers(path[0].position + 1, path[-1].position + 1))
            branch.rewind(length)
            self.naive[branch] = path[: length - path[0].position]

    @rule(branch=consumes(branches))
    def drop(self, branch: Branch) -> None:
        branch.drop()
        self.naive.pop(branch, None)

    @rule(target=branches, data=st.data())
    def reassign(self, data: st.DataObject):
        if not self.naive:
            return multiple()
        some = data.draw(st.lists(st.sampled_from(list(self.naive)), min_size=1, unique=True))
        parents = data.draw(st.lists(st.integers(0, len(some) - 1), min_size=1, max_size=len(some) + 2))
        paths = [list(self.naive[some[p]]) for p in parents]
        in_use = self.tree.slots.in_use
        out = reassign(some, parents)
        assert self.tree.slots.in_use <= in_use
        for gone in some[len(parents) :]:
            del self.naive[gone]
        self.naive.update(zip(out, paths, strict=True))
        return multiple(*out[len(some) :])

    @rule(target=branches, data=st.data(), tokens=st.lists(st.integers(0, 3), min_size=1, max_size=4))
    def join(self, data: st.DataObject, tokens: list[int]):
        if len(self.naive) < 2:
            return multiple()
        some = data.draw(st.lists(st.sampled_from(list(self.naive)), min_size=1, max_size=3, unique=True))
        branch = self.tree.join(some, tokens)
        seen = frozenset(t for b in some for t in self._visible(self.naive[b]))
        start = max(self.naive[b][-1].position for b in some) + 1
        self.naive[branch] = [Token(t, start + i, seen) for i, t in enumerate(tokens)]
        return branch

    @rule(branch=branches)
    def keep(self, branch: Branch) -> None:
        if branch.alive and self.naive[branch][0].position == 0:
            key = branch.tokens.tobytes()
            self.prefixes.keep(branch)
            self.kept.setdefault(key, list(self.naive[branch]))

    @rule()
    def forget_oldest(self) -> None:
        if self.prefixes.branches():
            key = self.prefixes.branches()[0].tokens.tobytes()
            assert self.prefixes.evict()
            del self.kept[key]

    @rule(target=branches, tokens=st.lists(st.integers(0, 3), min_size=1, max_size=12))
    def match(self, tokens: list[int]):
        texts = [p for p in (*self.naive.values(), *self.kept.values()) if p[0].position == 0 and not p[0].sees]
        longest = max((_common(tokens, path) for path in texts), default=0)
        branch = self.tree.match(tokens)
        if branch is None:
            assert longest == 0
            return multiple()
        assert branch.length == longest
        ids = branch.tokens.tolist()
        shared = [p for p in texts if [t.id for t in p[:longest]] == ids]
        # several texts may hold equal tokens; the tree says which it shares by the slots' owner: any is right
        self.naive[branch] = next(
            p[:longest] for p in shared if self._node_of(branch) in self._nodes(p, longest)
        )
        return branch

    def _node_of(self, branch: Branch) -> int:
        return int(self.tree.branch_node[branch.id])

    def _nodes(self, path: list[Token], length: int) -> set[int]:
        """Nodes at which some live branch or kept prefix with this very path passes position `length`."""
        out = set()
        every = [(b, p) for b, p in self.naive.items()]
        every += [(b, self.kept[b.tokens.tobytes()]) for b in self.prefixes.branches()]
        for branch, other in every:
            if other[:length] == path[:length]:
                for node, stop in self.tree._path(branch.id):
                    start = int(self.tree.start[node])
                    if start < length <= start + stop or start < length <= start + self.tree.length[node]:
                        out.add(node)
        return out

    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        if not self.naive:
            return
        some = data.draw(st.lists(st.sampled_from(list(self.naive)), min_size=1, unique=True))
        while chunks := self.tree.pending(some):  # a node keeps one hidden state: those served leave the request
            before = self.tree.slots.in_use
            try:
                self.tree.reserve(chunks)
            except OutOfSlots:
                assert self.tree.slots.in_use <= before
                return
            slots = self.tree.slots_of(chunks)
            assert len(np.unique(slots[slots >= 0])) == (slots >= 0).sum()
            layout = self.tree.layout(chunks)
            self._check_layout(layout, chunks)
            self.tree.mark_computed(chunks)
            self.tree.check()
            node, length = self.tree.positions_of(some)
            ready = self.tree.hidden_at[node] == length - 1
            assert ready.any(), "a pass served nobody"
            some = [b for b, r in zip(some, ready, strict=True) if not r]

    def _check_layout(self, layout, chunks) -> None:
        """Each row sees exactly what the naive model says, for those chunks whose branch we know."""
        slot_of = {}
        for branch, path in self.naive.items():
            for token, slot in zip(path, self._slots(branch), strict=True):
                slot_of[token] = slot
        row = 0
        for chunk in chunks:
            for offset in range(chunk.begin, chunk.stop):
                position = int(self.tree.start[chunk.node]) + offset
                path = self._path_through(chunk.node, position)
                if path is not None:
                    index = position - path[0].position
                    want = {slot_of[t] for t in self._visible(path[: index + 1]) if t in slot_of}
                    slots = layout.slot_index[layout.visible(row)[0]]
                    assert len(slots) == len(self._visible(path[: index + 1]))
                    assert len(set(slots.tolist())) == len(slots), "a token is seen twice"
                    assert want <= set(slots.tolist())
                row += 1

    def _path_through(self, node: int, position: int):
        for branch, path in self.naive.items():
            for n, stop in self.tree._path(branch.id):
                if n == node and self.tree.start[n] <= position < self.tree.start[n] + stop:
                    return path
        return None

    def _slots(self, branch: Branch) -> list[int]:
        pieces = []
        for node, stop in self.tree._path(branch.id):
            begin, held = int(self.tree.begin[node]), int(self.tree.held[node])
            slots = self.tree.slot_index[begin : begin + stop].tolist()
            pieces.append([s if i < held else -1000 - begin - i for i, s in enumerate(slots)])
        return [s for piece in pieces[::-1] for s in piece]

    @rule(branch=branches)
    def evict(self, branch: Branch) -> None:
        if branch.alive:
            self.tree.evict(self.tree.nodes_seen([self._node_of(branch)]))

    @staticmethod
    def _visible(path: list[Token]) -> set[Token]:
        return set(path).union(*(t.sees for t in path))

    @invariant()
    def bookkeeping_holds(self) -> None:
        self.tree.check()

    @invariant()
    def texts_are_right(self) -> None:
        for branch, path in self.naive.items():
            assert branch.tokens.tolist() == [t.id for t in path]
            assert branch.last_token == path[-1].id
            assert branch.length == path[-1].position + 1

    @invariant()
    def slots_are_bounded(self) -> None:
        live = set().union(*map(self._visible, itertools.chain(self.naive.values(), self.kept.values())), set())
        joined = sum(len(sources) for sources in self.tree._sources.values())
        tips = len(self.naive) + len(self.kept) + joined
        assert self.tree.slots.in_use <= len(live) + MAX_RESERVATION * tips

    def teardown(self) -> None:
        self.prefixes.clear()
        self.tree.drop(list(self.naive))
        self.tree.check()
        assert self.tree.slots.in_use == 0 and not self.tree._sources


def _common(tokens: list[int], path: list[Token]) -> int:
    return next((i for i, (a, t) in enumerate(zip(tokens, path, strict=False)) if a != t.id), min(len(tokens), len(path)))


TestTree = TreeMachine.TestCase
TestTree.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
