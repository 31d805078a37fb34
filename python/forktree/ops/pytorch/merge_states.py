"""`forktree.ops.merge_states` without a loop over tokens: the k-th partial of every token at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forktree.ops.checks import check_lists, math_dtype
from forktree.types import AnyArray


@dataclass(frozen=True)
class MergeLists:
    """Which partials each output has, longest lists first."""

    outputs: int
    rounds: list[Tensor]  # K tensors [T_k] int64: the k-th partial of the T_k outputs that have one
    order: Tensor | None  # [T] int64: output of each line; None = line t is output t
    line: Tensor | None  # [T] int64: line of each output


def merge_lists(indptr: AnyArray, index: AnyArray, device: torch.device) -> MergeLists:
    """From lists as CSR: indptr [T+1], index [P]."""
    count = np.diff(indptr)
    longest = np.argsort(-count, kind="stable")
    begin, count = indptr[:-1][longest], count[longest]
    rounds = []
    for k in range(count.max(initial=0)):
        n = np.searchsorted(-count, -k)  # lists longer than k
        rounds.append(torch.from_numpy(index[begin[:n] + k].astype(np.int64)).to(device))
    if (count[1:] == count[:-1]).all():
        return MergeLists(count.size, rounds, None, None)
    line = np.empty_like(longest)
    line[longest] = np.arange(longest.size)
    return MergeLists(count.size, rounds, torch.from_numpy(longest).to(device), torch.from_numpy(line).to(device))


def combine(
    o: Tensor, top: Tensor, mass: Tensor | None, lists: MergeLists, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs [T, X, Dv] and log-sum-exp [T, X] of partials o [P, X, Dv], top and mass [P, X].

    A partial is o = sum of exp(s - top) v and mass = sum of exp(s - top); without mass, top is the
    log-sum-exp of a finished one. sinks [T, X]: one more logit without value.
    """
    outputs = lists.outputs
    lowest = torch.finfo(top.dtype).min  # instead of -inf, as -inf - -inf is NaN
    highest = top.new_full((outputs, top.shape[1]), lowest)
    for partials in lists.rounds:
        n = partials.numel()
        torch.maximum(highest[:n], top.index_select(0, partials), out=highest[:n])
    if sinks is not None:
        sinks = sinks if lists.order is None else sinks.index_select(0, lists.order)
        highest = torch.maximum(highest, sinks)
    out = o.new_zeros(outputs, *o.shape[1:])
    total = torch.zeros_like(highest) if sinks is None else (sinks - highest).exp_()
    for partials in lists.rounds:
        n = partials.numel()
        weight = (top.index_select(0, partials) - highest[:n]).exp_()
        out[:n].addcmul_(o.index_select(0, partials), weight.unsqueeze(-1))
        total[:n].add_(weight if mass is None else weight * mass.index_select(0, partials))
    out.div_(total.masked_fill(total == 0, 1.0).unsqueeze(-1))
    lse = total.log_().add_(highest)
    if lists.line is not None:
        out, lse = out.index_select(0, lists.line), lse.index_select(0, lists.line)
    return out, lse


@torch.no_grad()
def launch(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    check_lists(indptr, index, o.shape[0])
    lists = merge_lists(indptr.cpu().numpy(), index.cpu().numpy(), o.device)
    known = o.to(math_dtype(o)).masked_fill((lse == -torch.inf).unsqueeze(-1), 0)  # 0 * NaN is NaN
    out, total = combine(known, lse, None, lists)
    return out.to(o.dtype), total
