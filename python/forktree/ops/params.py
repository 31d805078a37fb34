"""Arguments of the operations as C++ and CUDA take them: the structs of `csrc/params.h`, mirrored member by member.

A function an operation packs one from tensors that have been checked, allocates what the operation returns, and calls
the core. The tensors it points to live until the call returns; on a GPU memory that is freed then is not used again
before the kernel is done, as both are in the order of the stream.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from ctypes import Structure, c_bool, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from forktree.ops.assemble import LmHead, VocabPass, VocabPassResult
from forktree.ops.plan_tensors import PlanTensors
from forktree.ops.pool import AttentionOptions, KVPool

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Dtype in csrc/common/numeric.hpp

Core = Callable[[bytes, int], Any]  # a function of `forktree._core`: a struct, and the number of threads or a stream


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


class TreeAttentionParams(Structure):
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
        ("plan_trusted", c_bool),
    ]


class AppendKvParams(Structure):
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


class RotateRowsParams(Structure):
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


class MergeStatesParams(Structure):
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


class ScoreTokensParams(Structure):
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


CODES = {c_void_p: "P", c_int64: "q", c_int32: "i", c_float: "f", c_bool: "?"}


def packer(mirror: type[Structure]) -> struct.Struct:
    """Packs the members of a struct in order, those of structs within it too. Much faster than setting them."""
    return struct.Struct(f"@{_codes(mirror)}")


def _codes(mirror: Any) -> str:
    each = (CODES[kind] if kind in CODES else _codes(kind) for _, kind, *_ in mirror._fields_)
    return "".join(each) + "0q"  # padded to whole words


TREE_ATTENTION, APPEND_KV, ROTATE_ROWS, MERGE_STATES, SCORE_TOKENS = (
    packer(mirror)
    for mirror in (TreeAttentionParams, AppendKvParams, RotateRowsParams, MergeStatesParams, ScoreTokensParams)
)


def tree_attention(
    core: Core,
    how: int,
    q: Tensor,
    pool: KVPool,
    plan: PlanTensors,
    options: AttentionOptions,
    partials: Tensor | None = None,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [num_tokens, Hq, Dv] and lse [num_tokens, Hq]. partials, counters: scratch of CUDA."""
    dtype = dtype_number("q", q)
    if q.stride(2) != 1:
        q = q.contiguous()
    (row_stride, head_stride, _), (rows, heads, k_dim) = q.stride(), q.shape
    buffer, slot_index, num_tokens, max_partials, host = plan
    buffer, slot_index = buffer.contiguous(), slot_index.contiguous()
    sinks, alibi_slopes = _fp32(options.sinks), _fp32(options.alibi_slopes)
    out = q.new_empty(num_tokens, heads, pool.format.v_dim)
    lse = q.new_empty(num_tokens, heads, dtype=torch.float32)
    params = TREE_ATTENTION.pack(
        *_pool(pool),
        q.data_ptr(),
        row_stride,
        head_stride,
        rows,
        num_tokens,
        max_partials,
        buffer.data_ptr(),
        buffer.numel(),
        slot_index.data_ptr(),
        slot_index.numel(),
        heads,
        dtype,
        options.scale_of(k_dim),
        options.softcap or 0.0,
        _address(sinks),
        _address(alibi_slopes),
        out.data_ptr(),
        lse.data_ptr(),
        _address(partials),
        _address(counters),
        q.device.index or 0,
        host is not None,
    )
    core(params, how)
    return out, lse


def append_kv(core: Core, how: int, k: Tensor, v: Tensor, slots: Tensor, pool: KVPool) -> None:
    """Into the pool."""
    if k.stride(2) != 1:
        k = k.contiguous()
    if v.stride(2) != 1:
        v = v.contiguous()
    slots = slots.contiguous()
    (k_row_stride, k_head_stride, _), (v_row_stride, v_head_stride, _) = k.stride(), v.stride()
    params = APPEND_KV.pack(
        *_pool(pool),
        k.data_ptr(),
        k_row_stride,
        k_head_stride,
        v.data_ptr(),
        v_row_stride,
        v_head_stride,
        *_indices(slots),
    )
    core(params, how)


