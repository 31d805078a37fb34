"""Operations on a slot pool: attention over a plan, and what belongs to it.

Letters: `T` tokens, `R` query rows, `Hq`/`Hk` query and KV heads, `G = Hq / Hk` (query head h reads KV head
h // G), `Dk`/`Dv` head dims. Every function checks its arguments and hands over to a backend: `reference`
(dense, the specification), `torch` (any device), or `cpu`, `triton` and `cuda` (compiled; fp32, bf16 and fp16).
`FORKTREE_BACKEND` names one; else `forktree.ops.dispatch` decides. A backend is one function an operation, `launch`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from forktree import _core
from forktree.ops.assemble import LmHead, VocabPass, VocabPassResult, assemble_scores, gather_dot, matmul_columns
from forktree.ops.checks import (
    check_append_kv,
    check_fits,
    check_lm_head,
    check_logits,
    check_merge_states,
    check_rotate_rows,
    check_token_request,
    check_tree_attention,
    math_dtype,
)
from forktree.ops.dispatch import PYTORCH, available, launcher, missing, must_dispatch, select_backend
from forktree.ops.library import through_torch
from forktree.ops.plan_tensors import PlanTensors
from forktree.ops.pool import AttentionOptions, KVFormat, KVPool
from forktree.ops.pytorch.score_tokens import pass_over_logits
from forktree.ops.token_request import TokenRequest, TokenScores
from forktree.plan.plan import AttentionPlan

__all__ = [
    "AttentionOptions",
    "KVFormat",
    "KVPool",
    "append_kv",
    "merge_states",
    "rotate_rows",
    "score_logits",
    "score_tokens",
    "tree_attention",
]

DEFAULT = AttentionOptions()


def tree_attention(
    q: Tensor,
    pool: KVPool,
    plan: AttentionPlan,
    options: AttentionOptions = DEFAULT,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query row over what the layout lets it see; rows of one token share one softmax.

    Math is done in fp32, for fp64 inputs in fp64. NaN and infinities of a token's K and V reach the rows that see it,
    and no others.

    Args:
        q: [R, Hq, Dk], rows in the order of the layout; fp32, bf16, fp16 or fp64.
        pool: keys and values, in the dtype and on the device of q.
        plan: made by `forktree.plan_attention` for these head counts and head_dim = Dk.
        options: scale, soft cap, sinks and ALiBi slopes; tensors on the device of q.
        return_lse: also return the log-sum-exp.

    Returns:
        out [T, Hq, Dv] in q's dtype; with return_lse also lse [T, Hq], natural log, fp32. A token that sees
        nothing gets 0 and, without sinks, -inf.

    Raises:
        ValueError: arguments do not fit each other; before anything is computed.
    """
    check_tree_attention(q, pool, options.per_head)
    if not torch.compiler.is_compiling():
        check_fits(q.shape, pool, plan)
    tensors = PlanTensors.of(plan, q.device)
    out, lse = _call("tree_attention", q, pool, tensors, options)
    return (out, lse) if return_lse else out


def append_kv(k: Tensor, v: Tensor, slots: Tensor, pool: KVPool) -> None:
    """Writes each token's K and V into its slot of the pool, in place.

    Args:
        k: [T, Hk, Dk], dtype and device of the pool.
        v: [T, Hk, Dv], likewise.
        slots: [T] int32 or int64 on the same device, different from one another; a negative one: not stored.
        pool: what is written.

    Raises:
        ValueError: arguments do not fit each other, or a slot lies beyond the pool; before anything is written.
            Slot numbers are checked on the CPU only: elsewhere that would wait for the device.
    """
    check_append_kv(k, v, slots, pool)
    _call("append_kv", k, v, slots, pool)


def rotate_rows(
    q: Tensor, shift: Tensor, inv_freq: Tensor, *, interleaved: bool = False, rotary_dim: int | None = None
) -> Tensor:
    """Moves rotary-encoded rows by a position shift, so that a row can look from another position.

    Args:
        q: [R, H, D].
        shift: [R] int32 or int64, positions to add; angles are computed in fp64.
        inv_freq: [rotary_dim / 2], radians per position.
        interleaved: pairs are (0, 1), (2, 3), …; otherwise (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), …
        rotary_dim: leading elements that rotate, default D.

    Returns:
        A new tensor [R, H, D] in q's dtype.

    Raises:
        ValueError: arguments do not fit each other; before anything is computed.
    """
    if rotary_dim is None:
        rotary_dim = q.shape[-1] if q.ndim else 0
    check_rotate_rows(q, shift, inv_freq, rotary_dim)
    rotated: Tensor = _call("rotate_rows", q, shift, inv_freq, interleaved, rotary_dim)
    return rotated


