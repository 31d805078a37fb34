"""The engine: runs many searches at once, one packed forward pass for all of them a step.

A step is resume, schedule, forward, answer:

    every search runs until it awaits something           (a coroutine, resumed by `send`)
    the pending tokens of all awaited branches are packed  (decode rows first, then slices of long prefills)
    one forward pass a worker computes them
    requests whose branches are ready are answered         (one product with the head, one draw a row)

On a GPU, `extend` runs one step ahead of the host: the tokens of a step are drawn on the device and computed by the
next pass before the host reads them. What was drawn behind the end of a branch is then taken back.

Out of slots is a normal event: reservations, kept prefixes, idle nodes and then the youngest search give way; their
tokens stay and are computed again later.
"""

import hashlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forktree.checks import integers, shown
from forktree.device.transfer import Download, upload
from forktree.engine.counters import Counters
from forktree.engine.critical import CriticalSection
from forktree.engine.request_state import NO_TOKEN, Drawn, ExtendState, RequestState, RewardState, TokensState
from forktree.engine.worker import ModelWorker
from forktree.errors import Cancelled, DecoderInUse, InvalidInput, OutOfMemory
from forktree.kv import Branch, Chunk, OutOfSlots
from forktree.model import Fingerprint, ModelSpec
from forktree.ops import score_logits
from forktree.ops.sampling import Sampling
from forktree.ops.token_request import Draw, TokenRequest
from forktree.rewards.base import RewardInput, check_reward
from forktree.search.processors import left_padded, process
from forktree.search.request import Extend, Extension, NextLogits, Request, RewardBranches, ScoreTokens
from forktree.types import MAX_TOKEN_ID

T = TypeVar("T")
_INDICES = itertools.count()  # a search's number, and the owner of its branches in every tree it uses


@dataclass(eq=False)
class Run:
    """One user of an engine, such as a call of `Decoder.search`: its searches end with it.

    let_go: what else is to be done then, as a critical section.
    """

    let_go: Callable[[], None] = lambda: None
    calls_back: bool = False  # code of the user's own is being called between two steps


@dataclass(eq=False)
class Task:
    """One search under way. `result` or `error` is set when it is done."""

    index: int
    coroutine: Coroutine[Request[Any], Any, Any]
    roots: list[Branch]
    prompt: str
    prompt_length: int
    began: float
    run: Run | None = None
    counters: Counters = field(default_factory=Counters)
    state: RequestState | None = None
    preempted: bool = False
    done: bool = False
    result: Any = None
    error: Exception | None = None


