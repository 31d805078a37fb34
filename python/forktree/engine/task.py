"""Searches under way."""

import itertools
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from forktree.engine.counters import Counters
from forktree.engine.request_state import RequestState
from forktree.engine.users import Run
from forktree.engine.worker import ModelWorker
from forktree.kv import Branch

NUMBERS = itertools.count()  # of searches and their roots: owners of branches in the trees of all workers


@dataclass(frozen=True)
class Root:
    """A branch that a search began with or opened; its forks have its owner.

    Attributes:
        prompt: Its text, as rewards see it.
        length: How many tokens it has.
    """

    branch: Branch
    worker: ModelWorker
    owner: int
    prompt: str
    length: int


class Task:
    """One search under way. `result` or `error` is set when it is done."""

    def __init__(self, search: "Callable[[Task], Coroutine[Any, Any, Any]]", seed: int, run: Run | None) -> None:
        self.index, self.seed, self.run = next(NUMBERS), seed, run
        self.roots: list[Root] = []
        self.counters = Counters()
        self.state: RequestState | None = None
        self.preempted = self.done = False
        self.result: Any = None
        self.error: Exception | None = None
        self.coroutine = _called(search, self)
        self._began = time.perf_counter()

    def roots_of(self, worker: ModelWorker, branches: Sequence[Branch]) -> list[Root]:
        """The root that each branch descends from; the search's first for one of somebody else."""
        by_owner = {root.owner: root for root in self.roots}
        owners = worker.tree.branch_owner[worker.tree.ids(branches)].tolist()
        return [by_owner.get(owner, self.roots[0]) for owner in owners]

    def close_state(self) -> None:
        """Lets go of what the request held that was being answered."""
        state, self.state = self.state, None
        if state is not None:
            state.close()

    def end(self, result: Any, error: Exception | None, force: type[BaseException]) -> None:
        """The search is done. force: what it, or its request, may raise while being closed, to no effect."""
        with suppress(force):
            self.close_state()
        with suppress(force):
            self.coroutine.close()
        self.result, self.error, self.done = result, error, True
        self.counters.seconds = time.perf_counter() - self._began


async def _called(search: Callable[[Task], Coroutine[Any, Any, Any]], task: Task) -> Any:
    """What the search returns; what is wrong with calling it is a failure of that search."""
    return await search(task)
