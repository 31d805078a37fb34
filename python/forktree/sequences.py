"""Log-probs of given texts, token by token. No logits are held, and what texts share is computed once.

The texts are the paths of a trie. Sorted, they are a walk through it: what a text does not share with the one before
it is new, and everything it hangs off lies earlier in the walk. So any stretch of new tokens is one forward pass,
wherever it is cut; it takes slots for itself and for one path, and nothing is computed twice, however few there are.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from forktree.checks import integer, shown
from forktree.decoder import Decoder
from forktree.device.transfer import Download, upload
from forktree.engine.engine import Engine
from forktree.engine.task import Task
from forktree.engine.worker import ModelWorker
from forktree.errors import InvalidInput, NonFinite, OutOfMemory
from forktree.kv import Branch, Tree
from forktree.model.attached import attached
from forktree.model.model_spec import ModelSpec
from forktree.ops.token_request import RaggedIds, TokenRequest
from forktree.plan.layout import ranges
from forktree.prompts import unpadded
from forktree.search.request import score_tokens
from forktree.types import Float64Array, Int64Array


def sequence_logprobs(
    model: Any,
    sequences: Sequence[ArrayLike] | Mapping[str, Any],
    *,
    prompt_lengths: Sequence[int] | None = None,
    num_slots: int | None = None,
    max_batch_tokens: int = 512,
) -> list[Float64Array]:
    """Log-prob of each token of each sequence, given all tokens before it.

    These are natural logs of the model's own probabilities, as they are.
    Beginnings that sequences share are computed once: many answers to one question cost the question once. A last token
    is never computed, as nothing follows it.

    Args:
        model: a causal language model as `Decoder` takes it, which is verified if it is not as it was at the last call;
            or a `Decoder`, whose model and slots are used. Where slots are short, its kept prefixes give way first,
            and then this call waits for searches that are older.
        sequences: token ids of each, 1-D, at least one; or what a tokenizer returns for several texts, its padding left
            out.
        prompt_lengths: how many tokens of each sequence are given, at least 1; default: 1, as nothing comes
            before the first.
        num_slots: tokens whose KV fits at once, at least those of the longest sequence but its last. Default: that and
            `max_batch_tokens`. Not with a `Decoder`.
        max_batch_tokens: maximum number of tokens of one forward pass.

    Returns:
        fp64 `[length - prompt_length]` for each sequence; computed in fp32 (fp64 by a model in fp64).

    Raises:
        InvalidInput: before anything runs.
        OutOfMemory: before anything runs, if `num_slots` are too few for the longest sequence.
        DecoderInUse: as `Decoder.search_iter` does.
        NonFinite: names sequence and token.
    """
    found: dict[int, Float64Array] = {}
    for i, log_probs in scored_sequences(
        model, sequences, prompt_lengths=prompt_lengths, num_slots=num_slots, max_batch_tokens=max_batch_tokens
    ):
        if isinstance(log_probs, NonFinite):
            raise log_probs
        found[i] = log_probs
    return [found[i] for i in range(len(found))]


def scored_sequences(
    model: Any,
    sequences: Sequence[ArrayLike] | Mapping[str, Any],
    *,
    prompt_lengths: Sequence[int] | None = None,
    num_slots: int | None = None,
    max_batch_tokens: int = 512,
) -> Iterator[tuple[int, Float64Array | NonFinite]]:
    """`sequence_logprobs` one by one, with their numbers, as they become known.

    A sequence of which a log-prob is no number gives an error in its place. The other errors are raised at the call.
    """
    integer("max_batch_tokens", max_batch_tokens, 1)
    if num_slots is not None:
        integer("num_slots", num_slots, 1)
    own = isinstance(model, Decoder)
    if own and num_slots is not None:
        raise InvalidInput(
            f"num_slots belongs to the Decoder, which has {model.worker.runner.num_slots}: got {num_slots}"
        )
    if own:
        model.engine.renew()
    spec = model.worker.runner.spec if own else attached(model)
    if spec.head is None:
        raise InvalidInput(f"{spec.name}: expected a model with a language-model head, got none")
    rows = unpadded("sequences", sequences) if isinstance(sequences, Mapping) else sequences
    texts = [_tokens(i, tokens, spec) for i, tokens in enumerate(rows)]
    given = _prompt_lengths(prompt_lengths, texts)
    needed = [len(text) - 1 if length < len(text) else 0 for text, length in zip(texts, given, strict=True)]
    longest = max(needed, default=0)
    walk = _Walk.through(texts, given)
    if own:
        worker, engine = model.worker, model.engine
    else:
        slots = num_slots or max(1, min(longest + max_batch_tokens, walk.num_rows))
        worker = ModelWorker(model, num_slots=slots, spec=spec)
        engine = Engine(worker, max_batch_tokens=max_batch_tokens)
    if longest > (total := worker.tree.slots.num_slots):
        raise OutOfMemory(
            f"sequence {needed.index(longest)} needs {longest} KV slots, even alone: "
            f"{worker.tree.slots.num_free} are free of {total}; raise num_slots "
            f"({worker.runner.bytes_per_slot} bytes each)"
        )
    return _scored(engine, _Scoring(worker, walk, max_batch_tokens))


# ---------------------------------------------------------------- the walk


class _Piece(NamedTuple):
    """What a text does not share with the one before it."""

    begin: int  # position of the first of its tokens
    tokens: Int64Array  # not empty


@dataclass(frozen=True)
class _Walk:
    """Distinct tokens to compute, row by row, and what is wanted after each row.

    Targets are sorted by row. Their places are those in all log-probs wanted, sequence by sequence: sequence i has
    `offset[i] : offset[i + 1]`, from its token `first[i]` on, and all of them are known once the rows below `last[i]`
    are.
    """

    pieces: list[_Piece]
    num_rows: int
    row: Int64Array  # [N]
    target: Int64Array  # [N]
    place: Int64Array  # [N]
    offset: Int64Array  # [sequences + 1]
    first: list[int]  # [sequences]
    last: Int64Array  # [sequences]

    @classmethod
    def through(cls, texts: list[Int64Array], prompt_lengths: list[int]) -> "_Walk":
        paths = [
            text[:-1] if length < len(text) else text[:0] for text, length in zip(texts, prompt_lengths, strict=True)
        ]
        pieces: list[_Piece] = []
        wanted = [np.zeros(0, np.int64)] * len(texts)  # the row before each target
        num_rows, before, rows = 0, np.zeros(0, np.int64), np.zeros(0, np.int64)
        for i in sorted(range(len(paths)), key=lambda i: paths[i].astype(">u4").tobytes()):
            path = paths[i]
            most = min(len(before), len(path))
            differs = np.flatnonzero(before[:most] != path[:most])
            shared = int(differs[0]) if len(differs) else most
            if shared < len(path):
                pieces.append(_Piece(shared, path[shared:]))
            new = len(path) - shared
            rows = np.concatenate([rows[:shared], np.arange(num_rows, num_rows + new)])
            wanted[i] = rows[prompt_lengths[i] - 1 :].copy()
            num_rows, before = num_rows + new, path
        row = np.concatenate([np.zeros(0, np.int64), *wanted])
        target = np.concatenate([np.zeros(0, np.int64), *(t[n:] for t, n in zip(texts, prompt_lengths, strict=True))])
        place = np.argsort(row, kind="stable")
        return cls(
            pieces=pieces,
            num_rows=num_rows,
            row=row[place],
            target=target[place],
            place=place,
            offset=np.cumsum([0, *map(len, wanted)]),
            first=prompt_lengths,
            last=np.array([rows[-1] + 1 if len(rows) else 0 for rows in wanted], np.int64),
        )


def _tokens(i: int, given: ArrayLike, spec: ModelSpec) -> Int64Array:
    """Token ids of sequence `i`, which the model can score."""
    try:
        tokens = np.asarray(given)
    except (TypeError, ValueError, RuntimeError):  # ragged, or on a device
        tokens = np.asarray(None)
    if tokens.ndim == 1 and not tokens.size:
        raise InvalidInput(f"sequence {i} is empty: expected at least one token")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InvalidInput(f"sequence {i} must be 1-D token ids on the host, got {shown(given)}")
    bad = tokens[(tokens < 0) | (tokens >= spec.vocab_size)]
    if len(bad):
        raise InvalidInput(f"sequence {i} has token id {bad[0]}: expected ids in [0, {spec.vocab_size})")
    if len(tokens) - 1 > spec.max_position:
        raise InvalidInput(
            f"sequence {i} has {len(tokens)} tokens: all but the last must fit the model's {spec.max_position} "
            f"positions ({spec.max_position_note})"
        )
    return tokens.astype(np.int64)


def _prompt_lengths(given: Sequence[int] | None, texts: list[Int64Array]) -> list[int]:
    if given is None:
        return [1] * len(texts)
    if len(given) != len(texts):
        raise InvalidInput(f"prompt_lengths must be one for each of {len(texts)} sequences, got {len(given)}")
    return [
        integer(f"prompt length of sequence {i}", length, 1, len(text))
        for i, (length, text) in enumerate(zip(given, texts, strict=True))
    ]


# ---------------------------------------------------------------- the search


def _scored(engine: Engine, scoring: "_Scoring") -> Iterator[tuple[int, Float64Array | NonFinite]]:
    """Runs the search, as one of the engine's; gives what is complete after each step."""
    walk = scoring.walk
    log_probs = np.zeros(len(walk.row))
    order = np.argsort(walk.last, kind="stable")
    ends, known = walk.last[order], 0
    with engine.use() as run:
        task = engine.submit(scoring.search, [], run=run)
        while not task.done:
            engine.step()
            while scoring.found:
                part, stop, values = scoring.found.popleft()
                log_probs[walk.place[part]] = values
                complete = int(np.searchsorted(ends, stop, side="right"))
                for i in order[known:complete].tolist():
                    yield i, _result(i, walk, log_probs)
                known = complete
        if task.error is not None:
            raise task.error
    for i in order[known:].tolist():  # of which nothing was wanted
        yield i, _result(i, walk, log_probs)


