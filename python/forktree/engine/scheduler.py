"""What a worker computes next. `schedule` decides; the engine acts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forktree.engine.request_state import RequestState
from forktree.engine.worker import ModelWorker
from forktree.errors import OutOfMemory
from forktree.kv import Chunk, OutOfSlots, Tree
from forktree.types import Int64Array


@dataclass(frozen=True)
class Compute:
    """One forward pass over these chunks, whose slots are reserved; none if nothing is to be computed."""

    chunks: list[Chunk]


@dataclass(frozen=True)
class ReadFirst:
    """Slots are short, and some of what was to be computed may not be wanted: tokens that the host does not know."""


@dataclass(frozen=True)
class Preempt:
    """Slots are short: the youngest request has to wait."""


@dataclass(frozen=True)
class Exhausted:
    """The one request that is left cannot fit."""

    needed: int  # slots
    num_branches: int
    free: int
    total: int
    bytes_per_slot: int

    def error(self, search: int) -> OutOfMemory:
        """What to throw into a search of this number."""
        return OutOfMemory(
            f"search {search} needs {self.needed} KV slots for {self.num_branches} branches at once, even alone: "
            f"{self.free} are free of {self.total}; raise num_slots ({self.bytes_per_slot} bytes each) or search "
            "narrower"
        )


def schedule(
    worker: ModelWorker, states: Sequence[RequestState], budget: int, *, unread: bool
) -> Compute | ReadFirst | Preempt | Exhausted:
    """The next forward pass for `states`, oldest first, at least one.

    Where slots are short, kept prefixes give way first, then whatever no request sees.

    Args:
        worker: Whose pass it is.
        states: Requests of its branches.
        budget: Maximum of tokens of a pass.
        unread: Whether tokens were sampled that the host does not know.
    """
    tree = worker.tree
    ids, positions = _wanted(states)
    while True:
        chunks = _within_budget(tree, tree.pending(ids, positions), budget)
        try:
            tree.reserve(chunks)
            return Compute(chunks)
        except OutOfSlots as out:
            if unread:
                return ReadFirst()
            branches = np.unique(ids)
            seen = tree.view(branches)
            if worker.prefixes.evict() or tree.evict(seen, out.needed - out.free):
                continue
            if len(states) > 1:
                return Preempt()
            slots = tree.slots
            return Exhausted(
                int(seen.sum()), len(branches), slots.num_free, slots.num_slots, worker.runner.bytes_per_slot
            )


def _wanted(states: Sequence[RequestState]) -> tuple[Int64Array, Int64Array]:
    """Tokens whose hidden states are wanted, once those that are kept were taken: branches and positions."""
    wanted = []
    for state in states:
        state.take_kept()
        wanted.append(state.wanted())
    ids, positions = (np.concatenate(column) for column in zip(*wanted, strict=True))
    return ids, positions


def _within_budget(tree: Tree, chunks: list[Chunk], budget: int) -> list[Chunk]:
    """Decode rows first, then prefills, the last one cut; nothing whose ancestors would not be there."""
    if sum(c.stop - c.begin for c in chunks) <= budget:
        return chunks
    late = {c.node for c in chunks if c.stop > tree.num_computed[c.node]}
    waits = tree.sees_any([c.node for c in chunks], late)
    chosen: list[Chunk] = []
    for i in sorted(range(len(chunks)), key=lambda i: (waits[i], chunks[i].stop - chunks[i].begin > 1)):
        chunk = chunks[i]
        if budget == 0:
            break
        if waits[i] and tree.sees_any([chunk.node], late)[0]:
            continue
        stop = min(chunk.stop, chunk.begin + budget)
        chosen.append(chunk._replace(stop=stop))
        budget -= stop - chunk.begin
        if stop == chunk.stop > tree.num_computed[chunk.node]:
            late.discard(chunk.node)
    return chosen
