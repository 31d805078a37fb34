"""`forktree.ops.merge_states` by `csrc/merge_states.cu`."""

import torch
from torch import Tensor

from forktree import _core
from forktree.ops.checks import check_lists, check_merge_states
from forktree.ops.cuda.stream import stream_of
from forktree.ops.dtypes import dtype_number


def merge_states(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    merged: tuple[Tensor, Tensor] = torch.ops.forktree.merge_states.default(o, lse, indptr, index)
    return merged


def launch(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    check_merge_states(o, lse, indptr, index)
    if o.is_cpu:
        check_lists(indptr, index, o.shape[0])
    dtype = dtype_number("o", o)
    states, heads, dim = o.shape
    o, lse, indptr, index = o.contiguous(), lse.contiguous(), indptr.contiguous(), index.contiguous()
    tokens = indptr.numel() - 1
    out, total = o.new_empty(tokens, heads, dim), lse.new_empty(tokens, heads)
    with torch.cuda.device_of(o):
        _core.cuda_merge_states(
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
            stream_of(o),
        )
    return out, total
