"""Specification of `forktree.ops.tree_attention`: one softmax a token over all its rows see in the layout."""

import numpy as np
import torch
from torch import Tensor

from forktree.ops.reference.precision import math_dtype
from forktree.plan.plan import AttentionPlan


def tree_attention(
    q: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    layout, dtype = plan.layout, math_dtype(q)
    heads, group = q.shape[1], q.shape[1] // k_slots.shape[1]
    out = q.new_zeros(layout.num_tokens, heads, v_slots.shape[2], dtype=dtype)
    lse = q.new_full((layout.num_tokens, heads), -torch.inf, dtype=dtype)
    for token in range(layout.num_tokens):
        scores, values = [], []  # over the token's rows: [Hq, L], [L, Hq, Dv]
        for row in np.flatnonzero(layout.row_token == token).tolist():
            index, position = layout.visible(row, plan.window)
            slots = torch.from_numpy(layout.slot_index[index]).to(q.device).long()
            k = k_slots[slots].to(dtype).repeat_interleave(group, 1)
            s = torch.einsum("hd,lhd->hl", q[row].to(dtype), k) * scale
            if softcap is not None:
                s = softcap * torch.tanh(s / softcap)
            if alibi_slopes is not None:
                distance = torch.from_numpy(position - layout.row_pos[row]).to(s)
                s = s + alibi_slopes.to(dtype)[:, None] * distance
            scores.append(s)
            values.append(v_slots[slots].to(dtype).repeat_interleave(group, 1))
        if sinks is not None:
            scores.append(sinks.to(dtype)[:, None])
            values.append(out.new_zeros(1, *out.shape[1:]))
        if sum(s.shape[1] for s in scores):
            s = torch.cat(scores, 1)
            lse[token] = s.logsumexp(1)
            weight = s.softmax(1).masked_fill(lse[token, :, None] == -torch.inf, 0)  # all are: -inf - -inf
            out[token] = torch.einsum("hl,lhd->hd", weight, torch.cat(values))
    return out.to(q.dtype), lse.float()
