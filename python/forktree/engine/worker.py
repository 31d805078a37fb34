"""`ModelWorker`: one model with its tree, its KV pools and the hidden states it kept.

The policy has one; so has each reward model, and each further model of a `Decoder`.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from forktree.device.properties import free_bytes
from forktree.device.transfer import upload
from forktree.errors import DecoderInUse, InvalidInput
from forktree.kv import Branch, Chunk, PrefixIndex, Tree, tree_layout
from forktree.kv.tree import NO_OWNER, PENDING_TOKEN
from forktree.model.attach import attach
from forktree.model.fingerprint import Fingerprint
from forktree.model.model_spec import ModelSpec
from forktree.model.runner import Runner
from forktree.ops.checks import check_token_request
from forktree.ops.token_request import TokenRequest
from forktree.types import BoolArray, Int32Array, Int64Array

DEFAULT_SLOTS = 65536
Branches = Sequence[Branch] | Int64Array  # or what `Tree.ids` gave for them


def _default_slots(spec: ModelSpec) -> int:
    """As many slots as fit in a quarter of the free memory, at most 65,536."""
    return max(1, min(DEFAULT_SLOTS, free_bytes(spec.packed.device) // 4 // spec.bytes_per_slot))


class _Pass:
    """Which tokens a forward pass computes, in ascending order of node and offset, and where it has them."""

    hidden: Tensor  # [T, H], once it is done

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        node, begin, stop = np.array(chunks, np.int64).T
        row = np.cumsum(stop - begin) - (stop - begin)
        order = np.argsort(node << 32 | begin)
        self.token, self.stop = (node << 32 | begin)[order], (node << 32 | stop)[order]  # of each chunk
        self.row = row[order]  # of its first token
        last = order[np.append(np.diff(node[order]) > 0, True)]
        self.tips = np.stack([node[last], (row + stop - begin - 1)[last]])  # the last token of each node, and its row


class ModelWorker:
    """Computes the pending tokens of branches and keeps the last hidden state of every node."""

    def __init__(
        self, model: Any, *, num_slots: int | None = None, prefix_cache: bool = True, spec: ModelSpec | None = None
    ) -> None:
        """spec: what `attach(model)` returned, if it has been called already."""
        self._model = model
        spec = spec or attach(model)
        self._verified: Fingerprint | None = Fingerprint(model)  # None: nobody knows
        self.runner = Runner(spec, num_slots=num_slots or _default_slots(spec))
        self.tree = Tree(self.runner.num_slots, name=spec.name)
        self.prefixes = PrefixIndex(self.tree)
        self.tokens_computed = 0
        self.forwards = 0
        self._prefix_cache = prefix_cache
        self._hidden = torch.empty(0, self.runner.hidden_size, dtype=self.runner.dtype, device=self.runner.device)
        self._sampled = torch.empty(0, dtype=torch.long, device=self.runner.device)  # for PENDING_TOKEN
        self._plans: Any = None
        self._used = np.zeros(0, np.int64)  # nodes of the last layout
        self._planned_for: tuple[int, list[int]] | None = None
        self._planned_tokens = 0  # of the nodes used
        self._passed = _Pass([Chunk(0, 0, 0)])  # the last one
        self._claiming, self._thread = threading.Lock(), 0

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Within, a reward opens branches here for a search of this thread.

        Raises `DecoderInUse` while branches of a search of another thread are alive: calls of two engines would change
        the tree at the same time.
        """
        with self._claiming:
            thread = threading.get_ident()
            if self._thread != thread and self.tree.has_owners():
                raise DecoderInUse(
                    f"{self.tree.name} is in use by a search in another thread: let that end first, or load the model "
                    "a second time"
                )
            self._thread = thread
            yield

    def clear(self) -> None:
        """Begins anew, with an empty tree, in whatever state a call that was cut short left it."""
        self.tree.clear()
        self.prefixes = PrefixIndex(self.tree)
        self._hidden, self._sampled = self._hidden[:0], self._sampled[:0]
        self._planned_for = None

    def verify(self) -> tuple[Fingerprint, ModelSpec] | None:
        """The model as it is now, verified; None if it is as it was, as far as that can be seen.

        Raises what `attach` raises.
        """
        now = Fingerprint(self._model)
        return None if now == self._verified else (now, attach(self._model))

    def renew(self, now: Fingerprint, spec: ModelSpec) -> None:
        """Goes on with what `verify` gave, and drops what was computed before: all tokens are pending, none is lost."""
        self.runner.renew(spec, in_place=self._verified is not None and now.built_like(self._verified))
        self._verified = now
        self.prefixes.clear()
        self.tree.forget()
        runner, rows = self.runner, len(self._hidden)
        self._hidden = torch.empty(rows, runner.hidden_size, dtype=runner.dtype, device=runner.device)
        self._sampled = self._sampled.to(runner.device)
        self._planned_for = None

    def weights_changed(self) -> None:
        """Says that the model has changed where it cannot be seen."""
        self._verified = None

    def open(self, tokens: ArrayLike, *, key: int = 0, owner: int = NO_OWNER) -> Branch:
        """A branch that sees `tokens`, on the longest prefix the tree already has."""
        text = np.asarray(tokens)
        branch = self.tree.match(text, key=key, owner=owner) if self._prefix_cache else None
        if branch is None:
            return self.tree.root(text, key=key, owner=owner)
        branch.append(text[branch.length :])
        return branch

    def check(self, branches: Branches, positions: NDArray[np.integer] | None = None) -> None:
        """Raises if a branch was dropped, or has pending ids or positions that the model does not take.

        Looks at what is pending up to the token at a position of each branch, by default its last.
        """
        tokens, at = self.tree.tokens_of(self.tree.pending(branches, positions))
        runner = self.runner
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < runner.vocab_size:
            raise InvalidInput(f"token ids must lie in [0, {runner.vocab_size}), got {tokens.min()} to {tokens.max()}")
        if at.max(initial=0) >= runner.max_position:
            raise InvalidInput(
                f"the model has {runner.max_position} positions ({runner.spec.max_position_note}), got a token at "
                f"{at.max()}"
            )

    def check_request(self, request: TokenRequest, rows: int) -> None:
        """Raises if `request` is not one of so many rows, or not of this model."""
        hidden = self._hidden.new_empty(1, self.runner.hidden_size).expand(rows, -1)
        check_token_request(request, hidden, self.runner.vocab_size)

    def keep(self, branch: Branch) -> None:
        """Keeps what `branch` sees for later prompts, until slots are needed for something else."""
        if self._prefix_cache:
            self.prefixes.keep(branch)

    def is_ready(self, branches: Branches) -> BoolArray:
        """Whether the hidden state of each branch's last token is kept, `[n]`."""
        node, length = self.tree.tips(branches)
        return self.tree.hidden_position[node] == length - 1

    def hidden(self, branches: Branches) -> Tensor:
        """Last hidden state of each branch, `[n, H]`; all must be ready."""
        node, _ = self.tree.tips(branches)
        return self._hidden[upload(node.astype(np.int64), self._hidden.device)]

    def kept(self, ids: Int64Array, positions: NDArray[np.integer]) -> tuple[BoolArray, Tensor]:
        """Looks for kept hidden states of tokens: one at a position of each of the branches `ids`.

        Returns which tokens have one, `[n]`, and these states, `[k, H]`.
        """
        node = self.tree.nodes_at(ids, positions)
        found = self.tree.hidden_position[node] == positions
        return found, self._hidden[upload(node[found].astype(np.int64), self._hidden.device)]

    def computed(self, ids: Int64Array, positions: NDArray[np.integer]) -> tuple[BoolArray, Tensor]:
        """As `kept`, among all the tokens that the last forward pass has computed.

        It is asked before anything else is done with the tree.
        """
        node = self.tree.nodes_at(ids, positions)
        token = node.astype(np.int64) << 32 | (positions - self.tree.start[node])
        at = np.searchsorted(self._passed.token, token, side="right") - 1  # the chunk that it may lie in
        found = (at >= 0) & (token < self._passed.stop[at])
        row = (self._passed.row[at] + token - self._passed.token[at])[found]
        return found, self._passed.hidden[upload(row, self._hidden.device)]

    def append_sampled(self, branches: Branches, tokens: Tensor) -> None:
        """Appends one token to each branch, int64 `[n]`, which the device knows and the host does not.

        It can be computed, and is `PENDING_TOKEN` to the tree until it is resolved or undone.
        """
        self.tree.append_pending(branches)
        node, _ = self.tree.tips(branches)
        self._make_room()
        self._sampled[upload(node.astype(np.int64), self._sampled.device)] = tokens

    def undo_append(self, branches: Branches, hidden: Tensor) -> None:
        """Takes back the newest token of each branch.

        hidden `[n, H]`: states of the tokens before, which computing the newest may have replaced.
        """
        tree = self.tree
        tree.undo_append(branches)
        node, length = tree.tips(branches)
        node, first = np.unique(node, return_index=True)
        lost = tree.hidden_position[node] < 0
        node, first = node[lost].astype(np.int64), first[lost]
        to, row = upload(np.stack([node, first]), hidden.device)
        self._hidden[to] = hidden[row]
        tree.hidden_position[node] = length[first] - 1

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """One forward pass over `chunks`, whose slots are reserved and whose ancestors are computed or among them.

        Returns the hidden states of all their tokens, `[T, H]`.
        """
        tree, device = self.tree, self._hidden.device
        self._make_room()
        ids, positions = tree.tokens_of(chunks)
        self._passed = passed = _Pass(chunks)
        to, end = upload(passed.tips, device)
        tokens: Int32Array | Tensor = ids
        if ids.min() == PENDING_TOKEN:
            tokens = upload(ids.astype(np.int64), device)
            newest = tokens[end]
            tokens[end] = torch.where(newest == PENDING_TOKEN, self._sampled[to], newest)
        hidden = self.runner.forward(tokens, positions, tree.slots_of(chunks), self._plans_for(chunks))
        passed.hidden = hidden
        self._hidden[to] = hidden[end]
        tree.mark_computed(chunks)
        self.tokens_computed += len(ids)
        self.forwards += 1
        return hidden

    def _make_room(self) -> None:
        """Rows for every node."""
        missing = self.tree.num_nodes - len(self._hidden)
        if missing > 0:
            self._hidden = torch.cat([self._hidden, self._hidden.new_empty(missing, self._hidden.shape[1])])
            self._sampled = torch.cat([self._sampled, self._sampled.new_empty(missing)])

    def _plans_for(self, chunks: Sequence[Chunk]) -> Any:
        """Plans for the step.

        They are those of the last step, grown, if since then its tips have only grown, and not by more than a quarter
        of all: beyond that, work would no longer be spread as it should.
        """
        nodes = [c.node for c in chunks]
        tree = self.tree
        # a token computed again, for its hidden state alone, is planned as a fixed range: that plan cannot grow
        computed = tree.num_computed
        steady = all(c.begin == computed[c.node] and c.stop == c.begin + 1 == tree.length[c.node] for c in chunks)
        key = (tree.version, nodes) if steady else None
        length = tree.length[self._used]
        if key is not None and key == self._planned_for and length.sum() <= 1.25 * self._planned_tokens:
            positions = (tree.start[nodes] + tree.length[nodes] - 1).astype(np.int32)
            grown = {kind: plan.grow(length, positions, tree.arena.slot_index) for kind, plan in self._plans.items()}
            self._plans = grown
        else:
            self._used = tree.visible_nodes(nodes)
            self._planned_tokens = int(tree.length[self._used].sum())
            self._plans = self.runner.plans(tree_layout(tree, chunks))
        self._planned_for = key
        return self._plans
