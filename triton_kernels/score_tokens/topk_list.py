"""Sorted lists of the best (number, token) pairs, as int64 keys."""

from __future__ import annotations

import triton
import triton.language as tl

from forktree.triton_kernels.score_tokens.logits import NO_TOKEN

EMPTY_KEY = tl.constexpr(-(2**63))  # below every key


@triton.jit
def _sortable(x):
    """Returns int32 that compare as the numbers `x` do."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _pack_keys(x, token):
    """Returns int64 that compare as the pairs (number, token) do, the lower token being the greater."""
    return (_sortable(x).to(tl.int64) << 32) | (token ^ NO_TOKEN).to(tl.int64)


@triton.jit
def _unpack_keys(key):
    """Returns the number, -inf where the list is empty, and the token of each key."""
    bits = (key >> 32).to(tl.int32)
    x = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(key == EMPTY_KEY, float("-inf"), x), (key & 0x7FFFFFFF).to(tl.int32) ^ NO_TOKEN


@triton.jit
def _insert(at, real, minimum, key, LIST: tl.constexpr):
    """Inserts the keys [V, T] of a tile into the rows' descending lists at pointers [T]; returns their minima [T]."""
    if tl.max((key > minimum[None, :]).to(tl.int32)) > 0:
        place = tl.arange(0, LIST)[None, :]
        tl.debug_barrier()  # sees what other threads have stored
        stored = tl.load(at[:, None] + (LIST - 1 - place), mask=real[:, None], other=EMPTY_KEY)
        best = tl.bitonic_merge(tl.maximum(tl.topk(tl.trans(key), LIST), stored), descending=True)
        tl.debug_barrier()
        tl.store(at[:, None] + place, best, mask=real[:, None])
        minimum = tl.min(best, 1)
    return minimum


@triton.jit
def _merge_lists(
    at,
    splits,
    SPLITS: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_SORT: tl.constexpr,
):
    """Returns the best keys of a row's lists [splits, LIST], descending; overwrites the lists.

    No key below the LIST-th greatest of the lists' first keys can be among them: few keys are left to be sorted.
    """
    floor = tl.full([], EMPTY_KEY, tl.int64)
    if SPLITS > LIST:
        split = tl.arange(0, SPLITS)
        floor = tl.min(tl.topk(tl.load(at + split * LIST, mask=split < splits, other=EMPTY_KEY), LIST))
    count = 0
    for first in range(0, splits * LIST, BLOCK_KEYS):
        place = first + tl.arange(0, BLOCK_KEYS)
        key = tl.load(at + place, mask=place < splits * LIST, other=EMPTY_KEY)
        taken = (key >= floor) & (key > EMPTY_KEY)
        to = count + tl.cumsum(taken.to(tl.int32), 0) - 1
        count += tl.sum(taken.to(tl.int32))
        tl.debug_barrier()
        tl.store(at + to, key, mask=taken)  # before anything that is still to be read
        tl.debug_barrier()
    best = tl.full([LIST], EMPTY_KEY, tl.int64)
    for first in range(0, count, BLOCK_SORT):
        place = first + tl.arange(0, BLOCK_SORT)
        key = tl.load(at + place, mask=place < count, other=EMPTY_KEY)
        best = tl.bitonic_merge(tl.maximum(tl.topk(key, LIST), tl.flip(best, 0)), descending=True)
    return best
