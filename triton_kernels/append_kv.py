"""`forktree.ops.append_kv`: one program a token, bits copied as integers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from forktree.ops.checks import check_slots
from forktree.ops.pool import KVPool
from forktree.triton_kernels.device import device_of

BLOCK = 1024  # elements copied at once: 16 bytes for each of 128 threads in 16-bit types
NUM_WARPS = 4
INTEGERS = {2: torch.int16, 4: torch.int32}


@triton.jit
def _copy(x, pool, token, slot, strides, pool_strides, heads, D: tl.constexpr, BLOCK: tl.constexpr):
    row_stride, head_stride, last_stride = strides
    slot_stride, slot_head_stride = pool_strides
    for first in range(0, heads * D, BLOCK):
        element = first + tl.arange(0, BLOCK)
        real = element < heads * D
        head = (element // D).to(tl.int64)
        at = token * row_stride + head * head_stride + (element % D) * last_stride
        to = slot * slot_stride + head * slot_head_stride + element % D
        tl.store(pool + to, tl.load(x + at, mask=real), mask=real)


@triton.jit(do_not_specialize=["heads", "num_slots"])
def _append_kv(
    k,
    v,
    slots,
    k_slots,
    v_slots,
    k_row_stride,
    k_head_stride,
    k_last_stride,
    v_row_stride,
    v_head_stride,
    v_last_stride,
    k_slot_stride,
    k_slot_head_stride,
    v_slot_stride,
    v_slot_head_stride,
    heads,
    num_slots,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (tokens,). Slots beyond the pool are not stored: nobody could look at them before."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if (slot >= 0) & (slot < num_slots):
        k_strides, k_slot_strides = (k_row_stride, k_head_stride, k_last_stride), (k_slot_stride, k_slot_head_stride)
        v_strides, v_slot_strides = (v_row_stride, v_head_stride, v_last_stride), (v_slot_stride, v_slot_head_stride)
        _copy(k, k_slots, token, slot, k_strides, k_slot_strides, heads, DK, BLOCK)
        _copy(v, v_slots, token, slot, v_strides, v_slot_strides, heads, DV, BLOCK)


def launch(k: Tensor, v: Tensor, slots: Tensor, pool: KVPool) -> None:
    check_slots(slots, pool)
    tokens, heads, k_dim = k.shape
    if not k.numel():
        return
    k, v, k_slots, v_slots = (x.view(INTEGERS[x.element_size()]) for x in (k, v, pool.k, pool.v))
    with device_of(k):
        _append_kv[(tokens,)](
            k,
            v,
            slots.contiguous(),
            k_slots,
            v_slots,
            *k.stride(),
            *v.stride(),
            *k_slots.stride()[:2],
            *v_slots.stride()[:2],
            heads,
            k_slots.shape[0],
            k_dim,
            v.shape[2],
            BLOCK,
            num_warps=NUM_WARPS,
        )
