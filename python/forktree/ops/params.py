"""Arguments of the operations as C++ and CUDA take them: the structs of `csrc/params.h`, mirrored member by member.

A function an operation fills one in from tensors that have been checked, and allocates what the operation returns.
"""

from __future__ import annotations

from ctypes import Structure, addressof, c_bool, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from forktree.ops.assemble import LmHead, VocabPass, VocabPassResult
from forktree.ops.plan_tensors import PlanTensors
from forktree.ops.pool import AttentionOptions, KVPool

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Dtype in csrc/common/numeric.hpp


class Params(Structure):
    """Base of the structs that operations are called with."""

    tensors: tuple[Any, ...]  # what it points to and may have been made for it: lives as long as it does

    @property
    def address(self) -> int:
        """For `forktree._core`."""
        return addressof(self)


class Indices(Structure):
    """`Indices`, which csrc/common/indices.hpp defines."""

    _fields_ = [("data", c_void_p), ("wide", c_bool), ("size", c_int64)]


class KvPool(Structure):
    """`KvPool`."""

    _fields_ = [
        ("k", c_void_p),
        ("k_slot_stride", c_int64),
        ("k_head_stride", c_int64),
        ("v", c_void_p),
        ("v_slot_stride", c_int64),
        ("v_head_stride", c_int64),
        ("num_slots", c_int64),
        ("num_kv_heads", c_int32),
        ("k_dim", c_int32),
        ("v_dim", c_int32),
        ("dtype", c_int32),
    ]


