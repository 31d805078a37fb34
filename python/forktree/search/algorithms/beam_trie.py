"""Wide beams over a catalogue: beam search whose every text is an entry of a trie."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forktree.device.transfer import Download
from forktree.errors import InvalidInput, NonFinite
from forktree.kv import Branch, append, reassign
from forktree.ops.token_request import RaggedIds, TokenRequest
from forktree.search.base import Hypothesis
from forktree.search.context import SearchContext
from forktree.search.processors import Processor, left_padded, process
from forktree.search.request import next_logits, score_tokens
from forktree.search.selection import best_first
from forktree.search.trace import PROMPT
from forktree.search.trie import ROOT, TokenTrie
from forktree.types import Float64Array, Int64Array


@dataclass(frozen=True)
class TrieRules:
    """How beams are kept.

    Args:
        num_beams: k, maximum number of texts kept at every token.
        length_penalty: the exponent on the length by which a finished text's score is divided.
        early_stopping: whether to end with k finished texts; otherwise when no running one can do better.
        legal: whether log-probs are those of the model given that the token is legal, or the model's own.
    """

    num_beams: int
    length_penalty: float
    early_stopping: bool
    legal: bool


@dataclass
class _Beams:
    """What runs, `[b]` each, best first. tokens: `[b, d]`."""

    branches: list[Branch]
    trie_node: Int64Array
    tokens: Int64Array
    score: Float64Array
    node: Int64Array  # of the trace


@dataclass
class _Finished:
    """The best entries found."""

    score: Float64Array
    log_prob: Float64Array
    tokens: list[Int64Array]
    node: Int64Array


def segment_log_softmax(logits: Tensor, indptr: Tensor, row: Tensor) -> Tensor:
    """Log-softmax within segments. logits `[E]`, indptr `[n + 1]`, row: the segment of each, `[E]`. -inf stays."""
    highest = torch.segment_reduce(logits, "max", offsets=indptr, unsafe=True)
    shifted = logits - highest[row]
    mass = torch.segment_reduce(shifted.exp(), "sum", offsets=indptr, unsafe=True)
    return torch.where(logits == -torch.inf, logits, shifted - mass.log()[row])


async def trie_beam_search(
    context: SearchContext, trie: TokenTrie, rules: TrieRules, processors: Sequence[Processor] = ()
) -> list[Hypothesis]:
    """The best entries of a trie, best first, at most k.

    Each step takes the best continuations of all beams together. Beams have no children but legal ones, so that there
    are fewer than k beams where there are fewer legal texts, and no beam is ever illegal. Only the logits of children
    are computed, unless processors need whole rows. With k at least the number of nodes of every level, the search is
    exhaustive.

    Args:
        context: of the search.
        trie: the catalogue.
        rules: how beams are kept.
        processors: change the log-probs of all tokens, before illegal ones are left out.

    Raises:
        InvalidInput: a token is not in the vocabulary, an entry is longer than `max_new_tokens`, or processors leave
            nothing.
        NonFinite: the model gives NaN or infinity.
    """
    trie.check(context.vocab_size)
    if trie.depth > context.max_new_tokens:
        raise InvalidInput(f"max_new_tokens must be at least {trie.depth}, got {context.max_new_tokens}: {trie}")
    beams = _Beams(
        context.root.fork(1), np.array([ROOT]), np.zeros((1, 0), np.int64), np.zeros(1), np.array([PROMPT])
    )
    finished = _Finished(np.zeros(0), np.zeros(0), [], np.zeros(0, np.int64))
    for length in range(1, trie.depth + 1):
        found, origin, token, child = await _step(beams, context, trie, rules, processors)
        over = trie.leaf[child]
        _finish(finished, beams, found[over], origin[over], token[over], length, rules, context)
        chosen = np.flatnonzero(~over)[: int(min(rules.num_beams, context.budget.tokens_left))]
        if not len(chosen) or not _may_improve(finished, float(found[chosen[0]]), length, trie.depth, rules):
            break
        context.counters.sampled_tokens += len(chosen)
        origin = origin[chosen]
        branches = reassign(beams.branches, origin)
        append(branches, token[chosen])
        context.trace.select(beams.node, origin, why="beam")
        node = context.trace.grow(beams.node[origin], list(token[chosen][:, None]), scores=found[chosen])
        tokens = np.concatenate([beams.tokens[origin], token[chosen][:, None]], axis=1)
        beams = _Beams(branches, child[chosen], tokens, found[chosen], node)
    if not len(finished.score):
        if context.budget.tokens_left == 0:
            raise InvalidInput(f"max_model_tokens must be enough for an entry, got {context.budget.max_model_tokens}")
        raise InvalidInput(f"logits processors leave no entry of {trie}")
    context.trace.record("return", nodes=finished.node, scores=finished.score)
    return [_hypothesis(finished, i, context) for i in range(len(finished.score))]


async def _step(
    beams: _Beams, context: SearchContext, trie: TokenTrie, rules: TrieRules, processors: Sequence[Processor]
) -> tuple[Float64Array, Int64Array, Int64Array, Int64Array]:
    """The k best continuations that end and the k best that do not, best first: scores, beams, tokens, trie nodes."""
    device = context.device
    on_device = trie.on(device)
    total = int((trie.indptr[beams.trie_node + 1] - trie.indptr[beams.trie_node]).sum())
    at = torch.from_numpy(beams.trie_node).to(device)
    indptr, row, child = on_device.children(at, total)
    ids = on_device.token[child - 1]
    if processors:
        logits = await next_logits(beams.branches)
        rows = left_padded(beams.branches, context.pad_token_id, device)
        values = process(processors, beams.branches, rows, logits.log_softmax(dim=-1))[row, ids]
    else:
        request = TokenRequest(select=RaggedIds(indptr, ids), lse=not rules.legal)
        scores = await score_tokens(beams.branches, request, checked=False)
        values = scores.selected_logits if rules.legal else scores.selected_log_probs
    if rules.legal:
        values = segment_log_softmax(values, indptr, row)
    value = values.double() + torch.from_numpy(beams.score).to(device)[row]
    leaf, k = on_device.leaf[child], min(rules.num_beams, total)
    best = torch.cat([value.masked_fill(leaf == ends, -torch.inf).topk(k).indices for ends in (False, True)])
    wrong = value.isnan()
    first = torch.where(wrong.any(), row[wrong.int().argmax()], -1)  # a beam whose logits are no numbers
    parts = [value[best], row[best], ids[best], child[best], leaf[best], first.expand(len(best))]
    found, origin, token, node, ended, bad = Download(torch.stack([part.double() for part in parts])).read()
    if bad[0] >= 0:
        if processors:
            raise InvalidInput("logits processors must give finite scores, or -inf for what is banned; got NaN or +inf")
        raise NonFinite.of("logits", int(bad[0]), beams.branches[0].length)
    wanted = np.repeat([True, False], k)  # the first k are leaves, the others are not
    there = np.flatnonzero((found > -np.inf) & ((ended > 0) == wanted))
    there = there[best_first(found[there])]
    return found[there], *(column[there].astype(np.int64) for column in (origin, token, node))


def _finish(
    finished: _Finished,
    beams: _Beams,
    log_prob: Float64Array,
    origin: Int64Array,
    token: Int64Array,
    length: int,
    rules: TrieRules,
    context: SearchContext,
) -> None:
    """Adds entries that ended at this length; the best k stay."""
    if not len(log_prob):
        return
    ends = ["eos" if t in context.eos_token_ids else "stop" for t in token.tolist()]
    new = [t[:0] if end == "eos" else t for t, end in zip(token[:, None], ends, strict=True)]
    node = context.trace.grow(beams.node[origin], new, scores=log_prob, ends=ends)
    score = np.concatenate([finished.score, log_prob / length**rules.length_penalty])
    order = best_first(score)[: rules.num_beams]
    log_probs, nodes = np.concatenate([finished.log_prob, log_prob]), np.concatenate([finished.node, node])
    tokens = [*finished.tokens, *np.concatenate([beams.tokens[origin], token[:, None]], axis=1)]
    finished.score, finished.log_prob, finished.node = score[order], log_probs[order], nodes[order]
    finished.tokens = [tokens[i] for i in order]


def _may_improve(finished: _Finished, best: float, length: int, depth: int, rules: TrieRules) -> bool:
    """Whether a running text, the best of which has this sum of log-probs, may still be among the k best."""
    if len(finished.score) < rules.num_beams:
        return True
    reach = depth if rules.length_penalty > 0 else length + 1
    return not rules.early_stopping and best / reach**rules.length_penalty > finished.score[-1]


def _hypothesis(finished: _Finished, i: int, context: SearchContext) -> Hypothesis:
    tokens = finished.tokens[i].astype(np.int32)
    ended = int(tokens[-1]) in context.eos_token_ids
    return Hypothesis(
        token_ids=tokens[:-1] if ended else tokens,
        score=float(finished.score[i]),
        log_prob=float(finished.log_prob[i]),
        finish_reason="eos" if ended else "stop",
    )
