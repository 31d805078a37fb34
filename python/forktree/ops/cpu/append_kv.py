"""`forktree.ops.append_kv` by `csrc/append_kv.cpp`."""

import torch
from torch import Tensor

from forktree import _core
from forktree.ops.checks import check_append_kv
from forktree.ops.dtypes import dtype_number
from forktree.ops.watched import is_watched


def append_kv(k: Tensor, v: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
    call = torch.ops.forktree.append_kv.default if is_watched(k) else launch
    call(k, v, slots, k_slots, v_slots)


def launch(k: Tensor, v: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
    check_append_kv(k, v, slots, k_slots, v_slots)
    dtype = dtype_number("k_slots", k_slots)
    tokens, heads, k_dim = k.shape
    k_row, k_head, k_last = k.stride()
    if k_last != 1:
        k = k.contiguous()
        k_row, k_head, _ = k.stride()
    v_row, v_head, v_last = v.stride()
    if v_last != 1:
        v = v.contiguous()
        v_row, v_head, _ = v.stride()
    slots = slots.contiguous()
    _core.append_kv(
        dtype,
        tokens,
        heads,
        k_slots.shape[0],
        slots.data_ptr(),
        slots.dtype is torch.int64,
        k.data_ptr(),
        k_row,
        k_head,
        k_dim,
        k_slots.data_ptr(),
        k_slots.stride(0),
        k_slots.stride(1),
        v.data_ptr(),
        v_row,
        v_head,
        v_slots.shape[2],
        v_slots.data_ptr(),
        v_slots.stride(0),
        v_slots.stride(1),
        torch.get_num_threads(),
    )
