"""The workers of an engine: a search opens its roots in their trees, and a request goes to the one of its branches."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forktree.checks import shown
from forktree.engine.counters import Counters, Phase, charge, timed, update_peaks
from forktree.engine.extend_state import ExtendState
from forktree.engine.request_state import RequestState, RewardState, TokensState
from forktree.engine.task import NUMBERS, Root, Task
from forktree.engine.worker import ModelWorker
from forktree.errors import InvalidInput
from forktree.kv import Branch, Chunk
from forktree.rewards.base import RewardInput, check_reward
from forktree.search.request import Extend, NextLogits, Request, RewardBranches, ScoreSuffixes, ScoreTokens
from forktree.types import Int64Array

MAIN = "main"  # the policy's name


class Workers:
    """The policy, further models by name, and reward models as searches ask them.

    Args:
        main: The policy.
        models: Further workers by name.
        tokenizer: Turns branches into the text that rewards read.
    """

    def __init__(self, main: ModelWorker, models: Mapping[str, ModelWorker], tokenizer: Any) -> None:
        self.main, self.named, self._tokenizer = main, {MAIN: main, **models}, tokenizer
        self._all = list(dict.fromkeys(self.named.values()))

    def __iter__(self) -> Iterator[ModelWorker]:
        return iter(list(self._all))

    def phase(self, worker: ModelWorker) -> Phase:
        """Whose wall time a pass of `worker` is."""
        return "model" if worker in self.named.values() else "reward"

    def open(self, task: Task, tokens: Int64Array, text: str, model: str) -> Branch:
        """A further root of a search, on the longest prefix that the model's tree has."""
        if model not in self.named:
            raise InvalidInput(f"model must be one of {', '.join(map(repr, self.named))}, got {shown(model)}")
        worker, owner = self.named[model], next(NUMBERS) if task.roots else task.index
        branch = worker.open(tokens, key=_key(task.seed, tokens, len(task.roots)), owner=owner)
        task.roots.append(Root(branch, worker, owner, text, len(tokens)))
        return branch

    def release(self, task: Task, *, keep: bool) -> None:
        """Drops every branch of a search. keep: whether its roots stay as prefixes for later ones."""
        for root in task.roots if keep else ():
            if root.branch.alive:
                root.branch.rewind(min(root.length, root.branch.length))  # what it was given
                root.worker.keep(root.branch)
        for worker in self._all:
            for owner in {task.index, *(root.owner for root in task.roots)}:
                worker.tree.drop_owned(owner)

    def begin(self, task: Task, request: Request[Any]) -> RequestState:
        """A request of a search, to be answered by the worker of its branches."""
        if not isinstance(request, Request):
            raise TypeError(
                f"a search awaits extend, reward_branches, score_tokens or next_logits, got {type(request).__name__}"
            )
        worker = self._worker_of(request.branches)
        if isinstance(request, RewardBranches):
            with timed("reward", [task.counters]):
                return self._begin_reward(task, request, worker)
        state: RequestState
        if isinstance(request, Extend):
            state = ExtendState(request, worker)
        else:
            assert isinstance(request, ScoreTokens | ScoreSuffixes | NextLogits)
            state = TokensState(request, worker)
        worker.check(*state.wanted())
        return state

    def _begin_reward(self, task: Task, request: RewardBranches, worker: ModelWorker) -> RequestState:
        check_reward(request.reward)
        worker.check(request.branches)
        task.counters.reward_calls += len(request.branches)
        roots = task.roots_of(worker, request.branches)
        prompts, lengths = [root.prompt for root in roots], [root.length for root in roots]
        given = RewardInput(worker, request.branches, prompts, lengths, self._tokenizer)
        task.state = state = RewardState(request.reward.start(given), given)
        if state.worker not in self._all:
            self._all.append(state.worker)
        state.worker.check(state.ids)  # the search ends if they are no good: by now all that it holds is known
        return state

    def _worker_of(self, branches: Sequence[Branch]) -> ModelWorker:
        """The worker whose tree has the first branch; the policy if none has, which then refuses it."""
        first = next(iter(branches), None)
        owns = (w for w in self.named.values() if isinstance(first, Branch) and first.tree is w.tree)
        return next(owns, self.main)

    def charge(self, worker: ModelWorker, tasks: Sequence[Task], chunks: Sequence[Chunk]) -> None:
        """Charges a pass to searches, oldest first."""
        by_owner = {root.owner: task.counters for task in tasks for root in task.roots}
        for task in tasks:
            by_owner.setdefault(task.index, task.counters)
        model = next((name for name, named in self.named.items() if named is worker), None)
        first = {task.index for task in tasks}

        def count(counters: Counters, owner: int, tokens: int) -> None:
            counters.count_tokens(model, tokens, opened=owner not in first)

        charged = charge(worker.tree, chunks, by_owner, count)
        if worker is self.main:
            update_peaks(worker.tree, chunks, by_owner)
            for counters in charged:
                counters.passes += 1


def _key(seed: int, tokens: NDArray[np.integer], nth: int) -> int:
    """A key for what the nth root of a search samples.

    Prompts of one run sample independently, each the same in any batch.
    """
    text = tokens.astype(np.int32).tobytes() + seed.to_bytes(16, "little", signed=True)
    text += nth.to_bytes(4, "little") if nth else b""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
