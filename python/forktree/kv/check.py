"""The invariants of a tree's bookkeeping."""

import numpy as np

from forktree.kv.nodes import MAX_RESERVATION, Nodes
from forktree.plan.layout import ranges
from forktree.types import Int32Array


def check_nodes(nodes: Nodes, branch_node: Int32Array, branch_length: Int32Array) -> None:
    """Raises AssertionError unless every invariant holds, given the node and length of every live branch."""
    arena, num_nodes = nodes.arena, nodes.num_nodes
    live = np.flatnonzero(arena.capacity > 0)
    end, seen = np.append(branch_node, nodes.source_node), np.append(branch_length, nodes.source_length)
    assert (arena.capacity[end] > 0).all(), "a branch or join reads a freed node"
    assert (arena.capacity[nodes.source_of] > 0).all(), "a freed node joins texts"
    assert (nodes.parent[nodes.source_of] < 0).all(), "a node that is no root joins texts"
    readers = np.bincount(end, minlength=num_nodes)
    assert (readers[live] == nodes.readers[live]).all(), "readers differ from branches and joins"
    parents = nodes.parent[live]
    assert (arena.capacity[parents[parents >= 0]] > 0).all(), "a node hangs off a freed one"
    children = np.bincount(parents[parents >= 0], minlength=num_nodes)
    assert (children[live] == nodes.children[live]).all(), "children differ from parents"
    assert (children[live] + readers[live] > 0).all(), "a node nobody reads is still there"
    hung = live[parents >= 0]
    fork = nodes.start[hung]
    above = nodes.parent[hung]
    assert (fork > nodes.start[above]).all() and (fork <= nodes.start[above] + nodes.length[above]).all(), (
        "a node forks outside its parent"
    )
    furthest = np.zeros(num_nodes, np.int32)
    np.maximum.at(furthest, end, seen)
    np.maximum.at(furthest, above, fork)
    assert (furthest[live] == nodes.start[live] + nodes.length[live]).all(), "a node has tokens that nobody sees"
    chain = above[(readers[above] == 0) & (children[above] == 1)]
    assert nodes._unmerged.issuperset(chain.tolist()), "a node with one child and no reader will not be merged"
    assert (nodes.num_computed[live] <= nodes.num_slots[live]).all(), "KV without a slot"
    assert (nodes.num_computed[live] <= nodes.length[live]).all(), "KV of tokens that are gone"
    assert (np.maximum(nodes.length, nodes.num_slots)[live] <= arena.capacity[live]).all(), "a run overflows"
    reserved = nodes.num_slots[live] - nodes.length[live]
    assert (reserved < MAX_RESERVATION).all(), "a reservation is too large"
    assert not (reserved[nodes.children[live] > 0] > 0).any(), "a forked node keeps a reservation"
    owned = arena.slot_index[ranges(arena.begin[live], nodes.num_slots[live])]
    free = nodes.slots.is_free()
    assert len(np.unique(owned)) == len(owned), "a slot has two owners"
    assert not free[owned].any(), "an owned slot is free"
    assert len(owned) + free.sum() == len(free), "a slot is lost"
    assert nodes.slots.in_use == len(owned), "the count of free slots is wrong"
    order = live[np.argsort(arena.begin[live])]
    assert (np.diff(arena.begin[order]) >= arena.capacity[order][:-1]).all(), "two runs overlap"
    assert len(live) + len(nodes._free_nodes) == num_nodes, "a node is lost"
