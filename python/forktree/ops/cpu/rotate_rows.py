"""`forktree.ops.rotate_rows` by `csrc/rotate_rows.cpp`."""

import torch
from torch import Tensor

from forktree import _core
from forktree.ops.checks import check_rotate_rows
from forktree.ops.dtypes import dtype_number


def rotate_rows(q: Tensor, shift: Tensor, inv_freq: Tensor, *, interleaved: bool, rotary_dim: int) -> Tensor:
    out: Tensor = torch.ops.forktree.rotate_rows.default(q, shift, inv_freq, interleaved, rotary_dim)
    return out


def launch(q: Tensor, shift: Tensor, inv_freq: Tensor, interleaved: bool, rotary_dim: int) -> Tensor:
    check_rotate_rows(q, shift, inv_freq, rotary_dim)
    dtype = dtype_number("q", q)
    rows, heads, dim = q.shape
    row_stride, head_stride, last_stride = q.stride()
    if last_stride != 1:
        q = q.contiguous()
        row_stride, head_stride, _ = q.stride()
    shift, inv_freq = shift.contiguous(), inv_freq.double().contiguous()
    out = q.new_empty(rows, heads, dim)
    _core.rotate_rows(
        dtype,
        q.data_ptr(),
        row_stride,
        head_stride,
        rows,
        heads,
        dim,
        shift.data_ptr(),
        shift.dtype is torch.int64,
        inv_freq.data_ptr(),
        rotary_dim // 2,
        interleaved,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