def _result(i: int, walk: _Walk, log_probs: Float64Array) -> Float64Array | NonFinite:
    own = log_probs[walk.offset[i] : walk.offset[i + 1]]
    wrong = np.flatnonzero(np.isnan(own))
    if not len(wrong):
        return own.copy()
    return NonFinite(
        f"logits of token {walk.first[i] + wrong[0]} of sequence {i} must be finite, got NaN or infinity: the model "
        "overflows at this dtype, or its weights are damaged"
    )


class _Scoring:
    """A search that follows the walk, a request for as many new tokens as fit one pass after the other.

    Between two requests it holds one branch, the path to where the walk has come.

    `found` takes a slice of the walk's targets, the row before which all targets are known with it, and their
    log-probs: those of a pass once the next one is launched, so that the device is busy while they are read.
    """

    def __init__(self, worker: ModelWorker, walk: _Walk, max_batch_tokens: int) -> None:
        self.walk = walk
        self.found: deque[tuple[slice, int, Float64Array]] = deque()
        self._worker, self._max_batch_tokens = worker, max_batch_tokens

    async def search(self, task: Task) -> None:
        """The whole walk."""
        tree = self._worker.tree
        row, before = 0, None
        branch: Branch | None = None
        since: dict[Branch, int]  # position of the first new token of each branch of a request,
        first: dict[Branch, int]  # and its row
        for stretch in _stretches(self.walk.pieces, self._max_batch_tokens, tree.slots.num_slots):
            former, since, first = branch, {}, {}
            for begin, tokens in stretch:
                branch = _reach(tree, branch, begin, tokens, task.index)
                since.setdefault(branch, begin)
                first.setdefault(branch, row)
                row += len(tokens)
            if former is not None and former not in since:
                former.drop()
            asked = await self._ask([*since], np.array([*since.values()]), np.array([*first.values()]), row)
            tree.drop(b for b in since if b is not branch)
            if before is not None:
                self._tell(*before)
            before = asked
        if before is not None:
            self._tell(*before)

    async def _ask(
        self, branches: list[Branch], since: Int64Array, first: Int64Array, stop: int
    ) -> tuple[slice, int, Download]:
        """Log-probs of the targets of rows `first[0]` to `stop`.

        Each branch has those from position `since` and row `first` on.
        """
        walk, device = self.walk, self._worker.runner.device
        part = slice(*np.searchsorted(walk.row, [first[0], stop]).tolist())
        wanted = np.append(walk.row[part], stop)
        ends = np.append(first[1:], stop)
        begin = np.minimum(wanted[np.searchsorted(wanted, first)], ends - 1)  # rows before are of prompts
        row = ranges(begin, ends - begin)
        indptr = np.searchsorted(walk.row[part], np.append(row, stop))
        select = RaggedIds(upload(indptr, device), upload(walk.target[part], device))
        request = TokenRequest(select=select, lse=True)
        scores = (await score_tokens(branches, request, since=since + begin - first, checked=False)).scores
        of = upload(np.repeat(np.arange(len(row)), np.diff(indptr)), device)
        return part, stop, Download(scores.selected_log_probs.masked_fill(~scores.lse.isfinite()[of], torch.nan))

    def _tell(self, part: slice, stop: int, arriving: Download) -> None:
        self.found.append((part, stop, arriving.read()))


def _stretches(pieces: list[_Piece], max_batch_tokens: int, num_slots: int) -> Iterator[list[_Piece]]:
    """The pieces, cut into as many tokens as fit one pass beside the path they begin at."""
    stretch: list[_Piece] = []
    room = 0
    for begin, tokens in pieces:
        while len(tokens):
            if room == 0:
                if stretch:
                    yield stretch
                stretch, room = [], min(max_batch_tokens, num_slots - begin)
            stretch.append(_Piece(begin, tokens[:room]))
            count = len(stretch[-1].tokens)
            begin, tokens, room = begin + count, tokens[count:], room - count
    if stretch:
        yield stretch


def _reach(tree: Tree, branch: Branch | None, begin: int, tokens: Int64Array, owner: int) -> Branch:
    """A branch with `tokens` after the first `begin` of `branch`, which grows itself if those are all it has."""
    if branch is None or begin == 0:
        return tree.root(tokens, owner=owner)
    if begin < branch.length:
        branch = branch.fork(1)[0]
        branch.rewind(begin)
    branch.append(tokens)
    return branch
