"""Samples a token for every ready row of every `extend` of a worker, and records what was sampled.

Failures are returned, each with the request whose fault it is, and nothing is resumed here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forktree.device.transfer import Download, upload
from forktree.engine.extend_state import ExtendState
from forktree.engine.worker import ModelWorker
from forktree.errors import InvalidInput
from forktree.ops.token_request import KeyedSampling, TokenRequest
from forktree.search.processors import sample_processed
from forktree.types import BoolArray, Int32Array, Int64Array

Rows = dict[ExtendState, Int64Array]  # of each `extend`, some of its branches
Failures = dict[ExtendState, Exception]


@dataclass(eq=False)
class SampledTokens:
    """One token for every row of some `extend`s, sampled on the device; the host has yet to read them."""

    worker: ModelWorker
    rows: Rows  # in the order of the tokens
    ids: Int64Array  # branches whose tokens they are, [n]
    length: Int32Array  # of these before, [n]
    hidden: Tensor  # [n, H], what they were sampled from
    tokens: Tensor  # int64 [n]
    outcome: Download  # fp64 [2, n]: tokens, log-probs (NaN where the logits are not finite, NO_TOKEN)
    appended: bool = False

    def append(self) -> None:
        """Appends the tokens to their branches, unknown as they are to the host, to be computed by the next pass."""
        self.worker.append_sampled(self.ids, self.tokens)
        self.appended = True

    def read(self) -> Failures:
        """Waits for the tokens; decides which become part of their branch, and how each branch goes on."""
        ids, log_probs = self.outcome.read()
        tokens = np.where(np.isfinite(log_probs), ids, 0).astype(np.int64)
        tree = self.worker.tree
        there = self._unchanged()
        if self.appended:
            tree.resolve_last_tokens(self.ids[there], tokens[there])
        stays = np.zeros(len(tokens), bool)
        failed: Failures = {}
        for state, rows, part in self._parts():
            if there[part].all():
                try:
                    stays[part] = state.take(rows, tokens[part], log_probs[part])
                except Exception as failure:  # the model's, a processor's, or of a stop that is the user's own
                    failed[state] = failure
        there &= self._unchanged()  # a stop may have changed anything
        if not self.appended:
            tree.append(self.ids[stays & there], tokens[stays & there])
        elif (gone := there & ~stays).any():
            at = upload(np.flatnonzero(gone), self.hidden.device)
            self.worker.undo_append(self.ids[gone], self.hidden[at])
        for state, _, part in self._parts():
            if not there[part].all():
                failed.setdefault(
                    state, InvalidInput("branches of extend were changed or dropped while it was answered")
                )
        return failed

    def _parts(self) -> Iterator[tuple[ExtendState, Int64Array, slice]]:
        """Each state, its rows, and where these are among all."""
        first = 0
        for state, rows in self.rows.items():
            yield state, rows, slice(first, first := first + len(rows))

    def _unchanged(self) -> BoolArray:
        """Whether each branch is alive and as long as sampling left it, `[n]`."""
        alive = np.concatenate([state.alive(rows) for state, rows in self.rows.items()])
        return alive & (self.worker.tree.branch_length[self.ids] == self.length + self.appended)


class Sampler:
    """Samples, and knows the tokens that the host has yet to read: they are appended to their branches."""

    def __init__(self) -> None:
        self._unread: list[SampledTokens] = []

    @property
    def unread(self) -> bool:
        """Whether there are tokens that the host has yet to read."""
        return bool(self._unread)

    def owes(self, state: ExtendState) -> bool:
        """Whether some of them are of this request."""
        return any(state in sampled.rows for sampled in self._unread)

    def sample(self, worker: ModelWorker, states: Sequence[ExtendState], *, ahead: bool) -> tuple[bool, Failures]:
        """A token for each ready row of each state. ahead: they are not read yet, if any branch goes on.

        Returns whether any row was ready, and failures.
        """
        sampled, failed = _sample(worker, states)
        if sampled is None:
            return False, failed
        if ahead and any(state.open.any() for state in sampled.rows):
            sampled.append()
            self._unread.append(sampled)
            return True, failed
        return True, failed | sampled.read()

    def read(self) -> Failures:
        """Reads all tokens that the host has yet to read."""
        unread, self._unread = self._unread, []
        failed: Failures = {}
        for sampled in unread:
            failed |= sampled.read()
        return failed


def _sample(worker: ModelWorker, states: Sequence[ExtendState]) -> tuple[SampledTokens | None, Failures]:
    """Samples a token for each ready row of each state, and counts it; None if no row is ready, or all that is fails.

    All states without processors share one product with the head.
    """
    groups = [[state] for state in states if state.request.processors]
    if fused := [state for state in states if not state.request.processors]:
        groups.append(fused)
    parts: list[Any] = []
    failed: Failures = {}
    for group in groups:
        how = _sample_processed if group[0].request.processors else _sample_fused
        try:
            if rows := {state: at for state in group if len(at := state.ready())}:
                ids = np.concatenate([state.ids[at] for state, at in rows.items()])
                parts.append((rows, ids, *how(worker, rows, ids)))
        except Exception as failure:  # a processor may be the user's own
            if len(group) > 1:
                groups += [[state] for state in group]  # each alone: whose fault is it?
            else:
                failed[group[0]] = failure
    if not parts:
        return None, failed
    rows = {state: at for some, *_ in parts for state, at in some.items()}
    ids = np.concatenate([part[1] for part in parts])
    columns = zip(*(part[2:] for part in parts), strict=True)
    hidden, tokens, log_probs = (torch.cat(c) if len(c) > 1 else c[0] for c in columns)
    for state in rows:
        state.check()  # a processor may have dropped anything
    for state, at in rows.items():
        state.count(at)
    outcome = Download(torch.stack([tokens, log_probs.double()]))
    length = worker.tree.branch_length[ids]
    return SampledTokens(worker, rows, ids, length, hidden, tokens, outcome), failed


def _sample_fused(worker: ModelWorker, rows: Rows, ids: Int64Array) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows of states without processors, ids their branches: hidden states, tokens, log-probs (NaN: bad logits)."""
    if any(state.has_own_hidden for state in rows):
        hidden = torch.cat([state.hidden(at) for state, at in rows.items()])
    else:
        hidden = worker.hidden(ids)
    scores = worker.runner.score(hidden, TokenRequest(sample=_keyed(worker, rows, ids)))
    return hidden, scores.token, scores.log_prob


def _sample_processed(worker: ModelWorker, rows: Rows, ids: Int64Array) -> tuple[Tensor, Tensor, Tensor]:
    """Like `_sample_fused`, of one state with processors. Rows left without a token have log-prob `NO_TOKEN`."""
    ((state, at),) = rows.items()
    branches, request = [state.branches[i] for i in at], state.request
    hidden = state.hidden(at)
    sample = _keyed(worker, rows, ids)
    logits = worker.runner.logits(hidden)
    token, log_prob = sample_processed(request.processors, branches, logits, sample, request.pad_token_id)
    return hidden, token, log_prob


def _keyed(worker: ModelWorker, rows: Rows, ids: Int64Array) -> KeyedSampling:
    """How the tokens that follow rows are sampled."""
    sampling = [state.sampling[i] for state, at in rows.items() for i in at.tolist()]
    return KeyedSampling(sampling, seed=worker.tree.branch_key[ids], position=worker.tree.branch_length[ids])
