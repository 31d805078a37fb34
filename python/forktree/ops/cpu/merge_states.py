"""`forktree.ops.merge_states` by `csrc/merge_states.cpp`."""

import torch
from torch import Tensor

from forktree import _core
from forktree.ops.checks import check_merge_states
from forktree.ops.dtypes import dtype_number


def merge_states(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    merged: tuple[Tensor, Tensor] = torch.ops.forktree.merge_states.default(o, lse, indptr, index)
    return merged


def launch(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    check_merge_states(o, lse, indptr, index)
    dtype = dtype_number("o", o)
    states, heads, dim = o.shape
    o, lse, indptr, index = o.contiguous(), lse.contiguous(), indptr.contiguous(), index.contiguous()
    tokens = indptr.numel() - 1
    out, total = o.new_empty(tokens, heads, dim), lse.new_empty(tokens, heads)
    _core.merge_states(
        dtype,
        o.data_ptr(),
        lse.data_ptr(),
        states,
        heads,
        dim,
        indptr.data_ptr(),
        indptr.dtype is torch.int64,
        tokens + 1,
        index.data_ptr(),
        index.dtype is torch.int64,
        index.numel(),
        out.data_ptr(),
        total.data_ptr(),
        torch.get_num_threads(),
    )
    return out, total
