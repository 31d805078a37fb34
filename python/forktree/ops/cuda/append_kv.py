"""`forktree.ops.append_kv` by `csrc/append_kv.cu`."""

import torch
from torch import Tensor

from forktree import _core
from forktree.ops.checks import check_append_kv, check_slots
from forktree.ops.cuda.stream import stream_of
from forktree.ops.dtypes import dtype_number
from forktree.ops.watched import is_watched


def append_kv(k: Tensor, v: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
    call = torch.ops.forktree.append_kv.default if is_watched(k) else launch
    call(k, v, slots, k_slots, v_slots)


def launch(k: Tensor, v: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
    check_append_kv(k, v, slots, k_slots, v_slots)
    if slots.is_cpu:
        check_slots(slots, k_slots.shape[0])
    dtype = dtype_number("k_slots", k_slots)
    tokens, heads, k_dim = k.shape
    if k.stride(2) != 1:
        k = k.contiguous()
    if v.stride(2) != 1:
        v = v.contiguous()
    slots = slots.contiguous()
    with torch.cuda.device_of(k):
        _core.cuda_append_kv(
            dtype,
            tokens,
            heads,
            k_slots.shape[0],
            slots.data_ptr(),
            slots.dtype is torch.int64,
            k.data_ptr(),
            k.stride(0),
            k.stride(1),
            k_dim,
            k_slots.data_ptr(),
            k_slots.stride(0),
            k_slots.stride(1),
            v.data_ptr(),
            v.stride(0),
            v.stride(1),
            v_slots.shape[2],
            v_slots.data_ptr(),
            v_slots.stride(0),
            v_slots.stride(1),
            stream_of(k),
        )
