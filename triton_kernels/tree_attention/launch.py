"""Launches the kernel of `forktree.ops.tree_attention`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from forktree.ops.dispatch import MAX_DIM
from forktree.ops.plan_tensors import PlanTensors
from forktree.ops.pool import AttentionOptions, KVPool
from forktree.plan.cost_model import multiprocessors
from forktree.triton_kernels.device import architecture, device_of
from forktree.triton_kernels.merge_states import LANES, LISTED
from forktree.triton_kernels.tree_attention.config import INTERPRETED, INTERPRETED_PROGRAMS, SEGS, config
from forktree.triton_kernels.tree_attention.kernel import _tree_attention

COUNTERS: dict[tuple[torch.device, int], list[Tensor]] = {}  # by device and stream, see `_counters`


def launch(q: Tensor, pool: KVPool, plan: PlanTensors, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    k_slots, v_slots, num_tokens, max_partials = pool.k, pool.v, plan.num_tokens, plan.max_partials
    softcap, sinks, alibi_slopes = options.softcap or 0.0, options.sinks, options.alibi_slopes
    heads, k_dim = q.shape[1:]
    kv_heads, v_dim = v_slots.shape[1:]
    if max(k_dim, v_dim) > MAX_DIM:
        raise ValueError(f"k and v of the pool must have head dims of at most {MAX_DIM}, got {k_dim} and {v_dim}")
    if q.stride(2) != 1:
        q = q.contiguous()
    out = q.new_empty(num_tokens, heads, v_dim)
    lse = q.new_empty(num_tokens, heads, dtype=torch.float32)
    scratch = lse.new_empty(max_partials * heads * (v_dim + 1))
    if q.is_cpu:
        chosen, programs = INTERPRETED, INTERPRETED_PROGRAMS
    else:
        dim = triton.next_power_of_2(max(k_dim, v_dim))
        packed_rows = q.shape[0] * heads // kv_heads
        biased = softcap > 0 or alibi_slopes is not None
        chosen = config(architecture(q.device), q.element_size(), dim, packed_rows, biased)
        programs = multiprocessors(q.device)
    with device_of(q):
        _tree_attention[(programs,)](
            q,
            k_slots,
            v_slots,
            plan.buffer,
            plan.slot_index,
            _per_head(sinks),
            _per_head(alibi_slopes),
            out,
            lse,
            scratch,
            _counters(num_tokens * heads, q.device),
            q.stride(0),
            q.stride(1),
            k_slots.stride(0),
            k_slots.stride(1),
            v_slots.stride(0),
            v_slots.stride(1),
            num_tokens,
            max_partials,
            kv_heads,
            heads // kv_heads,
            options.scale_of(k_dim),
            softcap,
            DK=k_dim,
            DV=v_dim,
            BLOCK_DK=max(16, triton.next_power_of_2(k_dim)),
            BLOCK_DV=max(16, triton.next_power_of_2(v_dim)),
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            SEGS=SEGS,
            SOFTCAP=softcap > 0,
            SINKS=sinks is not None,
            ALIBI=alibi_slopes is not None,
            STAGES=chosen.num_stages,
            LANES=LANES,
            LISTED=LISTED,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )
    return out, lse


def _per_head(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _counters(size: int, device: torch.device) -> Tensor:
    """Returns counters of the partials written for each output: zeros, which kernels leave zero.

    Launches on one stream follow each other, so each stream has one tensor. A tensor that has become too small is kept,
    as captured graphs hold its address.
    """
    stream = 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream
    held = COUNTERS.setdefault((device, stream), [])
    if not held or held[-1].numel() < size:
        held.append(torch.zeros(triton.next_power_of_2(max(size, 1024)), dtype=torch.int32, device=device))
    return held[-1]
