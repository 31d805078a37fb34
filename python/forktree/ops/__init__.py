"""Operations on a slot pool: attention over a plan, and what belongs to it.

Letters: `T` tokens, `R` query rows, `Hq`/`Hk` query and KV heads, `G = Hq / Hk` (query head h reads KV head
h // G), `Dk`/`Dv` head dims. Every function checks its arguments and hands over to a backend: `reference`
(dense, the specification), `torch` (any device), or `cpu`, `triton` and `cuda` (compiled; fp32, bf16 and fp16).
`FORKTREE_BACKEND` names one; else `forktree.ops.dispatch` decides.
"""

from __future__ import annotations

import math
import os
from types import ModuleType

import torch
from torch import Tensor

from forktree import _core
from forktree.ops import cpu
from forktree.ops import library as library  # registers torch.ops.forktree
from forktree.ops.checks import (
    check_append_kv,
    check_lists,
    check_lm_head,
    check_merge_states,
    check_per_head,
    check_rotate_rows,
    check_scores,
    check_slots,
    check_token_request,
    check_tree_attention,
)
from forktree.ops.dispatch import available, choose, launcher, load, missing
from forktree.ops.token_request import TokenRequest, TokenScores
from forktree.ops.vocabulary import answer
from forktree.ops.watched import is_watched
from forktree.plan.plan import AttentionPlan

__all__ = ["append_kv", "merge_states", "rotate_rows", "score_tokens", "tree_attention"]

CHECK_HERE = ("reference", "torch")  # the compiled backends check their arguments themselves


