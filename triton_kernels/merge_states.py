"""`forktree.ops.merge_states`: a program has some outputs and elements, and takes their lists some entries at once."""

import triton
import triton.language as tl
from torch import Tensor

from forktree.triton_kernels.device import device_of

LANES = 16  # (token, head) pairs of a program
LISTED = 4  # entries of their lists read at once: 16 * 4 * 128 elements are 32 registers of 256 threads
NUM_WARPS = 8


@triton.jit
def _merge(
    o,
    lse,
    index,
    begin,
    count,
    heads,
    head,
    m,
    mass,
    d,
    D: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Merges into state (0, m, mass) of each lane the states index[begin : begin + count] of its head: output, lse.

    Loads bypass the first-level cache, where states that other programs have just written may be missing.
    """
    acc = tl.zeros([LANES, BLOCK_D], tl.float32)
    base = m
    for first in range(0, tl.max(count), LISTED):
        entry = first + tl.arange(0, LISTED)
        real = entry[None, :] < count[:, None]
        number = tl.load(index + begin[:, None] + entry[None, :], mask=real, other=0)
        state = number.to(tl.int64) * heads + head[:, None]
        e = tl.load(lse + state, mask=real, other=float("-inf"), cache_modifier=".cg")
        stored = real[:, :, None] & (d < D)[None, None, :]
        x = tl.load(o + state[:, :, None] * D + d[None, None, :], mask=stored, other=0.0, cache_modifier=".cg")
        top = tl.maximum(m, tl.max(e, 1))
        base = tl.where(top == float("-inf"), 0.0, top)  # all empty: -inf - -inf would be NaN
        x = tl.where(e[:, :, None] == float("-inf"), 0.0, x.to(tl.float32))  # whatever an empty state's output holds
        weight = tl.exp(e - base[:, None])
        decay = tl.exp(m - base)
        mass = mass * decay + tl.sum(weight, 1)
        acc = acc * decay[:, None] + tl.sum(weight[:, :, None] * x, 1)
        m = top
    divisor = tl.where(mass == 0, 1.0, mass)
    return acc / divisor[:, None], tl.where(mass == 0, float("-inf"), m + tl.log(divisor))


@triton.jit(do_not_specialize=["outputs", "heads"])
def _merge_states(
    o,
    lse,
    indptr,
    index,
    out,
    total,
    outputs,
    heads,
    D: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Grid: (lanes of outputs [T * Hq], blocks of D)."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = lane < outputs
    token = lane // heads
    begin = tl.load(indptr + token, mask=real, other=0)
    end = tl.load(indptr + token + 1, mask=real, other=0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m = tl.full([LANES], float("-inf"), tl.float32)
    merged, state_lse = _merge(
        o, lse, index, begin, end - begin, heads, lane % heads, m, tl.zeros_like(m), d, D, LANES, BLOCK_D, LISTED
    )
    at = lane.to(tl.int64)
    tl.store(out + at[:, None] * D + d[None, :], merged.to(out.dtype.element_ty), mask=real[:, None] & (d[None, :] < D))
    if tl.program_id(1) == 0:
        tl.store(total + at, state_lse, mask=real)


def launch(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    o, lse, indptr, index = o.contiguous(), lse.contiguous(), indptr.contiguous(), index.contiguous()
    tokens, heads, dim = indptr.numel() - 1, *o.shape[1:]
    out, total = o.new_empty(tokens, heads, dim), lse.new_empty(tokens, heads)
    if not out.numel():
        return out, total
    block = min(triton.next_power_of_2(dim), 128)
    grid = triton.cdiv(tokens * heads, LANES), triton.cdiv(dim, block)
    with device_of(o):
        _merge_states[grid](
            o, lse, indptr, index, out, total, tokens * heads, heads, dim, LANES, block, LISTED, num_warps=NUM_WARPS
        )
    return out, total