def merge_states(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Merges attention states over disjoint tokens. Associative up to rounding; the empty state is (0, -inf).

    Args:
        o: [P, Hq, Dv] partial outputs, each normalised by itself.
        lse: [P, Hq] their log-sum-exp, natural log, fp32 (fp64 if o is). Where it is -inf, o is not looked at.
        indptr: [T + 1] int32 or int64, CSR: output t merges o[index[indptr[t] : indptr[t + 1]]].
        index: [P'] int32 or int64.

    Returns:
        out [T, Hq, Dv] in o's dtype, lse [T, Hq]. Nothing but empty states, or none, gives (0, -inf).

    Raises:
        ValueError: arguments do not fit each other, or lists on the CPU are none; before anything is computed.
    """
    check_merge_states(o, lse, indptr, index)
    merged: tuple[Tensor, Tensor] = _call("merge_states", o, lse, indptr, index)
    return merged


def score_tokens(
    hidden: Tensor,
    lm_head: Tensor,
    request: TokenRequest,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    check: bool = True,
) -> TokenScores:
    """Everything `request` asks of the next token of every row, in one pass over lm_head: no [T, V] matrix is made.

    Logits are `z = softcap * tanh(scale * (h W^T + bias) / softcap)`, without the tanh where softcap is None, in fp32
    (fp64 for fp64 hidden states): products of narrower types are not rounded to them.

    Args:
        hidden: [T, H], states after the last norm; fp32, bf16, fp16 or fp64.
        lm_head: [V, H], contiguous, dtype and device of hidden.
        request: what to find out.
        bias: [V].
        scale: any number but 0.
        softcap: above 0.
        check: raise for rows that are not finite or have no token left (`TokenScores.check`); on a GPU that waits for
            the result. False: look at the result yourself.

    Returns:
        What was asked for.

    Raises:
        ValueError: arguments do not fit each other; before anything is computed.
    """
    head = LmHead(lm_head, bias, scale, softcap)
    check_lm_head(hidden, head)
    check_token_request(request, hidden, lm_head.shape[0])
    scores = assemble_scores(
        hidden,
        lm_head.shape[0],
        request,
        vocab_pass=lambda wanted: _call("score_tokens", hidden, head, wanted),
        logits_of_pairs=lambda rows, ids: head.finish(gather_dot(hidden, lm_head, rows, ids), ids),
        logits_of_all=lambda ids: head.finish(matmul_columns(hidden, lm_head, ids), ids),
    )
    if check:
        scores.check()
    return scores


def score_logits(logits: Tensor, request: TokenRequest, hidden: Tensor) -> TokenScores:
    """As `score_tokens` without its check, of logits that a model's own head made of hidden states.

    Args:
        logits: [T, V], floating-point, on the device of hidden, used as they are.
        request: what to find out.
        hidden: [T, H].

    Returns:
        What was asked for. Rows that are not finite are not looked for: `TokenScores.check` does.

    Raises:
        ValueError: arguments do not fit each other; before anything is computed.
    """
    check_logits(logits, hidden)
    check_token_request(request, hidden, logits.shape[1])
    real = math_dtype(logits)

    def passed(wanted: VocabPass) -> VocabPassResult:
        return pass_over_logits(logits, wanted)

    return assemble_scores(
        hidden,
        logits.shape[1],
        request,
        vocab_pass=passed,
        logits_of_pairs=lambda rows, ids: logits[rows, ids].to(real),
        logits_of_all=lambda ids: logits[:, ids].to(real),
    )


def check_settings() -> None:
    """Raises ValueError if FORKTREE_BACKEND or FORKTREE_ISA names what is not there."""
    name = os.environ.get("FORKTREE_BACKEND")
    if name and (why := missing(name)):
        raise ValueError(f"FORKTREE_BACKEND={name}: {why}; available: {', '.join(available())}")
    _core.isa()


def _call(operation: str, x: Tensor, *others: Any) -> Any:
    """Hands checked arguments over to a backend, by way of torch if it must see the call."""
    backend = select_backend(operation, x, *others)
    if must_dispatch(x) and (backend not in PYTORCH or operation == "score_tokens"):
        return through_torch(operation, x, *others)
    return launcher(backend, operation)(x, *others)