def rotate_rows(
    core: Core, how: int, q: Tensor, shift: Tensor, inv_freq: Tensor, interleaved: bool, rotary_dim: int
) -> Tensor:
    """out [R, H, D]."""
    dtype = dtype_number("q", q)
    if q.stride(2) != 1:
        q = q.contiguous()
    shift, inv_freq = shift.contiguous(), inv_freq.double().contiguous()
    (row_stride, head_stride, _), (rows, heads, dim) = q.stride(), q.shape
    out = q.new_empty(rows, heads, dim)
    params = ROTATE_ROWS.pack(
        q.data_ptr(),
        row_stride,
        head_stride,
        heads,
        dim,
        *_indices(shift),
        inv_freq.data_ptr(),
        rotary_dim // 2,
        out.data_ptr(),
        dtype,
        interleaved,
    )
    core(params, how)
    return out


def merge_states(core: Core, how: int, o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """out [T, Hq, Dv] and total [T, Hq]."""
    dtype = dtype_number("o", o)
    o, lse, indptr, index = o.contiguous(), lse.contiguous(), indptr.contiguous(), index.contiguous()
    (states, heads, dim), tokens = o.shape, indptr.numel() - 1
    out, total = o.new_empty(tokens, heads, dim), lse.new_empty(tokens, heads)
    params = MERGE_STATES.pack(
        o.data_ptr(),
        lse.data_ptr(),
        states,
        heads,
        dim,
        *_indices(indptr),
        *_indices(index),
        out.data_ptr(),
        total.data_ptr(),
        dtype,
    )
    core(params, how)
    return out, total


def score_tokens(core: Core, how: int, hidden: Tensor, lm_head: LmHead, wanted: VocabPass) -> VocabPassResult:
    """What the pass found."""
    dtype = dtype_number("hidden", hidden)
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    (rows, size), bias, found = hidden.shape, _fp32(lm_head.bias), VocabPassResult.empty(hidden, wanted)
    sample = wanted.keys, wanted.settings, *wanted.edits, wanted.allowed
    sample = tuple(None if x is None else x.contiguous() for x in sample)
    params = SCORE_TOKENS.pack(
        hidden.data_ptr(),
        hidden.stride(0),
        rows,
        size,
        lm_head.weight.data_ptr(),
        lm_head.weight.shape[0],
        _address(bias),
        lm_head.scale,
        lm_head.softcap or 0.0,
        wanted.top_k,
        *(_address(x) for x in sample),
        *(x.data_ptr() if x.numel() else 0 for x in found),
        dtype,
    )
    core(params, how)
    return found


def dtype_number(name: str, x: Tensor) -> int:
    """How the kernels number the dtype of x. Raises ValueError if they do not take it."""
    number = DTYPES.get(x.dtype)
    if number is None:
        raise ValueError(f"{name} must be fp32, bf16 or fp16 (fp64 is left to the torch backend), got {x.dtype}")
    return number


def _pool(pool: KVPool) -> tuple[int, ...]:
    """The members of its struct, looked up again only if its memory moved."""
    k, v = pool.k, pool.v
    members: tuple[int, ...] | None = pool.cache.get(KvPool)
    if members is None or members[0] != k.data_ptr() or members[3] != v.data_ptr():
        (num_slots, num_kv_heads, k_dim), dtype = k.shape, dtype_number("pool", k)
        members = pool.cache[KvPool] = (
            k.data_ptr(),
            *k.stride()[:2],
            v.data_ptr(),
            *v.stride()[:2],
            num_slots,
            num_kv_heads,
            k_dim,
            v.shape[2],
            dtype,
        )
    return members


def _indices(x: Tensor) -> tuple[int, bool, int]:
    return x.data_ptr(), x.dtype is torch.int64, x.numel()


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
