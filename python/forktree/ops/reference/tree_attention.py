"""Specification of `forktree.ops.tree_attention`: one softmax a token over all its rows see in the layout."""

import numpy as np
import torch
from torch import Tensor

from forktree.ops.checks import math_dtype
from forktree.ops.plan_tensors import PlanTensors
from forktree.ops.pool import AttentionOptions, KVPool


def launch(q: Tensor, pool: KVPool, plan: PlanTensors, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    assert plan.host is not None
    layout, window, dtype = plan.host.layout, plan.host.window, math_dtype(q)
    softcap, sinks, alibi_slopes = options.softcap, options.sinks, options.alibi_slopes
    heads, group = q.shape[1], q.shape[1] // pool.k.shape[1]
    out = q.new_zeros(layout.num_tokens, heads, pool.v.shape[2], dtype=dtype)
    lse = q.new_full((layout.num_tokens, heads), -torch.inf, dtype=dtype)
    for token in range(layout.num_tokens):
        scores, values = [], []  # over the token's rows: [Hq, L], [L, Hq, Dv]
        for row in np.flatnonzero(layout.row_token == token).tolist():
            index, position = layout.visible(row, window)
            slots = torch.from_numpy(layout.slot_index[index]).to(q.device).long()
            k = pool.k[slots].to(dtype).repeat_interleave(group, 1)
            s = torch.einsum("hd,lhd->hl", q[row].to(dtype), k) * options.scale_of(q.shape[2])
            if softcap is not None:
                s = softcap * torch.tanh(s / softcap)
            if alibi_slopes is not None:
                distance = torch.from_numpy(position - layout.row_pos[row]).to(s)
                s = s + alibi_slopes.to(dtype)[:, None] * distance
            scores.append(s)
            values.append(pool.v[slots].to(dtype).repeat_interleave(group, 1))
        if sinks is not None:
            scores.append(sinks.to(dtype)[:, None])
            values.append(out.new_zeros(1, *out.shape[1:]))
        if sum(s.shape[1] for s in scores):
            s = torch.cat(scores, 1)
            lse[token] = s.logsumexp(1)
            weight = s.softmax(1).masked_fill(lse[token, :, None] == -torch.inf, 0)  # all are: -inf - -inf
            out[token] = torch.einsum("hl,lhd->hd", weight, torch.cat(values))
    return out.to(q.dtype), lse.float()