class TreeAttentionParams(Params):
    """`TreeAttentionParams`."""

    _fields_ = [
        ("pool", KvPool),
        ("q", c_void_p),
        ("q_row_stride", c_int64),
        ("q_head_stride", c_int64),
        ("rows", c_int64),
        ("num_tokens", c_int64),
        ("max_partials", c_int64),
        ("plan_buffer", c_void_p),
        ("plan_size", c_int64),
        ("slot_index", c_void_p),
        ("slot_index_size", c_int64),
        ("num_qo_heads", c_int32),
        ("dtype", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("sinks", c_void_p),
        ("alibi_slopes", c_void_p),
        ("out", c_void_p),
        ("lse", c_void_p),
        ("partials", c_void_p),
        ("counters", c_void_p),
        ("device", c_int64),
    ]


class AppendKvParams(Params):
    """`AppendKvParams`."""

    _fields_ = [
        ("pool", KvPool),
        ("k", c_void_p),
        ("k_row_stride", c_int64),
        ("k_head_stride", c_int64),
        ("v", c_void_p),
        ("v_row_stride", c_int64),
        ("v_head_stride", c_int64),
        ("slots", Indices),
    ]


class RotateRowsParams(Params):
    """`RotateRowsParams`."""

    _fields_ = [
        ("q", c_void_p),
        ("row_stride", c_int64),
        ("head_stride", c_int64),
        ("heads", c_int64),
        ("dim", c_int64),
        ("shift", Indices),
        ("inv_freq", c_void_p),
        ("pairs", c_int64),
        ("out", c_void_p),
        ("dtype", c_int32),
        ("interleaved", c_bool),
    ]


class MergeStatesParams(Params):
    """`MergeStatesParams`."""

    _fields_ = [
        ("o", c_void_p),
        ("lse", c_void_p),
        ("states", c_int64),
        ("heads", c_int64),
        ("dim", c_int64),
        ("indptr", Indices),
        ("index", Indices),
        ("out", c_void_p),
        ("total", c_void_p),
        ("dtype", c_int32),
    ]


class ScoreTokensParams(Params):
    """`ScoreTokensParams`."""

    _fields_ = [
        ("hidden", c_void_p),
        ("row_stride", c_int64),
        ("rows", c_int64),
        ("hidden_size", c_int64),
        ("lm_head", c_void_p),
        ("vocab", c_int64),
        ("bias", c_void_p),
        ("scale", c_float),
        ("softcap", c_float),
        ("top_k", c_int64),
        ("keys", c_void_p),
        ("settings", c_void_p),
        ("edit_indptr", c_void_p),
        ("edit_ids", c_void_p),
        ("edit_ops", c_void_p),
        ("edit_values", c_void_p),
        ("allowed", c_void_p),
        ("lse", c_void_p),
        ("entropy", c_void_p),
        ("top_ids", c_void_p),
        ("top_logits", c_void_p),
        ("token", c_void_p),
        ("token_logit", c_void_p),
        ("shaped_log_prob", c_void_p),
        ("dtype", c_int32),
    ]


def tree_attention(
    q: Tensor, pool: KVPool, plan: PlanTensors, options: AttentionOptions
) -> tuple[TreeAttentionParams, Tensor, Tensor]:
    """The call without scratch, out [num_tokens, Hq, Dv] and lse [num_tokens, Hq]."""
    dtype = dtype_number("q", q)
    q = _dense(q)
    (row_stride, head_stride, _), (rows, heads, k_dim) = q.stride(), q.shape
    buffer, slot_index = plan.buffer.contiguous(), plan.slot_index.contiguous()
    sinks, alibi_slopes = _fp32(options.sinks), _fp32(options.alibi_slopes)
    out = q.new_empty(plan.num_tokens, heads, pool.v.shape[2])
    lse = q.new_empty(plan.num_tokens, heads, dtype=torch.float32)
    params = TreeAttentionParams(
        pool=_pool(pool),
        q=q.data_ptr(),
        q_row_stride=row_stride,
        q_head_stride=head_stride,
        rows=rows,
        num_tokens=plan.num_tokens,
        max_partials=plan.max_partials,
        plan_buffer=buffer.data_ptr(),
        plan_size=buffer.numel(),
        slot_index=slot_index.data_ptr(),
        slot_index_size=slot_index.numel(),
        num_qo_heads=heads,
        dtype=dtype,
        scale=options.scale_of(k_dim),
        softcap=options.softcap or 0.0,
        sinks=_address(sinks),
        alibi_slopes=_address(alibi_slopes),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
    )
    params.tensors = q, buffer, slot_index, sinks, alibi_slopes
    return params, out, lse


def append_kv(k: Tensor, v: Tensor, slots: Tensor, pool: KVPool) -> AppendKvParams:
    """The whole call."""
    k, v, slots = _dense(k), _dense(v), slots.contiguous()
    (k_row_stride, k_head_stride, _), (v_row_stride, v_head_stride, _) = k.stride(), v.stride()
    params = AppendKvParams(
        pool=_pool(pool),
        k=k.data_ptr(),
        k_row_stride=k_row_stride,
        k_head_stride=k_head_stride,
        v=v.data_ptr(),
        v_row_stride=v_row_stride,
        v_head_stride=v_head_stride,
        slots=_indices(slots),
    )
    params.tensors = k, v, slots
    return params


def rotate_rows(
    q: Tensor, shift: Tensor, inv_freq: Tensor, interleaved: bool, rotary_dim: int
) -> tuple[RotateRowsParams, Tensor]:
    """The whole call, and out [R, H, D]."""
    dtype = dtype_number("q", q)
    q, shift, inv_freq = _dense(q), shift.contiguous(), inv_freq.double().contiguous()
    (row_stride, head_stride, _), (rows, heads, dim) = q.stride(), q.shape
    out = q.new_empty(rows, heads, dim)
    params = RotateRowsParams(
        q=q.data_ptr(),
        row_stride=row_stride,
        head_stride=head_stride,
        heads=heads,
        dim=dim,
        shift=_indices(shift),
        inv_freq=inv_freq.data_ptr(),
        pairs=rotary_dim // 2,
        out=out.data_ptr(),
        dtype=dtype,
        interleaved=interleaved,
    )
    params.tensors = q, shift, inv_freq
    return params, out


def merge_states(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[MergeStatesParams, Tensor, Tensor]:
    """The whole call, out [T, Hq, Dv] and total [T, Hq]."""
    dtype = dtype_number("o", o)
    o, lse, indptr, index = o.contiguous(), lse.contiguous(), indptr.contiguous(), index.contiguous()
    (states, heads, dim), tokens = o.shape, indptr.numel() - 1
    out, total = o.new_empty(tokens, heads, dim), lse.new_empty(tokens, heads)
    params = MergeStatesParams(
        o=o.data_ptr(),
        lse=lse.data_ptr(),
        states=states,
        heads=heads,
        dim=dim,
        indptr=_indices(indptr),
        index=_indices(index),
        out=out.data_ptr(),
        total=total.data_ptr(),
        dtype=dtype,
    )
    params.tensors = o, lse, indptr, index
    return params, out, total


def score_tokens(
    hidden: Tensor, lm_head: LmHead, wanted: VocabPass
) -> tuple[ScoreTokensParams, VocabPassResult]:
    """The whole call, and its results."""
    dtype = dtype_number("hidden", hidden)
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    (rows, size), bias = hidden.shape, _fp32(lm_head.bias)
    draw = wanted.keys, wanted.settings, *wanted.edits, wanted.allowed
    draw = tuple(None if x is None else x.contiguous() for x in draw)
    keys, settings, edit_indptr, edit_ids, edit_ops, edit_values, allowed = (_address(x) for x in draw)
    found = VocabPassResult.empty(hidden, wanted)
    params = ScoreTokensParams(
        hidden=hidden.data_ptr(),
        row_stride=hidden.stride(0),
        rows=rows,
        hidden_size=size,
        lm_head=lm_head.weight.data_ptr(),
        vocab=lm_head.weight.shape[0],
        bias=_address(bias),
        scale=lm_head.scale,
        softcap=lm_head.softcap or 0.0,
        top_k=wanted.top_k,
        keys=keys,
        settings=settings,
        edit_indptr=edit_indptr,
        edit_ids=edit_ids,
        edit_ops=edit_ops,
        edit_values=edit_values,
        allowed=allowed,
        dtype=dtype,
        **{name: x.data_ptr() for name, x in found._asdict().items() if x.numel()},
    )
    params.tensors = hidden, bias, *draw
    return params, found


def dtype_number(name: str, x: Tensor) -> int:
    """How the kernels number the dtype of x. Raises ValueError if they do not take it."""
    number = DTYPES.get(x.dtype)
    if number is None:
        raise ValueError(f"{name} must be fp32, bf16 or fp16 (fp64 is left to the torch backend), got {x.dtype}")
    return number


def _pool(pool: KVPool) -> KvPool:
    k, v = pool.k, pool.v
    known: KvPool | None = pool.cache.get(KvPool)
    if known is None or (known.k, known.v) != (k.data_ptr(), v.data_ptr()):
        (num_slots, num_kv_heads, k_dim), (k_slot_stride, k_head_stride, _) = k.shape, k.stride()
        v_slot_stride, v_head_stride, _ = v.stride()
        known = pool.cache[KvPool] = KvPool(
            k=k.data_ptr(),
            k_slot_stride=k_slot_stride,
            k_head_stride=k_head_stride,
            v=v.data_ptr(),
            v_slot_stride=v_slot_stride,
            v_head_stride=v_head_stride,
            num_slots=num_slots,
            num_kv_heads=num_kv_heads,
            k_dim=k_dim,
            v_dim=v.shape[2],
            dtype=dtype_number("pool", k),
        )
    return known


def _indices(x: Tensor) -> tuple[int, bool, int]:
    return x.data_ptr(), x.dtype is torch.int64, x.numel()


def _dense(x: Tensor) -> Tensor:
    """x [n, heads, dim], contiguous in its last dimension."""
    return x if x.stride(2) == 1 else x.contiguous()


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
