"""Log-probs of given texts, token by token. No logits are held, and what texts share is computed once.

The texts are the paths of a trie. Sorted, they are a walk through it: what a text does not share with the one before
it is new, and everything it hangs off lies earlier in the walk. So any stretch of new tokens is one forward pass,
wherever it is cut; it takes slots for itself and for one path, and nothing is computed twice, however few there are.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from forktree.checks import integer, shown
from forktree.decoder import Decoder
from forktree.device.transfer import Download, upload
from forktree.engine.worker import ModelWorker
from forktree.errors import InvalidInput, NonFinite, OutOfMemory
from forktree.kv import Branch, Chunk, OutOfSlots, Tree
from forktree.model import ModelSpec, Runner, attached
from forktree.ops.token_request import RaggedIds, TokenRequest
from forktree.plan.layout import ranges
from forktree.prompts import unpadded

Ints = NDArray[np.int64]
LogProbs = NDArray[np.float64]
T = TypeVar("T")


def sequence_logprobs(
    model: Any,
    sequences: Sequence[ArrayLike] | Mapping[str, Any],
    *,
    prompt_lengths: Sequence[int] | None = None,
    num_slots: int | None = None,
    max_batch_tokens: int = 512,
) -> list[LogProbs]:
    """Log-prob of each token of each sequence, given all tokens before it: natural logs of the model's own
    probabilities, as they are.

    Beginnings that sequences share are computed once: many answers to one question cost the question once. A last token
    is never computed, as nothing stands behind it.

    Args:
        model: a causal language model as `Decoder` takes it, which is proved if it is not as it was at the last call;
            or a `Decoder`, whose model and slots are used. Its kept prefixes, then its running searches, give way where
            slots are short.
        sequences: token ids of each, 1-D, at least one; or what a tokenizer returns for several texts, its padding left
            out.
        prompt_lengths: how many tokens of each sequence are given, at least 1; default: 1, as nothing stands before
            the first.
        num_slots: tokens whose KV fits at once, at least those of the longest sequence but its last. Default: that and
            `max_batch_tokens`. Not with a `Decoder`.
        max_batch_tokens: most tokens of one forward pass.

    Returns: fp64 `[length - prompt_length]` for each sequence; computed in fp32 (fp64 by a model in fp64).
    Raises: `InvalidInput` and `OutOfMemory` before anything runs, `DecoderInUse` as `Decoder.search_iter` does,
        `NonFinite` naming sequence and token.
    """
    found: dict[int, LogProbs] = {}
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
) -> Iterator[tuple[int, LogProbs | NonFinite]]:
    """`sequence_logprobs` one by one, with their numbers, as they become known; a sequence of which a log-prob is no
    number gives an error in its place. The other errors are raised at the call."""
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
        worker = model.worker
    else:
        worker = ModelWorker(
            model, num_slots=num_slots or max(1, min(longest + max_batch_tokens, walk.num_rows)), spec=spec
        )
    slots = worker.tree.slots
    if longest > slots.num_slots:
        raise OutOfMemory(
            f"sequence {needed.index(longest)} needs {longest} KV slots, even alone: {slots.num_free} are free of "
            f"{slots.num_slots}; raise num_slots ({worker.runner.bytes_per_slot} bytes each)"
        )
    answers = _answers(worker, walk, max_batch_tokens)
    return _scored(walk, model.engine.interleave(answers) if own else answers)


# ---------------------------------------------------------------- the walk


class _Piece(NamedTuple):
    """What a text does not share with the one before it."""

    begin: int  # position of the first of its tokens
    tokens: Ints  # not empty


@dataclass(frozen=True)
class _Walk:
    """Distinct tokens to compute, row by row, and what is wanted behind each row.

    Targets are sorted by row. Their places are those in all log-probs wanted, sequence by sequence: sequence i has
    `offset[i] : offset[i + 1]`, from its token `first[i]` on, and all of them are known once the rows below `last[i]`
    are.
    """

    pieces: list[_Piece]
    num_rows: int
    row: Ints  # [N]
    target: Ints  # [N]
    place: Ints  # [N]
    offset: Ints  # [sequences + 1]
    first: list[int]  # [sequences]
    last: Ints  # [sequences]

    @classmethod
    def through(cls, texts: list[Ints], prompt_lengths: list[int]) -> "_Walk":
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


def _tokens(i: int, given: ArrayLike, spec: ModelSpec) -> Ints:
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


def _prompt_lengths(given: Sequence[int] | None, texts: list[Ints]) -> list[int]:
    if given is None:
        return [1] * len(texts)
    if len(given) != len(texts):
        raise InvalidInput(f"prompt_lengths must be one for each of {len(texts)} sequences, got {len(given)}")
    return [
        integer(f"prompt length of sequence {i}", length, 1, len(text))
        for i, (length, text) in enumerate(zip(given, texts, strict=True))
    ]


# ---------------------------------------------------------------- the passes


def _scored(walk: _Walk, answers: Iterator[tuple[slice, int, Download]]) -> Iterator[tuple[int, LogProbs | NonFinite]]:
    log_probs = np.zeros(len(walk.row))
    order = np.argsort(walk.last, kind="stable")
    ends, known = walk.last[order], 0
    for part, stop, arriving in _one_behind(answers):
        log_probs[walk.place[part]] = arriving.read()
        complete = int(np.searchsorted(ends, stop, side="right"))
        for i in order[known:complete].tolist():
            yield i, _result(i, walk, log_probs)
        known = complete
    for i in order[known:].tolist():  # of which nothing was wanted
        yield i, _result(i, walk, log_probs)


def _result(i: int, walk: _Walk, log_probs: LogProbs) -> LogProbs | NonFinite:
    own = log_probs[walk.offset[i] : walk.offset[i + 1]]
    wrong = np.flatnonzero(np.isnan(own))
    if not len(wrong):
        return own.copy()
    return NonFinite(
        f"logits of token {walk.first[i] + wrong[0]} of sequence {i} must be finite, got NaN or infinity: the model "
        "overflows at this dtype, or its weights are damaged"
    )


def _answers(
    worker: ModelWorker, walk: _Walk, max_batch_tokens: int
) -> Generator[tuple[slice, int, Download], None, None]:
    """Log-probs of a slice of the walk's targets, which are all there are below some row, as they are launched."""
    for first, hidden, at in _passes(worker, walk.pieces, max_batch_tokens):
        stop = first + len(at)
        part = slice(*np.searchsorted(walk.row, [first, stop]).tolist())
        row, of, count = np.unique(walk.row[part] - first, return_inverse=True, return_counts=True)
        if not len(row):
            continue
        numbers = (at[row], np.concatenate([[0], np.cumsum(count)]), walk.target[part], of)
        there = upload(np.concatenate(numbers), hidden.device).split([len(x) for x in numbers])
        yield part, stop, Download(_log_probs(worker.runner, hidden, *there))