class Engine:
    """Drives searches over one policy worker. `max_batch_tokens` bounds the tokens of one forward pass.

    What a search does wrong ends that search alone, and is its `error`. Calls that change the engine are made one at a
    time, and Ctrl-C waits until they are done (`CriticalSection`). What passes through one all the same, a second
    Ctrl-C or a failure of the model, ends all searches: their branches are dead, and the engine begins anew.

    ahead: whether `extend` runs one step ahead of the host; None: on a GPU. Results are the same.
    """

    def __init__(
        self, worker: ModelWorker, *, tokenizer: Any = None, max_batch_tokens: int = 512, ahead: bool | None = None
    ) -> None:
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens must be at least 1, got {max_batch_tokens}")
        self.worker, self.tokenizer, self.max_batch_tokens = worker, tokenizer, max_batch_tokens
        self.ahead = worker.runner.device.type == "cuda" if ahead is None else ahead
        self._unread: Drawn | None = None  # appended to their branches, and unknown to the host
        self._tasks: list[Task] = []  # oldest first
        self._workers = [worker]
        self._critical = CriticalSection(self._recover)
        self._runs: set[Run] = set()
        self._left: deque[Run] = deque()  # runs that are over, whose searches have yet to be cancelled
        self._thread = 0  # of the last run

    # ---------------------------------------------------------------- users

    def open(self, run: Run) -> None:
        """Lets a run use the engine. Raises `DecoderInUse` if one of another thread does, or one that is just calling
        its user's code; those go on undisturbed."""
        self._check_free()
        self._thread = threading.get_ident()
        self._runs.add(run)

    def _check_free(self) -> None:
        runs = list(self._runs)
        if runs and self._thread != threading.get_ident():
            who = "in another thread"
        elif self._critical.mine or any(r.calls_back for r in runs):
            who = "by the very search that is calling it (a reward, stop, logits processor, on_step or run of its own)"
        else:
            return
        raise DecoderInUse(f"this Decoder is in use {who}: read or close those results first, or make a second Decoder")

    def close(self, run: Run) -> None:
        """Cancels what is left of a run: now, or once the call under way is done. From any thread, any number of
        times."""
        self._runs.discard(run)
        self._left.append(run)
        if not self._critical.occupied:
            self._alone(lambda: None)

    def interleave(self, items: Generator[T, None, None]) -> Iterator[T]:
        """The items of what uses the engine's worker between the steps of searches, each computed as a critical
        section. As any run, it may be refused (`open`)."""

        def following() -> T | Exception | None:
            try:
                return next(items, None)
            except Exception as failure:  # theirs, not the engine's
                return failure

        run = Run(items.close)
        try:
            try:
                self.open(run)
                while (item := self._alone(following)) is not None:
                    if isinstance(item, Exception):
                        raise item
                    yield item
            finally:
                self.close(run)
        finally:
            self.close(run)  # again, in case an interrupt cut that short

    def _alone(self, call: Callable[[], T]) -> T:
        """What `call` gives, run as a critical section."""

        def whole() -> T:
            self._cancel_left()
            result = call()
            self._cancel_left()
            return result

        return self._critical.run(whole)

    def _cancel_left(self) -> None:
        while self._left:
            run = self._left.popleft()
            for task in [t for t in reversed(self._tasks) if t.run is run]:
                self._cancel(task)
            run.let_go()

    def _recover(self, error: BaseException | None) -> None:
        """Begins anew, whatever state a call was left in that `error` passed through."""
        for worker in self._workers:
            worker.clear()
        self._unread = None
        while self._tasks:
            task = self._tasks[-1]
            interrupted = Cancelled(f"search {task.index} was ended by a {type(error).__name__}")
            self._finish(task, error=error if isinstance(error, Exception) else interrupted, force=BaseException)

    # ---------------------------------------------------------------- searches

    def submit(
        self,
        search: Callable[..., Coroutine[Any, Any, Any]],
        prompts: Sequence[Sequence[int]],
        *,
        text: str = "",
        seed: int = 0,
        run: Run | None = None,
        counters: Counters | None = None,
    ) -> Task:
        """Starts a search; it runs as `step` is called.

        search: its coroutine is `search(*roots)`, with one root for each of `prompts` (most searches have one).
        text: the prompt as rewards see it. seed: keys the draws of its branches, together with the prompt.
        run: whose search it is, if anyone's. counters: what its costs are added to; default: new ones.
        """
        keys = [_key(seed, integers("tokens", tokens, 0, MAX_TOKEN_ID)) for tokens in prompts]
        if not all(map(len, prompts)) or not len(prompts):
            raise InvalidInput(f"prompts must be of at least one token each, got {shown(prompts)}")
        return self._alone(partial(self._submit, search, prompts, keys, text, run, counters or Counters()))

    def _submit(
        self,
        search: Callable[..., Coroutine[Any, Any, Any]],
        prompts: Sequence[Sequence[int]],
        keys: list[int],
        text: str,
        run: Run | None,
        counters: Counters,
    ) -> Task:
        index = next(_INDICES)
        roots = [self.worker.open(tokens, key=key, owner=index) for tokens, key in zip(prompts, keys, strict=True)]
        task = Task(index, _called(search, roots), roots, text, len(prompts[0]), time.perf_counter(), run, counters)
        self._tasks.append(task)
        self._resume(task, None)
        return task

    def renew(self, run: Run | None = None) -> None:
        """Looks at the policy: if its weights are others than before, what was computed with those is dropped.

        run: who asks, if it was let in. Raises `DecoderInUse` as `open` does, and what `attach` raises; nothing has
        changed then.
        """
        if run not in self._runs:
            self._check_free()
        if (proof := self.worker.prove()) is not None:
            self._alone(partial(self._renew, *proof))

    def _renew(self, now: Fingerprint, spec: ModelSpec) -> None:
        self._read_ahead()  # hidden states of tokens that are taken back would be old ones
        self.worker.renew(now, spec)
        for state in (task.state for task in self._tasks):
            if state is not None and state.worker is self.worker:
                state.hidden = [None] * len(state.branches)

    def has_room(self, num_tokens: int) -> bool:
        """Whether a prompt of this length is better started now than later: work for the next pass is short, no
        search has been preempted, and its slots are at hand."""
        rows = sum(len(t.state.waiting()) for t in self._tasks if t.state is not None)
        if rows >= self.max_batch_tokens or any(t.preempted for t in self._tasks):
            return False
        free = self.worker.tree.slots.num_free
        return free > num_tokens or free + sum(b.length for b in self.worker.prefixes.branches()) > num_tokens

    @property
    def active(self) -> list[Task]:
        """Searches that are not done, oldest first."""
        return list(self._tasks)

    def cancel(self, task: Task) -> None:
        """Ends a search: `Cancelled` is thrown into it; if it carries on all the same, it is closed by force."""
        self._alone(partial(self._cancel, task))

    def _cancel(self, task: Task) -> None:
        self._read_ahead()  # a search sees no token that is unknown
        if task in self._tasks:
            self._resume(task, None, Cancelled(f"search {task.index} was cancelled"))
            if not task.done:
                self._finish(task, error=Cancelled(f"search {task.index} was cancelled and did not stop by itself"))

    def cancel_all(self) -> None:
        """Cancels every search, youngest first."""
        for task in reversed(self.active):
            self.cancel(task)

    def run(self) -> Iterator[Task]:
        """Steps until every search is done, yielding each as it ends."""
        pending = self.active
        while self._tasks:
            self.step()
            yield from (t for t in pending if t.done)
            pending = self.active

    # ---------------------------------------------------------------- one step

    def step(self) -> None:
        """One forward pass a worker, and the answers it makes possible."""
        if not self._alone(self._step):
            time.sleep(0.001)  # only Python rewards are at work

    def _step(self) -> bool:
        """Whether there was anything to do."""
        try:
            busy = [self._compute(worker) for worker in list(self._workers)]
            busy.append(self._read_ahead())  # now that the device has the next step to do
            return any([*busy, self._answer_extends(), self._answer_rest()])
        except Exception:
            if not self._end_unanswerable():
                raise
            return True

    def _compute(self, worker: ModelWorker) -> bool:
        """One forward pass. That of a reward's own model, if it fails, ends the searches that wait for it."""
        try:
            if chunks := self._schedule(worker):
                worker.forward(chunks)
            return bool(chunks)
        except Exception as failure:
            if not self._end_unanswerable():
                if worker is self.worker:
                    raise
                for task in self._running(worker):
                    self._resume(task, None, failure)
            return True

    def _end_unanswerable(self) -> bool:
        """Ends the searches whose request cannot be answered any more, as its branches were dropped meanwhile or were
        given tokens that the model does not take: by code of a user's own, which may have been another search's.
        False if nothing has changed."""
        changed = self._read_ahead()  # which may have ended some
        unanswerable = []
        for task in self._tasks:
            try:
                if task.state is not None:
                    task.state.worker.check(task.state.branches)
            except Exception as failure:
                unanswerable.append((task, failure))
        for task, why in unanswerable:
            self._finish(task, error=why)
        return changed or bool(unanswerable)

    def _resume(self, task: Task, value: Any, error: Exception | None = None) -> None:
        """Runs the search to its next request."""
        try:
            self._close(task)
            try:
                request = task.coroutine.throw(error) if error is not None else task.coroutine.send(value)
            except StopIteration as stop:
                return self._finish(task, result=stop.value)
            task.state = self._begin(task, request)
        except Exception as failure:
            self._finish(task, error=failure)

    def _begin(self, task: Task, request: Request[Any]) -> RequestState:
        if not isinstance(request, Request):
            raise TypeError(
                "a search awaits extend, reward_branches, score_tokens or next_logits, got "
                f"{type(request).__name__}"
            )
        self.worker.check(request.branches)
        if isinstance(request, Extend):
            return ExtendState(request, self.worker)
        if isinstance(request, ScoreTokens | NextLogits):
            return TokensState(request, self.worker)
        assert isinstance(request, RewardBranches)
        check_reward(request.reward)
        task.counters.reward_calls += len(request.branches)
        given = RewardInput(
            self.worker,
            request.branches,
            [task.prompt] * len(request.branches),
            [task.prompt_length] * len(request.branches),
            self.tokenizer,
        )
        task.state = state = RewardState(request.reward.start(given), given)
        if not any(state.worker is worker for worker in self._workers):
            self._workers.append(state.worker)
        state.worker.check(state.branches)  # the search ends if they are no good: by now all that it holds is known
        return state

    def _close(self, task: Task) -> None:
        state, task.state = task.state, None
        if isinstance(state, RewardState):
            state.pending_reward.close()

    def _finish(
        self,
        task: Task,
        *,
        result: Any = None,
        error: Exception | None = None,
        force: type[BaseException] = Exception,
    ) -> None:
        """Ends a search. force: what it, or the reward it waits for, may raise while being closed, to no effect."""
        with suppress(force):
            self._close(task)
        with suppress(force):
            task.coroutine.close()
        task.result, task.error, task.done = result, error, True
        task.counters.seconds = time.perf_counter() - task.began
        self._tasks.remove(task)
        for root in task.roots:
            if error is None and root.alive:
                self.worker.keep(root)
        for worker in self._workers:
            worker.tree.drop_owned(task.index)
        for other in self._tasks:
            other.preempted = False

    # ---------------------------------------------------------------- scheduling

    def _running(self, worker: ModelWorker) -> list[Task]:
        return [t for t in self._tasks if t.state is not None and t.state.worker is worker and not t.preempted]

    def _schedule(self, worker: ModelWorker) -> list[Chunk]:
        """Chunks for the next forward pass, their slots reserved. Younger searches may be preempted for it."""
        running = self._running(worker)
        while running:
            branches = [b for t in running if t.state is not None for b in t.state.waiting()]
            chunks = self._within_budget(worker, worker.tree.pending(branches))
            try:
                worker.tree.reserve(chunks)
            except OutOfSlots as out:
                if self._read_ahead():  # some of what was to be computed may not be wanted
                    running = self._running(worker)
                    continue
                # kept prefixes give way first, then whatever no running request sees
                if worker.prefixes.evict() or worker.tree.evict(worker.tree.view(branches), out.needed - out.free):
                    continue
                youngest = running.pop()
                if running:
                    youngest.preempted = True
                    continue
                self._resume(youngest, None, self._out_of_memory(worker, youngest, branches))
                return []
            self._count(worker, running, chunks)
            return chunks
        return []

    def _within_budget(self, worker: ModelWorker, chunks: list[Chunk]) -> list[Chunk]:
        """Decode rows first, then prefills, the last one cut; nothing whose ancestors would not be there."""
        budget = self.max_batch_tokens
        if sum(c.stop - c.begin for c in chunks) <= budget:
            return chunks
        tree = worker.tree
        late = {c.node for c in chunks}
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
            if stop == chunk.stop:
                late.discard(chunk.node)
        return chosen

    def _out_of_memory(self, worker: ModelWorker, task: Task, branches: Sequence[Branch]) -> OutOfMemory:
        needed = int(worker.tree.view(branches).sum())
        total, free = worker.tree.slots.num_slots, worker.tree.slots.num_free
        return OutOfMemory(
            f"search {task.index} needs {needed} KV slots for {len(branches)} branches at once, even alone: "
            f"{free} are free of {total}; raise num_slots ({worker.runner.bytes_per_slot} bytes each) or search "
            "narrower"
        )

    def _count(self, worker: ModelWorker, running: list[Task], chunks: list[Chunk]) -> None:
        """Charges each node's tokens and slots to the search that wrote it, or to the oldest if that one is gone."""
        tree = worker.tree
        by_index = {task.index: task for task in running}
        for chunk in chunks:
            counters = by_index.get(int(tree.owner[chunk.node]), running[0]).counters
            if worker is self.worker:
                counters.model_tokens += chunk.stop - chunk.begin
            else:
                counters.reward_tokens += chunk.stop - chunk.begin
        if worker is self.worker:
            first = running[0].index
            node = np.flatnonzero((tree.num_slots > 0) & (tree.owner >= first))
            held = np.bincount(tree.owner[node] - first, weights=tree.num_slots[node], minlength=1)
            for task in running:
                if task.index - first < len(held):
                    now = int(held[task.index - first])
                    task.counters.peak_slots = max(task.counters.peak_slots, now)

    # ---------------------------------------------------------------- answers

    def _answer_extends(self) -> bool:
        """Draws one token for every ready row of every `extend`: one product with the head for all of them."""
        states = [(t, t.state) for t in self._tasks if isinstance(t.state, ExtendState)]
        ready = [w for t, w in states if not t.preempted and len(w.ready())]
        if ready and (drawn := self._draw(ready)) is not None:
            if self.ahead and any(w.open.any() for w in drawn.states):
                self.worker.append_drawn(drawn.branches, drawn.tokens)
                self._unread = drawn
            else:
                self._read(drawn)
        unread = [] if self._unread is None else self._unread.states
        finished = [(t, w) for t, w in states if t.state is w and not (w.open.any() or w in unread)]
        for task, state in finished:
            self._resume(task, Extension(state.reason, state.log_prob, state.num_tokens))
        return bool(ready or finished)

    def _draw(self, states: list[ExtendState]) -> Drawn | None:
        """A token for each ready row of each state, counted; None if that fails for all there is."""
        groups = [[w] for w in states if w.request.processors]
        if fused := [w for w in states if not w.request.processors]:
            groups.append(fused)
        parts = []
        for group in groups:
            draw = self._draw_processed if group[0].request.processors else self._draw_fused
            try:
                rows = [state.ready() for state in group]
                parts.append((group, rows, *draw(group, rows)))
            except Exception as failure:  # a processor may be the user's own
                if len(group) > 1:
                    groups += [[state] for state in group]  # each alone: whose fault is it?
                else:
                    self._fail(group[0], failure)
        if not parts:
            return None
        states, rows = [w for group, *_ in parts for w in group], [at for _, some, *_ in parts for at in some]
        columns = zip(*(part[2:] for part in parts), strict=True)
        hidden, tokens, log_probs = (torch.cat(c) if len(c) > 1 else c[0] for c in columns)
        branches = [state.branches[i] for state, at in zip(states, rows, strict=True) for i in at]
        _, length = self.worker.tree.tips(branches)
        for state, at in zip(states, rows, strict=True):
            state.count(at)
        outcome = Download(torch.stack([tokens, log_probs.double()]))
        return Drawn(states, rows, branches, length, hidden, tokens, outcome)

    def _draw_fused(self, states: list[ExtendState], rows: list[NDArray[np.int64]]) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows of states without processors: hidden states, tokens, log-probs (NaN for bad logits)."""
        pairs = list(zip(states, rows, strict=True))
        hidden = self.worker.hidden([state.branches[i] for state, at in pairs for i in at])
        sampling = [state.request.sampling for state, at in pairs for _ in at]
        draw = self._keyed(sampling, np.concatenate([state.ids[at] for state, at in pairs]))
        scores = self.worker.runner.score(hidden, TokenRequest(draw=draw))
        return hidden, scores.token, scores.log_prob

    def _draw_processed(
        self, states: list[ExtendState], rows: list[NDArray[np.int64]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of one state with processors. NO_TOKEN is the log-prob where they leave none."""
        (state,), (at,) = states, rows
        branches, request = [state.branches[i] for i in at], state.request
        hidden = self.worker.hidden(branches)
        logits = self.worker.runner.logits(hidden)
        input_ids = left_padded(branches, request.pad_token_id, logits.device)
        scores = process(request.processors, branches, input_ids, logits.clone())
        drawn = score_logits(scores, TokenRequest(draw=self._keyed(request.sampling, state.ids[at])), hidden)
        assert drawn.token is not None and drawn.shaped_log_prob is not None
        log_prob = logits.gather(1, drawn.token[:, None]).squeeze(1) - logits.logsumexp(dim=1)
        none_left = drawn.shaped_log_prob.isnan() & log_prob.isfinite()
        return hidden, drawn.token, log_prob.masked_fill(none_left, NO_TOKEN)

    def _keyed(self, sampling: Sampling | list[Sampling], ids: NDArray[np.int64]) -> Draw:
        """The draw behind branches `ids`."""
        tree = self.worker.tree
        return Draw(sampling, seed=tree.branch_key[ids], position=tree.branch_length[ids])

    def _read_ahead(self) -> bool:
        """Reads the tokens that were drawn ahead of the host; False if there are none."""
        if self._unread is None:
            return False
        self._read(self._unread)
        return True

    def _read(self, drawn: Drawn) -> None:
        """Decides by the drawn tokens how their branches go on, and which of them become part of their branch."""
        ids, log_probs = drawn.outcome.read()
        tokens, ahead = np.where(np.isfinite(log_probs), ids, 0).astype(np.int64), drawn is self._unread
        self._unread = None
        tree = self.worker.tree
        there = drawn.unchanged(tree, ahead)
        if ahead:
            tree.resolve_last_tokens(drawn.some(there), tokens[there])
        stays = np.zeros(len(tokens), bool)
        failed: dict[ExtendState, Exception] = {}
        for state, rows, part in drawn.parts():
            if there[part].all():
                try:
                    stays[part] = state.take(rows, tokens[part], log_probs[part])
                except Exception as failure:  # the model's, a processor's, or of a stop that is the user's own
                    failed[state] = failure
        there &= drawn.unchanged(tree, ahead)  # a stop may have changed anything
        if not ahead:
            tree.append(drawn.some(stays & there), tokens[stays & there])
        elif (gone := there & ~stays).any():
            at = upload(np.flatnonzero(gone), drawn.hidden.device)
            self.worker.retract(drawn.some(gone), drawn.hidden[at])
        for state, _, part in drawn.parts():
            if not there[part].all():
                failed.setdefault(
                    state, InvalidInput("branches of extend were changed or dropped while it was answered")
                )
        for state, why in failed.items():
            self._fail(state, why)

    def _fail(self, state: RequestState, failure: Exception) -> None:
        """Throws `failure` into the search that awaits this, if one still does."""
        for task in [t for t in self._tasks if t.state is state]:
            self._resume(task, None, failure)

    def _answer_rest(self) -> bool:
        """Answers what needs all its branches at once: rewards, scores of tokens, rows of logits."""
        answered = False
        for task in self.active:
            if not isinstance(task.state, TokensState | RewardState):
                continue
            try:
                found = task.state.answer()
            except Exception as failure:  # the request, what the model gave, or a reward of the user's own
                self._resume(task, None, failure)
            else:
                if found is None:
                    continue
                self._resume(task, found)
            answered = True
        return answered


async def _called(search: Callable[..., Coroutine[Any, Any, Any]], roots: list[Branch]) -> Any:
    """What the search returns; what is wrong with calling it is a failure of that search."""
    return await search(*roots)


def _key(seed: int, tokens: NDArray[np.integer]) -> int:
    """A key for the draws of a prompt: prompts of one run draw independently, each the same in any batch."""
    text = tokens.astype(np.int32).tobytes() + seed.to_bytes(16, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
