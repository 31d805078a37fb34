"""The engine: runs many searches at once, one packed forward pass a worker and step for all of them.

A step is resume, schedule, forward, answer:

    every search runs until it awaits something            (a coroutine, resumed by `send`)
    the pending tokens of all awaited branches are packed  (decode rows first, then slices of long prefills)
    one forward pass a worker computes them
    requests whose rows are there are answered             (one product with the head, one token a row)

On a GPU, `extend` runs one step ahead of the host: the tokens of a step are sampled on the device and computed by the
next pass before the host reads them. What was sampled after the end of a branch is then taken back.

Out of slots is a normal event: reservations, kept prefixes, idle nodes and then the youngest search give way; their
tokens stay and are computed again later.
"""

from collections.abc import Sequence
from typing import Any

from forktree.engine.counters import timed
from forktree.engine.extend_state import ExtendState
from forktree.engine.request_state import RequestState, RewardState
from forktree.engine.sampler import Failures, Sampler
from forktree.engine.scheduler import Compute, Exhausted, Preempt, ReadFirst, schedule
from forktree.engine.task import Task
from forktree.engine.users import Run
from forktree.engine.worker import ModelWorker
from forktree.engine.workers import Workers
from forktree.errors import Cancelled
from forktree.kv import Chunk


class Loop:
    """All searches under way. Nothing here may be called while another call is under way (`Users.call`)."""

    def __init__(self, workers: Workers, *, max_batch_tokens: int, ahead: bool) -> None:
        self.workers, self.max_batch_tokens, self.ahead = workers, max_batch_tokens, ahead
        self.tasks: list[Task] = []  # oldest first
        self._sampler = Sampler()

    def begin(self, task: Task) -> None:
        """Starts a search, which has its roots."""
        self.tasks.append(task)
        self._resume(task, None)

    def step(self) -> bool:
        """Whether there was anything to do."""
        try:
            busy = [self._compute(worker) for worker in self.workers]
            busy.append(self._read_ahead())  # now that the device has the next step to do
            return any([*busy, self._answer_extends(), self._answer_rest()])
        except Exception:
            if not self._end_unanswerable():
                raise
            return True

    def _compute(self, worker: ModelWorker) -> bool:
        """One forward pass. That of a reward model, if it fails, ends the searches that wait for it."""
        try:
            if chunks := self._schedule(worker):
                waiting = self._waiting(worker)
                with timed(self.workers.phase(worker), [task.counters for task in waiting]):
                    worker.forward(chunks)
                    for state in waiting.values():
                        state.take_computed()
            return bool(chunks)
        except Exception as failure:
            if not self._end_unanswerable():
                if worker is self.workers.main:
                    raise
                for task in self._waiting(worker):
                    self._resume(task, None, failure)
            return True

    def _schedule(self, worker: ModelWorker) -> list[Chunk]:
        """Chunks of the next pass, their slots reserved. Younger searches may be preempted for it."""
        while running := {t: s for t, s in self._waiting(worker).items() if not t.preempted}:
            *_, youngest = running
            match schedule(worker, [*running.values()], self.max_batch_tokens, unread=self._sampler.unread):
                case Compute(chunks):
                    self.workers.charge(worker, [*running], chunks)
                    return chunks
                case ReadFirst():
                    self._read_ahead()
                case Preempt():
                    youngest.preempted = True
                case Exhausted() as exhausted:
                    self._resume(youngest, None, exhausted.error(youngest.index))
                    return []
        return []

    def _waiting(self, worker: ModelWorker) -> dict[Task, RequestState]:
        """Searches whose request goes to a worker, oldest first."""
        return {t: t.state for t in self.tasks if t.state is not None and t.state.worker is worker}

    def _answer_extends(self) -> bool:
        """Samples one token for every ready row of every `extend`; those that are done are answered."""
        extends = {t: t.state for t in self.tasks if isinstance(t.state, ExtendState)}
        sampled = False
        for worker in self.workers:
            own = {t: s for t, s in extends.items() if s.worker is worker and not t.preempted}
            with timed("model", [task.counters for task in own]):
                any_ready, failed = self._sampler.sample(worker, [*own.values()], ahead=self.ahead)
            self._fail(failed)
            sampled |= any_ready or bool(failed)
        finished = [t for t, s in extends.items() if t.state is s and not (s.open.any() or self._sampler.owes(s))]
        for task in finished:
            extension = extends[task].answer()
            task.counters.sampled_tokens += int(extension.num_tokens.sum())
            self._resume(task, extension)
        return sampled or bool(finished)

    def _answer_rest(self) -> bool:
        """Answers what needs all its rows at once: rewards, scores of tokens, rows of logits."""
        answered = False
        for task in list(self.tasks):
            if task.state is None or isinstance(task.state, ExtendState):
                continue
            try:
                with timed("reward" if isinstance(task.state, RewardState) else "model", [task.counters]):
                    found = task.state.answer()
            except Exception as failure:  # the request, what the model gave, or a reward of the user's own
                self._resume(task, None, failure)
            else:
                if found is None:
                    continue
                self._resume(task, found)
            answered = True
        return answered

    def _read_ahead(self) -> bool:
        """Reads the tokens that were sampled ahead of the host; False if there are none."""
        unread = self._sampler.unread
        self._fail(self._sampler.read())
        return unread

    def _fail(self, failures: Failures) -> None:
        """Throws failures into the searches that await these requests, if they still do."""
        for state, failure in failures.items():
            for task in [t for t in self.tasks if t.state is state]:
                self._resume(task, None, failure)

    def _end_unanswerable(self) -> bool:
        """Ends the searches whose request cannot be answered any more; False if nothing has changed.

        Its branches were dropped meanwhile, or were given tokens that the model does not take: by code of a user's own,
        which may have been another search's.
        """
        changed = self._read_ahead()  # which may have ended some
        unanswerable = [(t, why) for t in self.tasks if t.state is not None and (why := t.state.fault())]
        for task, why in unanswerable:
            self._finish(task, error=why)
        return changed or bool(unanswerable)

    def _resume(self, task: Task, value: Any, error: Exception | None = None) -> None:
        """Runs the search to its next request."""
        try:
            task.close_state()
            try:
                with timed("search", [task.counters]):
                    request = task.coroutine.throw(error) if error is not None else task.coroutine.send(value)
            except StopIteration as stop:
                return self._finish(task, result=stop.value)
            task.state = self.workers.begin(task, request)
        except Exception as failure:
            self._finish(task, error=failure)

    def _finish(
        self,
        task: Task,
        *,
        result: Any = None,
        error: Exception | None = None,
        force: type[BaseException] = Exception,
    ) -> None:
        """Ends a search; see `Task.end`."""
        task.end(result, error, force)
        self.tasks.remove(task)
        self.workers.release(task, keep=error is None)
        for other in self.tasks:
            other.preempted = False

    def cancel(self, task: Task) -> None:
        """See `Engine.cancel`."""
        self._read_ahead()  # a search sees no token that is unknown
        if task in self.tasks:
            self._resume(task, None, Cancelled(f"search {task.index} was cancelled"))
            if not task.done:
                self._finish(task, error=Cancelled(f"search {task.index} was cancelled and did not stop by itself"))

    def cancel_run(self, run: Run) -> None:
        """Cancels what is left of a run."""
        for task in [t for t in reversed(self.tasks) if t.run is run]:
            self.cancel(task)

    def renew(self, changed: Sequence[tuple[ModelWorker, Any]]) -> None:
        """Goes on with what `ModelWorker.verify` gave for some workers."""
        self._read_ahead()  # hidden states of tokens that are taken back would be old ones
        for worker, found in changed:
            worker.renew(*found)
            for state in self._waiting(worker).values():
                state.restart()

    def recover(self, error: BaseException | None) -> None:
        """Begins anew, whatever state a call was left in that `error` passed through."""
        for worker in self.workers:
            worker.clear()
        self._sampler = Sampler()
        while self.tasks:
            task = self.tasks[-1]
            interrupted = Cancelled(f"search {task.index} was ended by a {type(error).__name__}")
            self._finish(task, error=error if isinstance(error, Exception) else interrupted, force=BaseException)
