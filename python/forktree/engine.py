"""The engine: runs many searches at once, one packed forward pass for all of them a step.

A step is resume, schedule, forward, answer:

    every search runs until it awaits something           (a coroutine, resumed by `send`)
    the pending tokens of all awaited branches are packed  (decode rows first, then slices of long prefills)
    one forward pass a lane computes them
    requests whose branches are ready are answered         (one product with the head, one draw a row)

On a GPU, `extend` runs one step ahead of the host: the tokens of a step are drawn on the device and computed by the
next pass before the host reads them. What was drawn behind the end of a branch is then taken back.

Out of slots is a normal event: reservations, kept prefixes, idle nodes and then the youngest search give way; their
tokens stay and are computed again later.
"""

import contextlib
import hashlib
import itertools
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forktree.errors import Cancelled, InvalidInput, NonFinite, OutOfMemory
from forktree.kv import Branch, OutOfSlots
from forktree.kv.tree import Chunk
from forktree.lane import Lane
from forktree.ops.torch_backend.score_tokens import from_logits
from forktree.sampling import Sampling
from forktree.scoring import Subject
from forktree.search.processors import left_padded, process
from forktree.search.request import Extend, Extension, NextLogits, Request, Score, ScoreTokens
from forktree.token_scores import Draw, TokenRequest
from forktree.transfer import Download, upload
from forktree.work import NO_TOKEN, Drawn, ExtendWork, ScoreWork, TokensWork, Work

_INDICES = itertools.count()  # a search's number, and the owner of its branches in every tree it uses


@dataclass
class Counters:
    """What one search cost. A prefix shared by several searches counts for the one that wrote it."""

    model_tokens: int = 0  # tokens run through the policy
    scorer_tokens: int = 0  # tokens run through a reward model
    scorer_calls: int = 0  # branches scored
    peak_slots: int = 0  # most KV slots that the tokens it wrote took at once
    seconds: float = 0.0


@dataclass(eq=False)
class Task:
    """One search under way. `result` or `error` is set when it is done."""

    index: int
    coroutine: Coroutine[Request[Any], Any, Any]
    roots: list[Branch]
    prompt: str
    prompt_length: int
    began: float
    counters: Counters = field(default_factory=Counters)
    work: Work | None = None
    preempted: bool = False
    done: bool = False
    result: Any = None
    error: Exception | None = None


