"""Logits of a vocab tile: the product, and what a request makes of them before it samples."""

from __future__ import annotations

import triton
import triton.language as tl

from forktree.ops.token_request import REPETITION as REPEATED
from forktree.triton_kernels.device import WIDEN

REPETITION = tl.constexpr(REPEATED)
NO_TOKEN = tl.constexpr(2**31 - 1)  # above every token
# The alignment of these depends on the number of rows: no reason to compile anew.
PER_ROW = ["keys", "settings", "edit_indptr", "edit_ids", "edit_ops", "edit_values", "allowed"]


@triton.jit
def _soft_capped(z, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        z = softcap * (1 - 2 / (tl.exp(z * (2 / softcap)) + 1))
    return z


@triton.jit
def _logits(
    hidden,
    lm_head,
    bias,
    token,
    row,
    vocab,
    scale,
    softcap,
    H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Returns logits [V, T] of a tile, -inf beyond the vocabulary, which is M of the product: T may be narrow."""
    k = tl.arange(0, BLOCK_K)
    known = tl.minimum(token, vocab - 1)
    w_at = lm_head + known.to(tl.int64)[:, None] * H + k[None, :]
    h_at = hidden + row[None, :] * H + k[:, None]
    z = tl.zeros([BLOCK_V, BLOCK_T], tl.float32)
    for first in range(0, H, BLOCK_K):
        if H % BLOCK_K == 0:
            w, h = tl.load(w_at), tl.load(h_at)
        else:
            w = tl.load(w_at, mask=first + k[None, :] < H, other=0.0)
            h = tl.load(h_at, mask=first + k[:, None] < H, other=0.0)
        if WIDEN:
            w, h = w.to(tl.float32), h.to(tl.float32)
        z = tl.dot(w, h, z, input_precision="ieee")
        w_at += BLOCK_K
        h_at += BLOCK_K
    if bias is not None:
        z += tl.load(bias + known).to(tl.float32)[:, None]
    z = _soft_capped(z * scale, softcap, SOFTCAP)
    return tl.where((token < vocab)[:, None], z, float("-inf"))


@triton.jit
def _first_edits(indptr, ids, row, first):
    """Returns each row's first edit whose token is `first` or later, and the end of its edits."""
    at, end = tl.load(indptr + row), tl.load(indptr + row + 1)
    until = end
    while tl.max(until - at) > 0:
        middle = (at + until) // 2
        open = at < until
        below = open & (tl.load(ids + middle, mask=open, other=0) < first)
        until = tl.where(open & (below == 0), middle, until)
        at = tl.where(below, middle + 1, at)
    return at, end


@triton.jit
def _shape_logits(z, token, first, row, at, end, edits, inverse, vocab, BLOCK_V: tl.constexpr):
    """Edits and masks the logits of a tile and divides them by the temperature; also returns the rows' next edits."""
    ids, operations, values, allowed = edits
    s = z
    if ids is not None:
        here = tl.load(ids + at, mask=at < end, other=NO_TOKEN)
        while tl.min(here) < first + BLOCK_V:
            real = here < first + BLOCK_V
            value = tl.load(values + at, mask=real, other=1.0)
            repeated = tl.load(operations + at, mask=real, other=0) == REPETITION
            divisor = tl.where(repeated, value, 1.0)
            penalised = s * tl.where(s > 0, (1 / divisor)[None, :], value[None, :])
            edited = tl.where(repeated[None, :], penalised, s + value[None, :])
            s = tl.where(token[:, None] == here[None, :], edited, s)
            at += real.to(tl.int32)
            here = tl.load(ids + at, mask=at < end, other=NO_TOKEN)
    if allowed is not None:
        words = (vocab + 31) // 32
        word = tl.load(allowed + row[None, :] * words + (token >> 5)[:, None], mask=(token < vocab)[:, None], other=0)
        s = tl.where(((word >> (token & 31)[:, None]) & 1) != 0, s, float("-inf"))
    return s * inverse[None, :], at


@triton.jit
def _inverse_temperature(settings, row):
    """Returns for each row 1 / temperature, and whether it takes the most likely token."""
    temperature = tl.load(settings + row).to(tl.float32)
    greedy = temperature == 0
    return 1 / tl.where(greedy, 1.0, temperature), greedy
