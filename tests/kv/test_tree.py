"""The tree against a naive model: every branch is a list of token objects, nothing is shared but identity."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from forktree.kv import Branch, Chunk, OutOfSlots, PrefixIndex, Tree, reassign, tree_layout
from forktree.kv.nodes import MAX_RESERVATION
from forktree.kv.tree import PENDING_TOKEN
from forktree.plan.check import check_plan
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import plan_attention

NUM_SLOTS = 160


class Token:
    """One written token. `joins` are the texts that it, and everything after it, sees too."""

    def __init__(self, id: int, position: int, joins: tuple[list["Token"], ...] = ()) -> None:
        self.id, self.position, self.joins = id, position, joins


class TreeMachine(RuleBasedStateMachine):
    """Drives fork, append, rewind, drop, reassign, join, prefix reuse, computing and evicting at random."""

    branches = Bundle("branches")

    def __init__(self) -> None:
        super().__init__()
        self.tree = Tree(NUM_SLOTS)
        self.prefixes = PrefixIndex(self.tree)
        self.naive: dict[Branch, list[Token]] = {}
        self.kept: dict[bytes, list[Token]] = {}
        self.tagged: dict[int, list[Token]] = {}  # what a branch saw when it was given this tag

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
        assert set(self.tags(forks)) == set(self.tags([branch])), "a fork inherits its tag"
        for fork in forks:
            self.naive[fork] = list(self.naive[branch])
        return multiple(*forks)

    @rule(branch=branches, tokens=st.lists(st.integers(0, 3), min_size=1, max_size=20))
    def append(self, branch: Branch, tokens: list[int]) -> None:
        if branch.alive:
            branch.append(tokens)
            path = self.naive[branch]
            path += [Token(t, path[-1].position + 1 + i) for i, t in enumerate(tokens)]

    def tags(self, some: list[Branch]) -> list[int]:
        return self.tree.tags.tag[self.tree.ids(some)].tolist()

    @rule(data=st.data())
    def tag(self, data: st.DataObject) -> None:
        if self.naive:
            some = data.draw(st.lists(st.sampled_from(list(self.naive)), unique=True))
            ids = self.tree.ids(some)
            tags = self.tree.tags.renew(ids, self.tree.branch_length[ids]).tolist()
            assert not set(tags) & set(self.tagged) and len(set(tags)) == len(some)
            self.tagged.update((tag, list(self.naive[b])) for tag, b in zip(tags, some, strict=True))

    @rule(data=st.data())
    def append_one_to_many(self, data: st.DataObject) -> None:
        if self.naive:
            some = data.draw(st.lists(st.sampled_from(list(self.naive)), min_size=1, unique=True))
            tokens = [data.draw(st.integers(0, 3)) for _ in some]
            self.tree.append(some, tokens)
            for branch, t in zip(some, tokens, strict=True):
                self.naive[branch].append(Token(t, self.naive[branch][-1].position + 1))

    @rule(data=st.data(), wanted=st.integers(0, 30))
    def run_ahead(self, data: st.DataObject, wanted: int) -> None:
        """Tokens unknown at first, perhaps computed meanwhile; then some are named, the others never were."""
        if not self.naive:
            return
        some = data.draw(st.lists(st.sampled_from(list(self.naive)), min_size=1, unique=True))
        keys = [b.key for b in some]
        self.tree.append_pending(some)
        newest = [Token(PENDING_TOKEN, self.naive[b][-1].position + 1) for b in some]
        for branch, token in zip(some, newest, strict=True):
            self.naive[branch].append(token)
        self.compute(data)
        if wanted:
            self.evict(data, wanted)
        self.tree.resolve_last_tokens(some, [i % 4 for i in range(len(some))])
        for i, token in enumerate(newest):
            token.id = i % 4
        gone = data.draw(st.lists(st.sampled_from(some), unique=True))
        self.tree.undo_append(gone)
        for branch in gone:
            self.naive[branch].pop()
        assert [b.key for b in some] == keys, "tokens are sampled as they would have been"

    @rule(branch=branches, data=st.data())
    def rewind(self, branch: Branch, data: st.DataObject) -> None:
        if branch.alive:
            path = self.naive[branch]
            length = data.draw(st.integers(path[0].position + 1, path[-1].position + 1))
            tag = self.tags([branch])[0]
            branch.rewind(length)
            kept = tag >= 0 and length > self.tagged[tag][-1].position
            assert self.tags([branch]) == [tag if kept else -1]
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
        in_use, tags = self.tree.slots.in_use, self.tags(some)
        out = reassign(some, parents)
        assert self.tags(out) == [tags[p] for p in parents]
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
        texts = tuple(list(self.naive[b]) for b in some)
        start = max(self.naive[b][-1].position for b in some) + 1
        self.naive[branch] = [Token(t, start + i, texts) for i, t in enumerate(tokens)]
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
        place, texts = self._places()
        texts = [p for p in texts if p[0].position == 0 and not p[0].joins]
        longest = max((_common(tokens, path) for path in texts), default=0)
        branch = self.tree.match(tokens)
        if branch is None:
            assert longest == 0
            return multiple()
        assert branch.tokens.tolist() == tokens[:longest]
        # several texts may begin alike: which one the branch shares shows in where its tokens lie
        where = self._arena(branch)
        self.naive[branch] = next(p[:longest] for p in texts if [place[t] for t in p[:longest]] == where)
        return branch

    def _arena(self, branch: Branch) -> list[int]:
        """Where each token of a branch lies in the arena."""
        return self._run(*(int(x[0]) for x in self.tree.tips([branch])))

    def _run(self, node: int, length: int) -> list[int]:
        """The same of the text of this length that ends in `node`."""
        path = self.tree.path(node, length)[::-1]
        return [int(self.tree.arena.begin[at]) + i for at, count in path for i in range(count)]

    def _places(self) -> tuple[dict[Token, int], list[list[Token]]]:
        """Where each live token lies, and all live texts; a token that lies in two places is an error."""
        live = [*self.naive.items(), *((b, self.kept[b.tokens.tobytes()]) for b in self.prefixes.branches())]
        ends = [x.tolist() for x in self.tree.tips([b for b, _ in live])]
        todo = list(zip(*ends, [path for _, path in live], strict=True))
        place: dict[Token, int] = {}
        texts = []
        while todo:
            node, length, path = todo.pop()
            texts.append(path)
            for token, at in zip(path, self._run(node, length), strict=True):
                assert place.setdefault(token, at) == at, "a shared token lies in two places"
            if path[0].joins:
                root = self.tree.path(node, length)[-1][0]
                todo += zip(*(x.tolist() for x in self.tree.sources_of(root)), path[0].joins, strict=True)
        assert len(set(place.values())) == len(place), "two tokens lie in one place"
        return place, texts

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
            layout = tree_layout(self.tree, chunks)
            self._check_layout(layout, chunks)
            self.tree.mark_computed(chunks)
            self.tree.check()
            node, length = self.tree.tips(some)
            ready = self.tree.hidden_position[node] == length - 1
            assert ready.any(), "a pass served nobody"
            some = [b for b, r in zip(some, ready, strict=True) if not r]

    def _check_layout(self, layout: TreeLayout, chunks: list[Chunk]) -> None:
        """Each row sees exactly the tokens, and positions, that the naive model says; the plan reads them once."""
        check_plan(plan_attention(layout, num_qo_heads=2, num_kv_heads=1, head_dim=4))
        place, texts = self._places()
        through = {place[t]: path[: i + 1] for path in texts for i, t in enumerate(path)}
        row = 0
        for chunk in chunks:
            for offset in range(chunk.begin, chunk.stop):
                sees = _visible(through[int(self.tree.arena.begin[chunk.node]) + offset])
                index, position = layout.visible(row)
                assert sorted(index.tolist()) == sorted(place[t] for t in sees)
                assert dict(zip(index, position, strict=True)) == {place[t]: t.position for t in sees}
                row += 1

    @rule(data=st.data(), wanted=st.integers(1, 30))
    def evict(self, data: st.DataObject, wanted: int) -> None:
        """What the branches of a request see stays; of the rest, enough goes, or all there is."""
        kept = data.draw(st.lists(st.sampled_from(list(self.naive)), unique=True)) if self.naive else []
        view = self.tree.view(kept)
        place, _ = self._places()
        tokens = set().union(*(_visible(self.naive[b]) for b in kept)) if kept else set()
        assert view.sum() == len(tokens), "a view counts every token once"
        computed = {t for t in tokens if self._is_computed(place[t])}
        free, held = self.tree.slots.num_free, self.tree.slots.in_use
        freed = self.tree.evict(view, wanted)
        assert self.tree.slots.num_free == free + freed
        assert freed >= wanted or self.tree.slots.in_use <= len(tokens)
        assert freed <= held
        assert computed == {t for t in tokens if self._is_computed(place[t])}, "what is in view was taken"

    def _is_computed(self, place: int) -> bool:
        """Whether the token at this place of the arena has its KV."""
        begin = self.tree.arena.begin
        node = int(np.flatnonzero((begin <= place) & (place < begin + self.tree.length))[0])
        return place - int(begin[node]) < int(self.tree.num_computed[node])

    @invariant()
    def bookkeeping_holds(self) -> None:
        self.tree.check()

    @invariant()
    def texts_are_right(self) -> None:
        for branch, path in self.naive.items():
            assert branch.tokens.tolist() == [t.id for t in path]
            assert branch.length == path[-1].position + 1

    @invariant()
    def tagged_branches_still_see_what_they_saw(self) -> None:
        tags, lengths = self.tags(list(self.naive)), self.tree.tags.length[self.tree.ids(self.naive)]
        for path, tag, length in zip(self.naive.values(), tags, lengths.tolist(), strict=True):
            if tag >= 0:
                text = self.tagged[tag]
                assert path[: len(text)] == text and length == text[-1].position + 1

    @invariant()
    def slots_are_bounded(self) -> None:
        place, texts = self._places()
        assert self.tree.slots.in_use <= len(place) + MAX_RESERVATION * len(texts)

    def teardown(self) -> None:
        self.prefixes.clear()
        self.tree.drop(list(self.naive))
        self.tree.check()
        assert self.tree.slots.in_use == 0 and not len(self.tree.source_of)


def _visible(path: list[Token]) -> set[Token]:
    """The tokens of a path and all that its joined texts see."""
    return set(path).union(*(_visible(text) for text in path[0].joins))


def _common(tokens: list[int], path: list[Token]) -> int:
    pairs = zip(tokens, path, strict=False)
    return next((i for i, (a, t) in enumerate(pairs) if a != t.id), min(len(tokens), len(path)))


TestTree = pytest.mark.slow(TreeMachine.TestCase)
TestTree.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
