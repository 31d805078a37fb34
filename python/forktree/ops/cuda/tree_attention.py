"""`forktree.ops.tree_attention` by `csrc/cuda/tree_attention`: bf16 and fp16, Dk = Dv of 64, 96, 128 or 256."""

from functools import cache

import torch
from torch import Tensor

from forktree import _core
from forktree.ops import params
from forktree.ops.cuda import stream_of
from forktree.ops.dispatch import CUDA_DIMS, in_chunks
from forktree.ops.plan_tensors import PlanTensors
from forktree.ops.pool import AttentionOptions, KVPool

ALIGNMENT = 16  # bytes that are copied at a time


def launch(q: Tensor, pool: KVPool, plan: PlanTensors, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """The plan and slot_index are believed: reading them here would wait for the device."""
    _check_kernel(q, pool)
    heads, dim, stream = q.shape[1], q.shape[2], stream_of(q)
    partials = q.new_empty(plan.max_partials * heads * (dim + 2), dtype=torch.float32)
    counters = _counters(q.device, stream, plan.num_tokens * pool.format.num_kv_heads)
    with torch.cuda.device_of(q):
        return params.tree_attention(
            _core.cuda_tree_attention, stream, _aligned(q), pool, plan, options, partials, counters
        )


def _check_kernel(q: Tensor, pool: KVPool) -> None:
    """That there is a kernel for these."""
    dim, value_dim = pool.k.shape[2], pool.v.shape[2]
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"q must be bf16 or fp16 for the CUDA kernel, got {q.dtype}: leave it to another backend")
    if dim != value_dim or dim not in CUDA_DIMS:
        raise ValueError(
            f"head_dim must be 64, 96, 128 or 256, of K as of V, for the CUDA kernel, got {dim} and {value_dim}: leave "
            f"it to another backend"
        )
    for name, x in (("k", pool.k), ("v", pool.v)):
        if x.data_ptr() % ALIGNMENT or not in_chunks(x):
            raise ValueError(
                f"{name} of the pool must begin at a multiple of {ALIGNMENT} bytes, and so must its slots and heads, "
                f"for the CUDA kernel, got {x.data_ptr():#x} and strides {x.stride()}: leave it to the triton backend"
            )


def _aligned(q: Tensor) -> Tensor:
    """q as it is read, 16 bytes at a time."""
    row_stride, head_stride, last_stride = q.stride()
    if last_stride == 1 and not (q.data_ptr() % ALIGNMENT or row_stride % 8 or head_stride % 8):
        return q
    return q.clone(memory_format=torch.contiguous_format)


def _counters(device: torch.device, stream: int, size: int) -> Tensor:
    """Zeros that every launch leaves as zeros, for launches that follow one another: one tensor a stream."""
    return _zeros(device, stream, max(1 << 16, 1 << (size - 1).bit_length()))


@cache  # never freed: captured graphs hold their addresses
def _zeros(device: torch.device, stream: int, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)
