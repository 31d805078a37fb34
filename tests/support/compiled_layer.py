"""A layer of all operations, as torch.compile meets it."""

from dataclasses import replace

import torch

from forktree import ops
from forktree.ops import AttentionOptions, KVPool
from forktree.plan.plan import plan_attention
from layouts import chunk

SLOTS, HEADS, DIM = 509, 2, 16


class Layer(torch.nn.Module):
    """Appends, then computes from what it appended."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(32, 3 * HEADS * DIM)
        self.register_buffer("k_slots", torch.zeros(SLOTS, HEADS, DIM))
        self.register_buffer("v_slots", torch.zeros(SLOTS, HEADS, DIM))

    def forward(self, x, slots, shift, inv_freq, indptr, index, plan):
        q, k, v = self.project(x).view(-1, 3 * HEADS, DIM).split(HEADS, 1)
        pool = KVPool(self.k_slots, self.v_slots)
        ops.append_kv(k, v, slots, pool)
        q = ops.rotate_rows(q, shift, inv_freq)
        out, lse = ops.tree_attention(q, pool, plan, AttentionOptions(softcap=20.0), return_lse=True)
        out, lse = ops.merge_states(out, lse, indptr, index)
        return out * 2, lse


def inputs():
    return (
        torch.randn(4, 32),
        torch.tensor([300, 1, 508, 2]),
        torch.arange(4),
        10000.0 ** (-torch.arange(0, DIM, 2) / DIM),
        torch.tensor([0, 1, 4]),
        torch.tensor([2, 0, 1, 3]),
        plan_attention(layout(), num_qo_heads=HEADS, num_kv_heads=HEADS, head_dim=DIM),
    )


def layout():
    """A chunk of the four tokens, in the slots they are appended to."""
    return replace(chunk(4), slot_index=[300, 1, 508, 2])