@torch.no_grad()
def _log_probs(runner: Runner, hidden: Tensor, at: Tensor, indptr: Tensor, targets: Tensor, of: Tensor) -> Tensor:
    """`[S]`: of `targets [S]`, which follow the rows `at` of hidden as `indptr` says, `of [S]` for short. NaN where
    logits are not finite."""
    scores = runner.score(hidden[at], TokenRequest(select=RaggedIds(indptr, targets), lse=True))
    return scores.selected_log_probs.masked_fill(~scores.lse.isfinite()[of], torch.nan)


def _passes(worker: ModelWorker, pieces: list[_Piece], max_batch_tokens: int) -> Iterator[tuple[int, Tensor, Ints]]:
    """Computes the walk. Of each pass: its first row of the walk, its hidden states `[T, H]`, and where among these
    that row and those behind it are, `[T]`. Between passes one branch is kept: the path to where the walk has come."""
    tree = worker.tree
    row, branch = 0, None
    rows: dict[Branch, int] = {}  # branches of the pass, the first new row of each
    try:
        for stretch in _stretches(pieces, max_batch_tokens, tree.slots.num_slots):
            first, former, rows = row, branch, {}
            for begin, tokens in stretch:
                branch = _reach(tree, branch, begin, tokens)
                rows.setdefault(branch, row)
                row += len(tokens)
            if former is not None and former not in rows:
                former.drop()
            hidden, at = _compute(worker, rows, first, row - first)
            tree.drop(b for b in rows if b is not branch)
            yield first, hidden, at
    finally:
        tree.drop(rows)


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


def _reach(tree: Tree, branch: Branch | None, begin: int, tokens: Ints) -> Branch:
    """A branch with `tokens` behind the first `begin` of `branch`, which grows itself if those are all it has."""
    if branch is None or begin == 0:
        return tree.root(tokens)
    if begin < branch.length:
        branch = branch.fork(1)[0]
        branch.rewind(begin)
    branch.append(tokens)
    return branch


def _compute(worker: ModelWorker, rows: dict[Branch, int], first: int, count: int) -> tuple[Tensor, Ints]:
    """One forward pass over the `count` pending tokens of branches, whose first rows are `rows`; see `_passes`."""
    tree, branches = worker.tree, list(rows)
    chunks = tree.pending(branches)
    _reserve(worker, chunks, branches)
    hidden = worker.forward(chunks)
    nodes, _ = tree.tips(branches)
    row_of = dict(zip(nodes.tolist(), rows.values(), strict=True))
    row = ranges(np.array([row_of[c.node] for c in chunks]), np.array([c.stop - c.begin for c in chunks]))
    assert len(row) == count, "more than the walk's next tokens was pending"
    return hidden, np.argsort(row - first)


def _reserve(worker: ModelWorker, chunks: list[Chunk], branches: list[Branch]) -> None:
    """Slots for the chunks: kept prefixes give way first, then whatever the branches do not see."""
    while True:
        try:
            return worker.tree.reserve(chunks)
        except OutOfSlots as out:
            if not (worker.prefixes.evict() or worker.tree.evict(worker.tree.view(branches), out.needed - out.free)):
                raise


def _one_behind(items: Iterator[T]) -> Iterator[T]:
    """Each item once the one behind it is there: read, while the device has something to do."""
    before = next(items, None)
    while before is not None:
        behind = next(items, None)
        yield before
        before = behind