def tree_attention(
    q: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query row over what the layout lets it see; rows of one token share one softmax.

    Args:
        q: [R, Hq, Dk], rows in the order of the layout; fp32, bf16, fp16 or fp64.
        k_slots, v_slots: [slots, Hk, Dk] and [slots, Hk, Dv], dense in the last dimension, dtype and device of q.
        plan: made by `forktree.plan.plan.plan` for these head counts and head_dim = Dk.
        scale: factor on q·k, finite, default Dk ** -0.5.
        softcap: finite c > 0 makes scores c * tanh(s / c), after scale and before ALiBi and masks.
        sinks: [Hq], one more logit a head in each token's softmax, without a value; in the log-sum-exp too. -inf: none.
        alibi_slopes: [Hq], finite, adds slope * (key position - row_pos).
        return_lse: also return the log-sum-exp.

    Returns:
        out [T, Hq, Dv] in q's dtype; with return_lse also lse [T, Hq], natural log, fp32. A token that sees
        nothing gets 0 and, without sinks, -inf. NaN and infinities of a token's K and V reach the rows that see
        it, and no others.

    Math is done in fp32, for fp64 inputs in fp64. Raises ValueError on any mismatch before computing
    anything; values of sinks and alibi_slopes are checked on the CPU only, as elsewhere that would wait for the device.
    """
    backend = choose("tree_attention", q, k_slots, v_slots)
    if backend in CHECK_HERE:
        check_tree_attention(q, k_slots, v_slots, sinks, alibi_slopes)
    check_scores(scale, softcap)
    if not torch.compiler.is_compiling():
        check_fits(q.shape, k_slots.shape, plan)
        check_per_head(sinks, alibi_slopes)
    out, lse = _load(backend).tree_attention(
        q,
        k_slots,
        v_slots,
        plan,
        scale=1 / math.sqrt(q.shape[2]) if scale is None else scale,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )
    return (out, lse) if return_lse else out


def append_kv(k: Tensor, v: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
    """Writes each token's K and V into its slot of the pools, in place.

    Args:
        k, v: [T, Hk, Dk] and [T, Hk, Dv], dtype and device of the pools.
        slots: [T] int32 or int64 on the same device, different from one another; a negative one: not stored.
        k_slots, v_slots: [slots, Hk, Dk] and [slots, Hk, Dv], dense in the last dimension.

    Raises ValueError on any mismatch before anything is written. Slot numbers are checked on the CPU only:
    elsewhere that would wait for the device.
    """
    backend = choose("append_kv", k)
    if backend in CHECK_HERE:
        check_append_kv(k, v, slots, k_slots, v_slots)
        if slots.is_cpu:
            check_slots(slots, k_slots.shape[0])
    _load(backend).append_kv(k, v, slots, k_slots, v_slots)


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

    Returns: a new tensor [R, H, D] in q's dtype.
    """
    if rotary_dim is None:
        rotary_dim = q.shape[-1] if q.ndim else 0
    backend = choose("rotate_rows", q)
    if backend in CHECK_HERE:
        check_rotate_rows(q, shift, inv_freq, rotary_dim)
    rotated: Tensor = _load(backend).rotate_rows(q, shift, inv_freq, interleaved=interleaved, rotary_dim=rotary_dim)
    return rotated


def merge_states(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Merges attention states over disjoint tokens. Associative up to rounding; the empty state is (0, -inf).

    Args:
        o: [P, Hq, Dv] partial outputs, each normalised by itself.
        lse: [P, Hq] their log-sum-exp, natural log, fp32 (fp64 if o is). Where it is -inf, o is not looked at.
        indptr, index: [T+1] and [P'] int32 or int64, CSR: output t merges o[index[indptr[t] : indptr[t+1]]].

    Returns: out [T, Hq, Dv] in o's dtype, lse [T, Hq]. Nothing but empty states, or none, gives (0, -inf).
    """
    backend = choose("merge_states", o)
    if backend in CHECK_HERE:
        check_merge_states(o, lse, indptr, index)
        check_lists(indptr, index, o.shape[0])
    merged: tuple[Tensor, Tensor] = _load(backend).merge_states(o, lse, indptr, index)
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
        hidden: [T, H], states behind the last norm; fp32, bf16, fp16 or fp64.
        lm_head: [V, H], contiguous, dtype and device of hidden.
        request: see `TokenRequest`.
        bias: [V]. scale: any but 0. softcap: above 0.
        check: raise for rows that are not finite or have no token left (`TokenScores.check`); on a GPU that waits for
            the result. False: look at the result yourself.

    Returns: see `TokenScores`. Raises ValueError on any mismatch before computing anything.
    """
    check_lm_head(hidden, lm_head, bias, scale, softcap)
    check_token_request(request, hidden, lm_head.shape[0])
    backend = choose("score_tokens", hidden)
    if backend == "reference" or not len(hidden):
        scores = load("reference").score_tokens(hidden, lm_head, request, bias=bias, scale=scale, softcap=softcap)
    else:
        launch = torch.ops.forktree.score_tokens.default if is_watched(hidden) else launcher(backend, "score_tokens")
        scores = answer(launch, hidden, lm_head, request, bias=bias, scale=scale, softcap=softcap)
    if check:
        scores.check()
    return scores


# ---------------------------------------------------------------------- dispatch


def check_settings() -> None:
    """Raises ValueError if FORKTREE_BACKEND or FORKTREE_ISA names what is not there."""
    name = os.environ.get("FORKTREE_BACKEND")
    if name and (why := missing(name)):
        raise ValueError(f"FORKTREE_BACKEND={name}: {why}; available: {', '.join(available())}")
    _core.isa()


def _load(name: str) -> ModuleType:
    return cpu if name == "cpu" else load(name)  # torch.compile does not trace imports


def check_fits(q_shape: torch.Size, k_shape: torch.Size, plan: AttentionPlan) -> None:
    """That plan is one for these shapes: remembered with the plan, as it serves many layers."""
    shapes = q_shape, k_shape
    if plan.cache.get("fits") == shapes:
        return
    rows = (plan.layout.num_rows, plan.num_qo_heads, plan.head_dim)
    if q_shape != rows:
        raise ValueError(
            f"q must be {list(rows)} (rows of the layout, heads and head_dim of the plan), got {list(q_shape)}"
        )
    if k_shape[1:] != (plan.num_kv_heads, plan.head_dim):
        raise ValueError(
            f"k_slots must be [slots, {plan.num_kv_heads}, {plan.head_dim}] (heads and head_dim of the "
            f"plan), got {list(k_shape)}"
        )
    lowest, highest = plan.layout.slot_bounds
    if lowest < 0 or highest >= k_shape[0]:
        raise ValueError(f"slot_index must be in [0, {k_shape[0]}), the pool, got {lowest} to {highest}")
    plan.cache["fits"] = shapes
