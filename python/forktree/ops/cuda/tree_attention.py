"""`forktree.ops.tree_attention` by `csrc/tree_attention.cu`: bf16 and fp16, Dk = Dv of 64, 96, 128 or 256."""

from functools import cache

import torch
from torch import Tensor

from forktree import _core
from forktree.ops.checks import check_plan_tensors, check_scores, check_tree_attention
from forktree.ops.cuda.stream import stream_of
from forktree.ops.dispatch import CUDA_DIMS, in_chunks
from forktree.ops.dtypes import dtype_number
from forktree.ops.watched import is_watched
from forktree.plan.plan import AttentionPlan

ALIGNMENT = 16  # bytes that are copied at a time


def tree_attention(
    q: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    call = torch.ops.forktree.tree_attention.default if is_watched(q) else launch
    state: tuple[Tensor, Tensor] = call(
        q,
        k_slots,
        v_slots,
        *plan.on(q.device),
        plan.layout.num_tokens,
        plan.num_partials,
        scale,
        softcap or 0.0,
        sinks,
        alibi_slopes,
    )
    return state


def launch(
    q: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    plan: Tensor,
    slot_index: Tensor,
    num_tokens: int,
    max_partials: int,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The plan and slot_index are believed: reading them here would wait for the device."""
    check_tree_attention(q, k_slots, v_slots, sinks, alibi_slopes)
    check_scores(scale, softcap or None)
    check_plan_tensors(plan, slot_index, q.device)
    _check_kernel(q, k_slots, v_slots)
    if min(num_tokens, max_partials) < 0:
        raise ValueError(f"num_tokens and max_partials must be at least 0, got {num_tokens} and {max_partials}")
    device, (_, heads, dim), kv_heads = q.device, q.shape, k_slots.shape[1]
    q = _aligned(q)
    plan, slot_index = plan.contiguous(), slot_index.contiguous()
    sinks, alibi_slopes = _per_head(sinks), _per_head(alibi_slopes)
    out = q.new_empty(num_tokens, heads, dim)
    lse = q.new_empty(num_tokens, heads, dtype=torch.float32)
    partials = q.new_empty(max_partials * heads * (dim + 2), dtype=torch.float32)
    stream = stream_of(q)
    with torch.cuda.device_of(q):
        _core.cuda_tree_attention(
            dtype_number("q", q),
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            heads,
            dim,
            k_slots.data_ptr(),
            k_slots.stride(0),
            k_slots.stride(1),
            v_slots.data_ptr(),
            v_slots.stride(0),
            v_slots.stride(1),
            kv_heads,
            plan.data_ptr(),
            slot_index.data_ptr(),
            scale,
            softcap,
            0 if sinks is None else sinks.data_ptr(),
            0 if alibi_slopes is None else alibi_slopes.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            num_tokens,
            partials.data_ptr(),
            max_partials,
            _counters(device, stream, num_tokens * kv_heads).data_ptr(),
            device.index or 0,
            stream,
        )
    return out, lse


def _check_kernel(q: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
    """That there is a kernel for these."""
    dim, value_dim = k_slots.shape[2], v_slots.shape[2]
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"q must be bf16 or fp16 for the CUDA kernel, got {q.dtype}: leave it to another backend")
    if dim != value_dim or dim not in CUDA_DIMS:
        raise ValueError(
            f"head_dim must be 64, 96, 128 or 256, of K as of V, for the CUDA kernel, got {dim} and {value_dim}: leave "
            f"it to another backend"
        )
    for name, pool in (("k_slots", k_slots), ("v_slots", v_slots)):
        if pool.data_ptr() % ALIGNMENT or not in_chunks(pool):
            raise ValueError(
                f"{name} must begin at a multiple of {ALIGNMENT} bytes, and so must its slots and heads, for the CUDA "
                f"kernel, got {pool.data_ptr():#x} and strides {pool.stride()}: leave it to the triton backend"
            )


def _aligned(q: Tensor) -> Tensor:
    """q as it is read, 16 bytes at a time."""
    row_stride, head_stride, last_stride = q.stride()
    if last_stride == 1 and not (q.data_ptr() % ALIGNMENT or row_stride % 8 or head_stride % 8):
        return q
    return q.clone(memory_format=torch.contiguous_format)


def _per_head(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _counters(device: torch.device, stream: int, size: int) -> Tensor:
    """Zeros that every launch leaves as zeros, for launches that follow one another: one tensor a stream."""
    return _zeros(device, stream, max(1 << 16, 1 << (size - 1).bit_length()))


@cache  # never freed: captured graphs hold their addresses
def _zeros(device: torch.device, stream: int, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)
