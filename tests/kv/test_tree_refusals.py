"""Calls of the tree with branches or values that are none of its own: refused by name, and nothing has changed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from forktree import InvalidInput
from forktree.kv import Branch, PrefixIndex, Tree, append, reassign

NO_INTEGERS: list[Any] = [[1.0], [1.7], np.ones(1), [True], [1, True], np.array([True]), torch.tensor([1.5])]
NO_INTEGERS += ["1", [None], None, [[1]], [[1], [2, 3]], 7, {1}, iter([1]), [2**31], [-1], np.array([2**33]), [2**70]]
NO_INTEGERS += [torch.tensor([2**33]), np.array([2**63], np.uint64), b"1", [1j], torch.ones(1, requires_grad=True)]
NO_INTEGER: list[Any] = [1.5, 1.0, True, np.True_, "1", None, [1], -1, 2**64, torch.tensor([1, 2]), float("nan")]


def grown(seed: int) -> tuple[Tree, list[Branch]]:
    """A tree after random calls, and the branches alive in it."""
    rng, tree = np.random.default_rng(seed), Tree(200, name=f"model {seed}")
    branches = [tree.root([1, 2, 3]), tree.root([1, 2, 4, 5], position=7, key=9)]
    for _ in range(30):
        branch, action = branches[rng.integers(len(branches))], rng.integers(6)
        if action == 0:
            branches += branch.fork(int(rng.integers(3)))
        elif action == 1:
            branch.append(rng.integers(0, 9, rng.integers(1, 20)))
        elif action == 2:
            branch.rewind(branch.length - len(branch.tokens) + int(rng.integers(1, len(branch.tokens) + 1)))
        elif action == 3:
            tree.reserve(chunks := tree.pending([branch]))
            tree.mark_computed(chunks)
        elif action == 4:
            ids = tree.ids(branches[: int(rng.integers(len(branches)))])
            tree.tags.renew(ids, tree.branch_length[ids])
        elif len(branches) > 4:
            branches.pop(int(rng.integers(len(branches)))).drop()
    branches.append(tree.join(branches[:2], [5]))
    while len(branches) < 4:
        branches += branches[0].fork(1)
    return tree, branches


def snapshot(tree: Tree) -> dict[str, Any]:
    parts = {**vars(tree), **vars(tree.arena), **{f"tags.{k}": v for k, v in vars(tree.tags).items()}}
    state = {k: v.copy() if isinstance(v, np.ndarray | list | set | dict) else v for k, v in parts.items()}
    return {**state, "slots": tree.slots.is_free(), "free": tree.slots.num_free}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(np.array_equal(a[k], b[k]) if isinstance(a[k], np.ndarray) else a[k] == b[k] for k in a)


Call = Callable[[Any], Any]


def of_branches(tree: Tree, mine: list[Branch]) -> dict[str, Call]:
    """Every public call that takes branches."""
    many: dict[str, Call] = {
        "append": lambda given: tree.append(given, [1] * len(given)),
        "kv.append": lambda given: append([mine[0], *given], [1] * (1 + len(given))),
        "kv.reassign": lambda given: reassign([mine[0], *given], [0]),
        "append_pending": tree.append_pending,
        "undo_append": tree.undo_append,
        "resolve_last_tokens": lambda given: tree.resolve_last_tokens(given, [1] * len(given)),
        "reassign": lambda given: tree.reassign(given, [0]),
        "join": lambda given: tree.join(given, [1]),
        "ids": tree.ids,
        "distinct ids": lambda given: tree.ids(given, distinct=True),
        "tips": tree.tips,
        "pending": tree.pending,
        "view": tree.view,
        "drop": tree.drop,
    }
    alone: dict[str, Call] = {
        "fork": lambda given: tree.fork(given, 2),
        "rewind": lambda given: tree.rewind(given, 1),
        "append_text": lambda given: tree.append_text(given, [1]),
        "tokens": tree.tokens,
        "keep": PrefixIndex(tree).keep,
    }
    return many | {name: lambda given, call=call: call(given[-1]) for name, call in alone.items()}


@pytest.mark.parametrize("seed", range(4))
def test_branches_that_are_not_the_trees_own(seed: int) -> None:
    (tree, mine), (other, foreign) = grown(seed), grown(seed + 100)
    dead = mine.pop()
    dead.drop()
    bad: dict[str, tuple[Any, str]] = {
        "foreign": (foreign[0], f"belongs to {other.name}, expected one of {tree.name}"),
        "text": ("a branch", "must be a Branch, got str"),
        "nothing": (None, "must be a Branch, got NoneType"),
        "number": (0, "must be a Branch, got int"),
        "dropped": (dead, "was dropped"),
    }
    before, others = snapshot(tree), snapshot(other)
    for name, call in of_branches(tree, mine).items():
        for kind, (branch, message) in bad.items():
            if kind == "dropped" and name == "drop":
                continue
            with pytest.raises(InvalidInput) as error:
                call([*mine[:2], branch])
            assert message in str(error.value), (name, kind)
            assert same(before, snapshot(tree)) and same(others, snapshot(other)), (name, kind)
    for call in (tree.append_pending, tree.undo_append, tree.ids, tree.view, tree.drop, tree.tips):
        for sequence in (None, 3, mine[0]):
            with pytest.raises(InvalidInput, match="sequence of branches"):
                call(sequence)
    assert same(before, snapshot(tree))
    tree.check()
    other.check()


def test_a_branch_named_twice_is_refused_with_its_place_or_harmless() -> None:
    tree, mine = grown(1)
    twice, before = [mine[0], mine[1], mine[0]], snapshot(tree)
    for name, call in of_branches(tree, mine).items():
        if name in ("append", "append_pending", "undo_append", "resolve_last_tokens", "reassign", "distinct ids"):
            with pytest.raises(InvalidInput, match="branch 2 of 3 a second time"):
                call(twice)
            assert same(before, snapshot(tree)), name
    nodes, lengths = tree.tips(twice)
    assert nodes[0] == nodes[2] and lengths[0] == lengths[2]
    assert tree.pending(twice) == tree.pending(twice[:2]) and (tree.view(twice) == tree.view(twice[:2])).all()
    joined = tree.join([mine[0], mine[0]], [1])
    tree.check()
    tree.drop([mine[0], joined, mine[0], joined])
    tree.drop([mine[0]])
    tree.check()
    assert not mine[0].alive and mine[1].alive


@pytest.mark.parametrize("seed", range(4))
def test_values_that_are_no_such_integers(seed: int) -> None:
    tree, mine = grown(seed)
    branch, count = mine[0], len(mine)
    root = branch.length - len(branch.tokens)
    calls: list[Callable[[], Any]] = []
    for bad in NO_INTEGERS:
        calls += [
            lambda bad=bad: branch.append(bad),
            lambda bad=bad: tree.root(bad),
            lambda bad=bad: tree.match(bad),
            lambda bad=bad: tree.join(mine, bad),
            lambda bad=bad: tree.append([branch], bad),
            lambda bad=bad: append([branch], bad),
            lambda bad=bad: tree.resolve_last_tokens([branch], bad),
            lambda bad=bad: reassign(mine[:1], bad),
        ]
    for bad in NO_INTEGER:
        calls += [
            lambda bad=bad: branch.fork(bad),
            lambda bad=bad: branch.rewind(bad),
            lambda bad=bad: tree.root([1], position=bad),
            lambda bad=bad: tree.root([1], key=bad),
            lambda bad=bad: tree.match([1], key=bad),
            lambda bad=bad: tree.root([1], owner=-2 if type(bad) is int else bad),
        ]
    calls += [
        lambda: tree.append(mine, [1] * (count - 1)),  # would be spread over all, were it one
        lambda: tree.append(mine[:3], [1]),
        lambda: tree.append(mine[:3], 1),
        lambda: append([], [1]),
        lambda: reassign(mine, [count]),
        lambda: reassign([], [0]),
        lambda: tree.match([]),
        lambda: tree.join([], [1]),
        lambda: tree.join(mine, []),
        lambda: tree.root([1], position=2**31 - 2),
        lambda: branch.fork(2**40),
        lambda: branch.rewind(root),
        lambda: branch.rewind(branch.length + 1),
        lambda: tree.undo_append([tree_of_one]),
    ]
    tree_of_one = tree.root([3])
    before = snapshot(tree)
    for i, call in enumerate(calls):
        with pytest.raises(InvalidInput):
            call()
            pytest.fail(f"call {i} was not refused")
        assert same(before, snapshot(tree)), i
    tree.check()


def test_integers_of_every_kind_are_taken_as_they_are() -> None:
    tree = Tree(50)
    for tokens in (
        [1, 2],
        (1, 2),
        range(1, 3),
        np.array([1, 2], np.uint8),
        torch.tensor([1, 2]),
        np.array([1, 2], ">i8"),
    ):
        branch = tree.root(tokens, key=np.uint64(2**64 - 1), position=np.int32(4))
        branch.append(tokens)
        branch.append([])
        assert branch.tokens.tolist() == [1, 2, 1, 2] and branch.key == 2**64 - 1 and branch.length == 8
        branch.rewind(torch.tensor(5))
        assert branch.tokens.tolist() == [1]
    assert reassign([], []) == [] and append([], []) is None
    branch.append([2**31 - 1])
    assert branch.tokens[-1] == 2**31 - 1


def test_a_cleared_tree_is_as_new_and_its_branches_are_dead() -> None:
    tree, mine = grown(2)
    tree.parent[:] = 99  # as a call that was cut short may have left it
    tree.clear()
    assert not any(branch.alive for branch in mine) and tree.slots.in_use == 0
    tree.check()
    with pytest.raises(InvalidInput, match="was dropped"):
        mine[0].fork(1)
    mine[0].drop()
    fresh = tree.root([1, 2])
    assert fresh.fork(1)[0].tokens.tolist() == [1, 2]
