"""Speculative decoding: a drafter guesses how texts go on, and one forward pass verifies many guesses.

    done = await speculative_extend(branches, sampling, drafter=PromptLookup(), max_tokens=64)

A draft is a tree of tokens (Miao et al. 2023, "SpecInfer"; Li et al. 2024, "EAGLE"). It is written on forks of the
branch that it continues; one pass computes all of it, and a token is sampled after the text and after each drafted
token, by the random numbers of that branch and position: those that plain decoding samples by. The walk from the text
down the tree goes on while the token that was sampled is one of the draft's; the last token sampled is not, and comes
for free. Texts are therefore those of plain decoding at the same seed, token by token (in fp32; otherwise up to
rounding), for every drafter, at any temperature, and whatever processors do that do not look at padding. As a draft is
chosen and not sampled, no rule accepts more of it: of the tokens drafted after a prefix, one is accepted with the sum
of their probabilities.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forktree.checks import shown
from forktree.device.transfer import Download
from forktree.engine.counters import Counters
from forktree.errors import InvalidInput, OutOfMemory
from forktree.kv import Branch, append
from forktree.ops.sampling import Sampling
from forktree.ops.token_request import KeyedSampling, TokenRequest
from forktree.search.payoff import Payoff
from forktree.search.processors import Processor, sample_processed
from forktree.search.progress import Progress
from forktree.search.request import Extend, Extension, Stop, extend, next_logits, score_tokens
from forktree.types import MAX_TOKEN_ID, Int32Array, Int64Array

TEXT = -1  # the parent of a draft's first tokens


@dataclass(frozen=True)
class DraftTree:
    """Guesses of how a text goes on.

    Args:
        tokens: ids, `[n]`; those that are likeliest to be accepted come first.
        parents: of each the place of the token before it, less than its own; `TEXT` for one that follows the text.
            `[n]`.
    """

    tokens: Sequence[int]
    parents: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents):
            raise InvalidInput(f"a draft needs a parent a token, got {len(self.tokens)} and {len(self.parents)}")
        for i, parent in enumerate(self.parents):
            if not TEXT <= parent < i:
                raise InvalidInput(f"parent of token {i} of a draft must be from {TEXT} to {i - 1}, got {parent}")

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> "DraftTree":
        """Tokens that follow one another."""
        return cls(list(tokens), list(range(TEXT, len(tokens) - 1)))

    def depths(self) -> list[int]:
        """How many tokens lead to each, itself included. `[n]`."""
        depth: list[int] = []
        for parent in self.parents:
            depth.append(1 if parent == TEXT else depth[parent] + 1)
        return depth

    def chosen(self, keep: Sequence[bool]) -> "DraftTree":
        """The tokens for which `keep [n]` holds, and with them all that leads there does."""
        place = {TEXT: TEXT}
        tokens: list[int] = []
        parents: list[int] = []
        for i, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if keep[i] and parent in place:
                place[i] = len(tokens)
                tokens.append(token)
                parents.append(place[parent])
        return DraftTree(tokens, parents)


NO_DRAFT = DraftTree((), ())


class Drafter(ABC):
    """Guesses how texts go on.

    It serves any number of searches at once, so what it remembers may only make its guesses better or worse: texts do
    not depend on it.

    Attributes:
        top_k: How many of the model's most likely tokens `observe` wants to see after each drafted token.
    """

    top_k: int = 0

    @abstractmethod
    def propose(self, tokens: Int32Array) -> DraftTree:
        """Guesses what follows a text.

        Args:
            tokens: The text, prompt included, `[n]`.
        """

    def observe(self, tokens: Int64Array, top_ids: Int64Array) -> None:
        """Is shown what the model finds likely after some tokens, if `top_k` is above 0.

        Args:
            tokens: The last token of each text, `[n]`.
            top_ids: The model's `top_k` most likely next tokens, best first, `[n, top_k]`.
        """
        return None

    def finish(self, tokens: Int32Array, begin: int) -> None:
        """Is shown a text of which an `extend` wrote the tokens from `begin` on."""
        return None


def check_drafter(drafter: object) -> None:
    """Raises InvalidInput unless `drafter` is a `Drafter`, or None."""
    if drafter is not None and not isinstance(drafter, Drafter):
        raise InvalidInput(f"drafter must be a Drafter such as PromptLookup(), or None, got {shown(drafter)}")


async def speculative_extend(
    branches: Sequence[Branch],
    sampling: Sampling | Sequence[Sampling],
    *,
    drafter: Drafter,
    max_tokens: int | Sequence[int] | Int64Array,
    eos_token_ids: frozenset[int] = frozenset(),
    stop: Stop | None = None,
    processors: Sequence[Processor] = (),
    pad_token_id: int = 0,
    unfinished: Sequence[int] | None = None,
    payoff: Payoff | None = None,
    counters: Counters | None = None,
) -> Extension:
    """What `extend` does, in fewer forward passes where `drafter` guesses well.

    Where it does not, or where slots are too short for drafts, tokens are sampled as `extend` samples them.

    Args:
        branches: See `extend`, as for all that is not named here.
        sampling: Likewise.
        drafter: Guesses how texts go on.
        max_tokens: See `extend`.
        eos_token_ids: Likewise.
        stop: Likewise.
        processors: Likewise. They see no text but those that plain decoding would show them.
        pad_token_id: Likewise.
        unfinished: Likewise.
        payoff: What is known of costs and gains; decides how much is drafted. Default: nothing is known.
        counters: Where drafts are counted.
    """
    request = extend(
        branches,
        sampling,
        max_tokens=max_tokens,
        eos_token_ids=eos_token_ids,
        stop=stop,
        processors=processors,
        pad_token_id=pad_token_id,
        unfinished=unfinished,
    )
    run = _Run(request, drafter, Payoff() if payoff is None else payoff, Counters() if counters is None else counters)
    while run.progress.open.any():
        await run.step()
    for branch, begin in zip(request.branches, run.progress.begin.tolist(), strict=True):
        drafter.finish(branch.tokens, begin)
    return run.progress.answer()


class _Run:
    """One `speculative_extend` under way."""

    def __init__(self, request: Extend, drafter: Drafter, payoff: Payoff, counters: Counters) -> None:
        self.request, self.drafter, self.payoff, self.counters = request, drafter, payoff, counters
        self.progress = Progress(request)
        self._warm = False  # whether the texts so far have been computed
        self._roomy = True  # whether there are slots for drafts

    async def step(self) -> None:
        """One pass that verifies drafts, or some plain ones."""
        rows = np.flatnonzero(self.progress.open)
        payoff = self.payoff
        payoff.begin(len(rows))
        drafts = self._drafts(rows) if self._roomy and payoff.tries() else []
        if any(map(len, drafts)):
            try:
                await self._verify(rows, drafts)
            except OutOfMemory:  # what `extend` can do must be done all the same
                self._roomy = False
        else:
            await self._plain(rows, payoff.stretch if self._roomy else MAX_TOKEN_ID)
        self._warm = True

    def _drafts(self, rows: Int64Array) -> list[DraftTree]:
        """A draft for each of `rows`, as long as it pays and may be accepted."""
        drafts = []
        for i in rows.tolist():
            draft = self.drafter.propose(self.request.branches[i].tokens)
            room = int(self.request.max_tokens[i] - self.progress.num_tokens[i]) - 1  # another token is sampled anyway
            ends = self.request.eos_token_ids
            fits = [d <= room and t not in ends for d, t in zip(draft.depths(), draft.tokens, strict=True)]
            drafts.append(draft if all(fits) else draft.chosen(fits))
        kept = self.payoff.choose([draft.parents for draft in drafts])
        return [draft.chosen(keep.tolist()) for draft, keep in zip(drafts, kept, strict=True)]

    async def _plain(self, rows: Int64Array, count: int) -> None:
        """At most `count` tokens for each of `rows`, by `extend`."""
        progress, request = self.progress, self.request
        some = [request.branches[i] for i in rows]
        before = [branch.length for branch in some]
        done = await extend(
            some,
            [progress.sampling[i] for i in rows],
            max_tokens=np.minimum(request.max_tokens[rows] - progress.num_tokens[rows], count),
            eos_token_ids=request.eos_token_ids,
            stop=request.stop,
            processors=request.processors,
            pad_token_id=request.pad_token_id,
            unfinished=None if request.stop is None else [len(progress.shown[i]) for i in rows],
        )
        for i, branch, begin, reason in zip(rows.tolist(), some, before, done.reason, strict=True):
            if request.stop is not None:
                progress.shown[i] += branch.tokens[begin:].tolist()
            progress.reason[i] = reason
        progress.num_tokens[rows] += done.num_tokens
        progress.log_prob[rows] += done.log_prob
        goes_on = np.array([reason == "length" for reason in done.reason])
        progress.open[rows] = goes_on & (progress.num_tokens[rows] < request.max_tokens[rows])
        self.payoff.plain(int(done.num_tokens.max()), measured=self._warm)

    async def _verify(self, rows: Int64Array, drafts: Sequence[DraftTree]) -> None:
        """A pass over drafts of `rows`; what is accepted becomes part of the branches, with one more token each."""
        before = int(self.progress.num_tokens.sum())
        written = [_Written(self.request.branches[i], draft) for i, draft in zip(rows, drafts, strict=True)]
        try:
            walks = [_Walk(i, one) for i, one in zip(rows.tolist(), written, strict=True)]
            first = 0
            for walk in walks:
                walk.first_row, first = first, first + len(walk.written.row)
            if self.request.processors:
                await self._walk_processed(walks)
            else:
                await self._walk(walks)
        finally:
            for one in written:
                one.drop()
        if more := {walk.written.branch: walk.token for walk in walks if walk.token is not None}:
            append(list(more), list(more.values()))
        self.counters.sampled_tokens += int(self.progress.num_tokens.sum()) - before
        self.counters.drafts += sum(len(draft) > 0 for draft in drafts)
        self.counters.drafted_tokens += sum(map(len, drafts))
        self.counters.accepted_tokens += sum(len(walk.accepted) for walk in walks)
        self.payoff.verified([walk.accepted for walk in walks], measured=self._warm)

    async def _walk(self, walks: Sequence["_Walk"]) -> None:
        """Samples after every token at once."""
        forks, since = _places(walks)
        request = TokenRequest(sample=self._keyed(walks), top_k=self.drafter.top_k)
        scores = (await score_tokens(forks, request, since=since, checked=False)).scores
        self._observe(walks, scores.top_ids if self.drafter.top_k else None)
        tokens, log_probs = Download(torch.stack([scores.token, scores.log_prob.double()])).read().tolist()
        for walk in walks:
            while walk.goes_on:
                row = walk.row
                token = tokens[row] if np.isfinite(log_probs[row]) else 0
                walk.take(self.progress, int(token), log_probs[row])
            walk.settle()

    async def _walk_processed(self, walks: Sequence["_Walk"]) -> None:
        """Samples level by level, after accepted tokens alone: processors see what plain decoding shows them."""
        forks, since = _places(walks)
        logits = await next_logits(forks, since=since, checked=False)
        self._observe(walks, logits.topk(self.drafter.top_k).indices if self.drafter.top_k else None)
        while going := [walk for walk in walks if walk.goes_on]:
            branches = [walk.written.branch for walk in going]
            sample = KeyedSampling(
                [self.progress.sampling[walk.i] for walk in going],
                seed=np.array([branch.key for branch in branches], np.uint64),
                position=np.array([branch.length for branch in branches]),
            )
            at = torch.tensor([walk.row for walk in going], device=logits.device)
            found = sample_processed(self.request.processors, branches, logits[at], sample, self.request.pad_token_id)
            tokens, log_probs = Download(torch.stack([found[0], found[1].double()])).read().tolist()
            for walk, token, log_prob in zip(going, tokens, log_probs, strict=True):
                walk.take(self.progress, int(token) if np.isfinite(log_prob) else 0, log_prob)
                walk.settle()

    def _keyed(self, walks: Sequence["_Walk"]) -> KeyedSampling:
        """How the token after every row is sampled: as plain decoding would, once it is there."""
        count = [len(walk.written.row) for walk in walks]
        return KeyedSampling(
            [self.progress.sampling[walk.i] for walk, n in zip(walks, count, strict=True) for _ in range(n)],
            seed=np.repeat(np.array([walk.written.branch.key for walk in walks], np.uint64), count),
            position=np.concatenate([walk.written.position for walk in walks]),
        )

    def _observe(self, walks: Sequence["_Walk"], top_ids: Tensor | None) -> None:
        if top_ids is not None:
            tokens = np.concatenate([walk.written.token for walk in walks])
            self.drafter.observe(tokens, top_ids.cpu().numpy())


class _Written:
    """A draft on forks of a branch, each stretch without a branching on one of its own.

    Rows are those of `score_tokens(forks, …, since=since)`: after the text, and after each drafted token.

    Attributes:
        branch: What it continues.
        forks: Where the draft stands; the branch itself if it is empty.
        since: Position of the first row of each fork.
        row: Of the text (`TEXT`) and of each drafted token the row after it.
        position: Of the token after each row. int64 `[R]`.
        token: The last token before it. int64 `[R]`.
    """

    def __init__(self, branch: Branch, draft: DraftTree) -> None:
        self.branch, self.draft = branch, draft
        tree, begin, depth = branch.tree, branch.length, [0, *draft.depths()]  # depth[j + 1] is that of token j
        self.forks: list[Branch] = []
        self.since: list[int] = []
        self.row = {TEXT: 0}
        self.child: list[dict[int, int]] = [{} for _ in range(len(draft) + 1)]  # after token j: place j + 1
        self.fork_of: dict[int, Branch] = {}
        first: list[list[int]] = [[] for _ in range(len(draft) + 1)]
        for j, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
            if token not in self.child[parent + 1]:  # the second of two equal ones is never reached
                self.child[parent + 1][token] = j
                first[parent + 1].append(j)
        position, tokens = [begin], [int(branch.tokens[-1])]
        self.length = {TEXT: begin}
        begins = [(TEXT, j) for j in reversed(first[0])]
        while begins:
            parent, j = begins.pop()
            stretch = [j]
            while after := first[stretch[-1] + 1]:
                begins += [(stretch[-1], other) for other in reversed(after[1:])]
                stretch.append(after[0])
            at = begin + depth[parent + 1]
            (fork,) = tree.fork(self.fork_of.get(parent, branch), 1, counted=False)
            if parent != TEXT:
                fork.rewind(at)
            fork.append([draft.tokens[k] for k in stretch])
            self.since.append(at if self.forks else begin - 1)
            self.forks.append(fork)
            for k, j in enumerate(stretch):
                self.row[j], self.fork_of[j], self.length[j] = len(position), fork, at + k + 1
                position.append(at + k + 1)
                tokens.append(draft.tokens[j])
        if not self.forks:
            self.forks, self.since = [branch], [begin - 1]
        self.position, self.token = np.array(position), np.array(tokens)

    def drop(self) -> None:
        """Ends all forks."""
        self.branch.tree.drop([fork for fork in self.forks if fork is not self.branch])


class _Walk:
    """The way of branch `i` down a draft, as its tokens are sampled.

    Attributes:
        accepted: Drafted tokens that were sampled.
        token: One more that was sampled and becomes part of the branch, if any.
        goes_on: Whether another is to be sampled.
        first_row: Number of the row after the text.
    """

    def __init__(self, i: int, written: _Written) -> None:
        self.i, self.written = i, written
        self.accepted: list[int] = []
        self.token: int | None = None
        self.goes_on = True
        self.first_row = 0

    @property
    def _at(self) -> int:
        return self.accepted[-1] if self.accepted else TEXT

    @property
    def row(self) -> int:
        """That of the next token."""
        return self.first_row + self.written.row[self._at]

    def take(self, progress: Progress, token: int, log_prob: float) -> None:
        """Records a sampled token."""
        progress.count(np.array([self.i]))
        self.goes_on = False
        if progress.take(self.i, token, log_prob):
            drafted = self.written.child[self._at + 1].get(token)
            if drafted is None:
                self.token = token
            else:
                self.accepted.append(drafted)
                self.goes_on = bool(progress.open[self.i])

    def settle(self) -> None:
        """Makes what is accepted part of the branch."""
        written = self.written
        if self._at != TEXT and written.branch.length < written.length[self._at]:
            written.branch.tree.follow(written.branch, written.fork_of[self._at], written.length[self._at])


def _places(walks: Sequence[_Walk]) -> tuple[list[Branch], list[int]]:
    """Branches whose rows are asked for, and the positions from which on."""
    forks = [fork for walk in walks for fork in walk.written.forks]
    return forks, [since for walk in walks for since in walk.written.since]
