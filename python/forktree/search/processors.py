"""Logits processors of transformers, in searches that fork.

A processor is called as transformers calls it: with `input_ids [n, L]`, int64, left-padded, and `scores [n, V]`, fp32.
It returns scores of that shape. It needs whole rows of logits, so this is the slow way: biases, penalties and sets of
allowed tokens that are known beforehand belong in `forktree.KeyedSampling`.

Every row is a branch. Branches are forked, dropped and resampled, and they stop at different times, so row i of one
call says nothing about row i of the next. A processor that keeps a state for every row, such as the place in a grammar,
has a method

    fork(parents, added)

that is called before each of its calls, with int64 tensors on the CPU. It keeps its states in a list or tensor. Row i
of the coming call continues from state `parents[i]`, or starts anew where that is -1; its newest `added[i]` tokens, the
last of `input_ids[i]`, are those that the state has not seen (a new one has seen none, not even the prompt's).
`parents` is longer than the number of rows if there are states that are not needed now but may be later, those of
branches that wait or of other searches: they come after the rows, unchanged. If tokens lead from state to state, write

    def fork(self, parents, added):
        self.states = [start if p < 0 else self.states[p] for p in parents.tolist()]
        self.added = added.tolist()

    def __call__(self, input_ids, scores):
        for i, n in enumerate(self.added):
            for token in input_ids[i, len(input_ids[i]) - n :].tolist():
                self.states[i] = step(self.states[i], token)
        return scores.masked_fill(forbidden(self.states[: len(scores)]), -torch.inf)

One object may serve any number of searches of one `Decoder` at once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forktree.errors import InvalidInput
from forktree.kv import Branch
from forktree.ops import score_logits
from forktree.ops.token_request import KeyedSampling, TokenRequest

Processor = Callable[[Tensor, Tensor], Tensor]

NO_TOKEN = np.inf  # the log-prob of a row that processors leave no token

_STATES = "_forktree_states"  # attribute of a processor that has `fork`: the tag of each state's text, int64


def process(processors: Sequence[Processor], branches: Sequence[Branch], input_ids: Tensor, scores: Tensor) -> Tensor:
    """Applies all processors in turn.

    Args:
        processors: in their order.
        branches: whose rows these are, `[n]`.
        input_ids: what each of the branches sees, left-padded, int64 `[n, L]`.
        scores: fp32 `[n, V]`.

    Returns:
        Scores of the same shape.

    Raises:
        InvalidInput: a processor returns another shape.
    """
    if stateful := [p for p in processors if hasattr(p, "fork")]:
        _notify_fork(stateful, branches)
    for processor in processors:
        shape, scores = scores.shape, processor(input_ids, scores)
        if scores.shape != shape:
            raise InvalidInput(
                f"{type(processor).__name__} must return scores {list(shape)}, one for each it got, got "
                f"{list(scores.shape)}"
            )
    return scores


def left_padded(branches: Sequence[Branch], pad_token_id: int, device: torch.device) -> Tensor:
    """What each branch sees, int64 `[n, L]`, padded on the left."""
    texts = [branch.tokens for branch in branches]
    rows = np.full((len(texts), max(map(len, texts), default=0)), pad_token_id, np.int64)
    for row, text in zip(rows, texts, strict=True):
        row[len(row) - len(text) :] = text
    return torch.from_numpy(rows).to(device)


def sample_processed(
    processors: Sequence[Processor],
    branches: Sequence[Branch],
    logits: Tensor,
    sample: KeyedSampling,
    pad_token_id: int,
) -> tuple[Tensor, Tensor]:
    """Samples the token after each branch from logits that processors change.

    Args:
        processors: in their order.
        branches: whose rows these are, `[n]`.
        logits: the model's own, fp32 `[n, V]`.
        sample: how tokens are sampled, of n rows.
        pad_token_id: fills rows that processors look at.

    Returns:
        Tokens, int64 `[n]`, and their log-probs under the model's own distribution, `[n]`: NaN where logits are not
        finite, `NO_TOKEN` where processors leave no token.
    """
    input_ids = left_padded(branches, pad_token_id, logits.device)
    scores = process(processors, branches, input_ids, logits.clone())
    sampled = score_logits(scores, TokenRequest(sample=sample), logits)  # no reward is asked of hidden states
    log_prob = logits.gather(1, sampled.token[:, None]).squeeze(1) - logits.logsumexp(dim=1)
    none_left = sampled.shaped_log_prob.isnan() & log_prob.isfinite()
    return sampled.token, log_prob.masked_fill(none_left, NO_TOKEN)


def check_processors(name: str, value: object) -> None:
    """Raises InvalidInput unless `value` is a sequence of processors."""
    if not isinstance(value, Sequence) or not all(callable(v) for v in value):
        raise InvalidInput(f"{name} must be a tuple of functions of input_ids and scores, got {value!r:.80}")


def _notify_fork(processors: Sequence[Any], branches: Sequence[Branch]) -> None:
    """Calls `fork` of each. A state is known by the tag that its branch got when it was last asked."""
    tree = branches[0].tree
    ids = tree.ids(branches, distinct=True)
    tags, length = tree.tags.tag[ids], tree.branch_length[ids]
    added = length - tree.tags.length[ids]
    fresh = tree.tags.renew(ids, length)
    live = tree.tags.tag[tree.branch_node >= 0]
    for processor in processors:
        known = vars(processor).get(_STATES, live[:0])
        waiting = known[np.isin(known, live)]
        goes_on = np.isin(tags, known)
        place = {tag: i for i, tag in enumerate(known.tolist())}
        parents = [place.get(tag, -1) for tag in [*tags.tolist(), *waiting.tolist()]]
        new = [n if on else len(b.tokens) for n, on, b in zip(added.tolist(), goes_on, branches, strict=True)]
        processor.fork(torch.tensor(parents), torch.tensor(new))
        vars(processor)[_STATES] = np.concatenate([fresh, waiting])