class Engine:
    """Drives searches over one policy lane. `max_batch_tokens` bounds the tokens of one forward pass.

    ahead: whether `extend` runs one step ahead of the host; None: on a GPU. Results are the same.
    """

    def __init__(
        self, lane: Lane, *, tokenizer: Any = None, max_batch_tokens: int = 512, ahead: bool | None = None
    ) -> None:
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens must be at least 1, got {max_batch_tokens}")
        self.lane, self.tokenizer, self.max_batch_tokens = lane, tokenizer, max_batch_tokens
        self.ahead = lane.runner.device.type == "cuda" if ahead is None else ahead
        self._unread: Drawn | None = None  # appended to their branches, and unknown to the host
        self._tasks: list[Task] = []  # oldest first
        self._lanes = [lane]

    # ---------------------------------------------------------------- searches

    def submit(
        self,
        search: Callable[..., Coroutine[Any, Any, Any]],
        prompts: Sequence[Sequence[int]],
        *,
        text: str = "",
        seed: int = 0,
    ) -> Task:
        """Starts a search; it runs as `step` is called.

        search: its coroutine is `search(*roots)`, with one root for each of `prompts` (most searches have one).
        text: the prompt as scorers see it. seed: keys the draws of its branches, together with the prompt.
        """
        index = next(_INDICES)
        roots = [self.lane.open(tokens, key=_key(seed, tokens), owner=index) for tokens in prompts]
        try:
            coroutine = search(*roots)
        except BaseException:
            self.lane.tree.drop_owned(index)
            raise
        task = Task(index, coroutine, roots, text, len(prompts[0]), began=time.perf_counter())
        self._tasks.append(task)
        self._resume(task, None)
        return task

    def renew(self) -> None:
        """Looks at the policy once: if its weights are others than before, what was computed with those is dropped.

        Raises what `attach` raises; then nothing has changed.
        """
        if not self.lane.is_current():
            self._read_ahead()  # hidden states of tokens that are taken back would be old ones
            self.lane.renew()
            for work in (task.work for task in self._tasks):
                if work is not None and work.lane is self.lane:
                    work.hidden = [None] * len(work.branches)

    def has_room(self, num_tokens: int) -> bool:
        """Whether a prompt of this length is better started now than later: work for the next pass is short, no
        search has been preempted, and its slots are at hand."""
        rows = sum(len(t.work.waiting()) for t in self._tasks if t.work is not None)
        if rows >= self.max_batch_tokens or any(t.preempted for t in self._tasks):
            return False
        free = self.lane.tree.slots.num_free
        return free > num_tokens or free + sum(b.length for b in self.lane.prefixes.branches()) > num_tokens

    @property
    def active(self) -> list[Task]:
        """Searches that are not done, oldest first."""
        return list(self._tasks)

    def cancel(self, task: Task) -> None:
        """Ends a search: `Cancelled` is thrown into it; if it carries on all the same, it is closed by force."""
        self._read_ahead()  # a search sees no token that is unknown
        if not task.done:
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
        """One forward pass a lane, and the answers it makes possible."""
        busy = False
        for lane in list(self._lanes):
            if chunks := self._schedule(lane):
                lane.forward(chunks)
                busy = True
        busy |= self._read_ahead()  # now that the device has the next step to do
        answered = self._answer_extends() | self._answer_rest()
        if not busy and not answered:
            time.sleep(0.001)  # only Python scorers are at work

    def _resume(self, task: Task, value: Any, error: Exception | None = None) -> None:
        """Runs the search to its next request."""
        self._close(task)
        try:
            request = task.coroutine.throw(error) if error is not None else task.coroutine.send(value)
            task.work = self._begin(task, request)
            if not any(task.work.lane is lane for lane in self._lanes):
                self._lanes.append(task.work.lane)
        except StopIteration as stop:
            self._finish(task, result=stop.value)
        except Exception as failure:
            self._finish(task, error=failure)

    def _begin(self, task: Task, request: Request[Any]) -> Work:
        if isinstance(request, Request):
            self.lane.check(request.branches)
        if isinstance(request, Extend):
            return ExtendWork(request, self.lane)
        if isinstance(request, ScoreTokens | NextLogits):
            return TokensWork(request, self.lane)
        if isinstance(request, Score):
            task.counters.scorer_calls += len(request.branches)
            subject = Subject(self.lane, request.branches, task.prompt, task.prompt_length, self.tokenizer)
            return ScoreWork(request.scorer.begin(subject), subject)
        raise TypeError(f"a search awaits extend, score, score_tokens or next_logits, got {type(request).__name__}")

    def _close(self, task: Task) -> None:
        work, task.work = task.work, None
        if isinstance(work, ScoreWork):
            work.reading.close()

    def _finish(self, task: Task, *, result: Any = None, error: Exception | None = None) -> None:
        self._close(task)
        with contextlib.suppress(Exception):  # a search that awaits or raises while being closed ends all the same
            task.coroutine.close()
        task.result, task.error, task.done = result, error, True
        task.counters.seconds = time.perf_counter() - task.began
        self._tasks.remove(task)
        for root in task.roots:
            if error is None and root.alive:
                self.lane.keep(root)
        for lane in self._lanes:
            lane.tree.drop_owned(task.index)
        for other in self._tasks:
            other.preempted = False

    # ---------------------------------------------------------------- scheduling

    def _running(self, lane: Lane) -> list[Task]:
        return [t for t in self._tasks if t.work is not None and t.work.lane is lane and not t.preempted]

    def _schedule(self, lane: Lane) -> list[Chunk]:
        """Chunks for the next forward pass, their slots reserved. Younger searches may be preempted for it."""
        running = self._running(lane)
        while running:
            branches = [b for t in running if t.work is not None for b in t.work.waiting()]
            chunks = self._within_budget(lane, lane.tree.pending(branches))
            try:
                lane.tree.reserve(chunks)
            except OutOfSlots as out:
                if self._read_ahead():  # some of what was to be computed may not be wanted
                    running = self._running(lane)
                    continue
                # kept prefixes give way first, then whatever no running request sees
                if lane.prefixes.evict() or lane.tree.evict(lane.tree.view(branches), out.needed - out.free):
                    continue
                youngest = running.pop()
                if running:
                    youngest.preempted = True
                    continue
                self._resume(youngest, None, self._out_of_memory(lane, youngest, branches))
                return []
            self._count(lane, running, chunks)
            return chunks
        return []

    def _within_budget(self, lane: Lane, chunks: list[Chunk]) -> list[Chunk]:
        """Decode rows first, then prefills, the last one cut; nothing whose ancestors would not be there."""
        budget = self.max_batch_tokens
        if sum(c.stop - c.begin for c in chunks) <= budget:
            return chunks
        tree = lane.tree
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

    def _out_of_memory(self, lane: Lane, task: Task, branches: Sequence[Branch]) -> OutOfMemory:
        needed = int(lane.tree.view(branches).sum())
        total, free = lane.tree.slots.num_slots, lane.tree.slots.num_free
        return OutOfMemory(
            f"search {task.index} needs {needed} KV slots for {len(branches)} branches at once, even alone: "
            f"{free} are free of {total}; raise num_slots ({lane.runner.bytes_per_slot} bytes each) or search narrower"
        )

    def _count(self, lane: Lane, running: list[Task], chunks: list[Chunk]) -> None:
        """Charges each node's tokens and slots to the search that wrote it, or to the oldest if that one is gone."""
        tree = lane.tree
        by_index = {task.index: task for task in running}
        for chunk in chunks:
            counters = by_index.get(int(tree.owner[chunk.node]), running[0]).counters
            if lane is self.lane:
                counters.model_tokens += chunk.stop - chunk.begin
            else:
                counters.scorer_tokens += chunk.stop - chunk.begin
        if lane is self.lane:
            first = running[0].index
            node = np.flatnonzero((tree.held > 0) & (tree.owner >= first))
            held = np.bincount(tree.owner[node] - first, weights=tree.held[node], minlength=1)
            for task in running:
                if task.index - first < len(held):
                    now = int(held[task.index - first])
                    task.counters.peak_slots = max(task.counters.peak_slots, now)

    # ---------------------------------------------------------------- answers

    def _answer_extends(self) -> bool:
        """Draws one token for every ready row of every `extend`: one product with the head for all of them."""
        works = [(t, t.work) for t in self._tasks if isinstance(t.work, ExtendWork)]
        ready = [w for t, w in works if not t.preempted and len(w.ready())]
        if ready and (drawn := self._draw(ready)) is not None:
            if self.ahead and any(w.open.any() for w in ready):
                self.lane.append_drawn(drawn.branches, drawn.tokens)
                self._unread = drawn
            else:
                self._read(drawn)
        unread = [] if self._unread is None else self._unread.works
        finished = [(t, w) for t, w in works if t.work is w and not (w.open.any() or w in unread)]
        for task, work in finished:
            self._resume(task, Extension(work.reason, work.log_prob, work.num_tokens))
        return bool(ready or finished)

    def _draw(self, works: list[ExtendWork]) -> Drawn | None:
        """A token for each ready row of each work, counted; None if logits processors fail for all there is."""
        fused = [work for work in works if not work.request.processors]
        parts = [(fused, *self._draw_fused(fused))] if fused else []
        for work in works:
            if work.request.processors:
                try:
                    parts.append(([work], *self._draw_processed(work)))
                except Exception as failure:  # a processor may be the user's own
                    self._resume(next(t for t in self._tasks if t.work is work), None, failure)
        if not parts:
            return None
        works = [work for some, *_ in parts for work in some]
        columns = zip(*(part[1:] for part in parts), strict=True)
        hidden, tokens, log_probs = (torch.cat(c) if len(c) > 1 else c[0] for c in columns)
        rows = [work.ready() for work in works]
        for work, at in zip(works, rows, strict=True):
            work.count(at)
        return Drawn(works, rows, hidden, tokens, Download(torch.stack([tokens, log_probs.double()])))

    def _draw_fused(self, works: list[ExtendWork]) -> tuple[Tensor, Tensor, Tensor]:
        """Of the ready rows of works without processors: hidden states, tokens, log-probs (NaN for bad logits)."""
        rows = [(work, work.ready()) for work in works]
        hidden = self.lane.hidden([work.branches[i] for work, at in rows for i in at])
        sampling = [work.request.sampling for work, at in rows for _ in at]
        draw = self._keyed(sampling, np.concatenate([work.ids[at] for work, at in rows]))
        scores = self.lane.runner.score(hidden, TokenRequest(draw=draw))
        assert scores.token is not None and scores.log_prob is not None
        return hidden, scores.token, scores.log_prob

    def _draw_processed(self, work: ExtendWork) -> tuple[Tensor, Tensor, Tensor]:
        """The same of a work with processors. NO_TOKEN is the log-prob where they leave none."""
        rows, request = work.ready(), work.request
        branches = [work.branches[i] for i in rows]
        hidden = self.lane.hidden(branches)
        logits = self.lane.runner.logits(hidden)
        input_ids = left_padded(branches, request.pad_token_id, logits.device)
        scores = process(request.processors, branches, input_ids, logits.clone())
        drawn = from_logits(scores, TokenRequest(draw=self._keyed(request.sampling, work.ids[rows])), hidden)
        assert drawn.token is not None and drawn.shaped_log_prob is not None
        log_prob = logits.gather(1, drawn.token[:, None]).squeeze(1) - logits.logsumexp(dim=1)
        none_left = drawn.shaped_log_prob.isnan() & log_prob.isfinite()
        return hidden, drawn.token, log_prob.masked_fill(none_left, NO_TOKEN)

    def _keyed(self, sampling: Sampling | list[Sampling], ids: NDArray[np.int64]) -> Draw:
        """The draw behind branches `ids`."""
        tree = self.lane.tree
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
        tokens, ahead = ids.astype(np.int64), drawn is self._unread
        self._unread = None
        tree, branches = self.lane.tree, drawn.branches
        if ahead:
            tree.name_newest(branches, tokens)
        stays = np.zeros(len(tokens), bool)
        failed, first = [], 0
        for work, rows in zip(drawn.works, drawn.rows, strict=True):
            part = slice(first, first := first + len(rows))
            wrong = rows[~np.isfinite(log_probs[part])]
            if len(wrong):
                failed.append((work, int(wrong[0]), log_probs[part][rows == wrong[0]]))
            else:
                stays[part] = work.take(rows, tokens[part], log_probs[part])
        if not ahead:
            tree.append([branches[k] for k in np.flatnonzero(stays)], tokens[stays])
        elif not stays.all():
            gone = np.flatnonzero(~stays)
            self.lane.retract([branches[k] for k in gone], drawn.hidden[upload(gone, drawn.hidden.device)])
        for work, bad, log_prob in failed:
            task = next(t for t in self._tasks if t.work is work)
            length = work.branches[bad].length
            nothing_left = InvalidInput(f"logits processors leave branch {bad} no token at position {length}")
            self._resume(task, None, nothing_left if log_prob == NO_TOKEN else NonFinite.of("logits", bad, length))

    def _answer_rest(self) -> bool:
        """Answers what needs all its branches at once: rewards, scores of tokens, rows of logits."""
        answered = False
        for task in self.active:
            work = task.work
            if isinstance(work, TokensWork):
                if (hidden := work.collect()) is None:
                    continue
                try:
                    found = work.answer(hidden)
                except Exception as failure:  # the request, or what the model gave
                    self._resume(task, None, failure)
                else:
                    self._resume(task, found)
                answered = True
            elif isinstance(work, ScoreWork):
                hidden = work.collect() if work.reading.lane is not None else None
                if work.reading.lane is not None and hidden is None:
                    continue
                try:
                    if (rewards := work.rewards(hidden)) is None:
                        continue
                except Exception as failure:  # a scorer may be the user's own
                    self._resume(task, None, failure)
                else:
                    self._resume(task, rewards)
                answered = True
        return answered


def _key(seed: int, tokens: Sequence[int]) -> int:
    """A key for the draws of a prompt: prompts of one run draw independently, each the same in any batch."""
    text = np.asarray(tokens, dtype=np.int32).tobytes() + seed.to_bytes(16, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
