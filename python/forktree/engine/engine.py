"""`Engine`: runs many searches at once, for one user or several in turns. `forktree.engine.loop` is how."""

from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from time import sleep
from typing import Any

from numpy.typing import ArrayLike

from forktree.checks import integers, shown
from forktree.engine.loop import Loop
from forktree.engine.task import Task
from forktree.engine.users import Run, Users
from forktree.engine.worker import ModelWorker
from forktree.engine.workers import MAIN, Workers
from forktree.errors import InvalidInput
from forktree.kv import Branch
from forktree.types import MAX_TOKEN_ID


class Engine:
    """Drives searches over one policy and perhaps further models.

    What a search does wrong ends that search alone, and is its `error`. Calls that change the engine are made one at a
    time, and Ctrl-C waits until they are done (`CriticalSection`). What passes through one all the same, a second
    Ctrl-C or a failure of the model, ends all searches: their branches are dead, and the engine begins anew.

    Args:
        worker: The policy.
        models: Further workers by name.
        tokenizer: Turns branches into the text that rewards read.
        max_batch_tokens: Maximum of tokens of one forward pass.
        ahead: Whether `extend` runs one step ahead of the host. Default: on a GPU. Results are the same.
    """

    def __init__(
        self,
        worker: ModelWorker,
        *,
        models: Mapping[str, ModelWorker] | None = None,
        tokenizer: Any = None,
        max_batch_tokens: int = 512,
        ahead: bool | None = None,
    ) -> None:
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens must be at least 1, got {max_batch_tokens}")
        self.workers = Workers(worker, models or {}, tokenizer)
        self.loop = Loop(
            self.workers,
            max_batch_tokens=max_batch_tokens,
            ahead=worker.runner.device.type == "cuda" if ahead is None else ahead,
        )
        self.users = Users(self.loop.cancel_run, self.loop.recover)

    def use(self) -> AbstractContextManager[Run]:
        """A run, which may submit searches and step: see `Users.run`. When it ends, its searches are cancelled."""
        return self.users.run()

    def renew(self, run: Run | None = None) -> None:
        """Looks at the models: where weights are others than before, what was computed with those is dropped.

        Args:
            run: Who asks, if it was let in.

        Raises:
            DecoderInUse: As for `use`; and what `attach` raises. Nothing has changed then.
        """
        self.users.check_free(run)
        changed = [(worker, found) for worker in self.workers.named.values() if (found := worker.verify()) is not None]
        if changed:
            self.users.call(partial(self.loop.renew, changed))

    def submit(
        self,
        search: Callable[[Task], Coroutine[Any, Any, Any]],
        prompts: Sequence[Sequence[int]],
        *,
        text: str = "",
        seed: int = 0,
        run: Run | None = None,
    ) -> Task:
        """Starts a search; it runs as `step` is called.

        Args:
            search: Its coroutine is `search(task)`; `task.roots` are of `prompts`.
            prompts: Token ids; most searches have one prompt.
            text: The prompt as rewards see it.
            seed: Keys what its branches sample, together with the prompt.
            run: Whose search it is, if anyone's.
        """
        tokens = [integers("tokens", ids, 0, MAX_TOKEN_ID) for ids in prompts]
        if not all(map(len, tokens)):
            raise InvalidInput(f"prompts must be of at least one token each, got {shown(prompts)}")

        def begin() -> Task:
            task = Task(search, seed, run)
            for ids in tokens:
                self.open(task, ids, text=text)
            self.loop.begin(task)
            return task

        return self.users.call(begin)

    def open(self, task: Task, tokens: ArrayLike, *, text: str = "", model: str = MAIN) -> Branch:
        """A further root of a search, to be opened by its own code; it is dropped when the search ends."""
        return self.workers.open(task, integers("tokens", tokens, 0, MAX_TOKEN_ID), text, model)

    def has_room(self, num_tokens: int) -> bool:
        """True if a prompt of `num_tokens` is better started now than later.

        It is if the next pass has room, no search has been preempted, and slots are at hand.
        """
        rows = sum(t.state.num_wanted for t in self.loop.tasks if t.state is not None)
        if rows >= self.loop.max_batch_tokens or any(t.preempted for t in self.loop.tasks):
            return False
        free, kept = self.workers.main.tree.slots.num_free, self.workers.main.prefixes.branches()
        return free > num_tokens or free + sum(b.length for b in kept) > num_tokens

    @property
    def ahead(self) -> bool:
        """Whether `extend` runs one step ahead of the host; may be set between two steps."""
        return self.loop.ahead

    @ahead.setter
    def ahead(self, ahead: bool) -> None:
        self.loop.ahead = ahead

    @property
    def active(self) -> list[Task]:
        """Searches that are not done, oldest first."""
        return list(self.loop.tasks)

    def cancel(self, task: Task) -> None:
        """Ends a search: `Cancelled` is thrown into it; if it carries on all the same, it is closed by force."""
        self.users.call(partial(self.loop.cancel, task))

    def run(self) -> Iterator[Task]:
        """Steps until every search is done, yielding each as it ends."""
        pending = self.active
        while self.loop.tasks:
            self.step()
            yield from (t for t in pending if t.done)
            pending = self.active

    def step(self) -> None:
        """One forward pass a worker, and the answers it makes possible."""
        if not self.users.call(self.loop.step):
            sleep(0.001)  # only Python rewards are at work
