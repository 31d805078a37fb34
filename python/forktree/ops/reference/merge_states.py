"""Specification of `forktree.ops.merge_states`."""

import torch
from torch import Tensor

from forktree.ops.checks import check_lists, math_dtype


def launch(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    check_lists(indptr, index, o.shape[0])
    tokens = indptr.numel() - 1
    out = o.new_zeros(tokens, *o.shape[1:])
    total = lse.new_full((tokens, lse.shape[1]), -torch.inf)
    for t in range(tokens):
        mine = index[indptr[t] : indptr[t + 1]].long()
        total[t] = lse[mine].logsumexp(0)
        empty = lse[mine] == -torch.inf
        weight = lse[mine].softmax(0).masked_fill(empty, 0)  # all empty: -inf - -inf
        out[t] = (weight[..., None] * o[mine].to(math_dtype(o)).masked_fill(empty[..., None], 0)).sum(0)
    return out, total
