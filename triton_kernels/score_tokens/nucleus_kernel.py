"""Rows whose best tokens do not settle their threshold: radix search over the bits of their logits, then sampling."""

from __future__ import annotations

import triton
import triton.language as tl

from forktree.triton_kernels.score_tokens.logits import (
    PER_ROW,
    _first_edits,
    _inverse_temperature,
    _logits,
    _shape_logits,
)
from forktree.triton_kernels.score_tokens.sampling import (
    _gumbel_argmax,
    _merge_argmax,
    _no_argmax,
    _store_state,
    _write_sample,
)
from forktree.triton_kernels.score_tokens.topk_list import _sortable

BINS = tl.constexpr(2048)  # values of a digit
MASS_ONE = tl.constexpr(float(2**40))  # masses relative to the greatest, as integers: their sums know no order
SEEK_TOP_K, SEEK_TOP_P, SAMPLE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # what a row of the record does next


@triton.jit
def _radix_key(x):
    """Returns integers in [0, 2^32) that compare as the numbers `x` do."""
    return _sortable(x).to(tl.int64) + 2147483648


@triton.jit
def _digit_bits(digits):
    """Returns how many bits lie below the next digit, and how many it has: 11, 11, then 10."""
    return tl.where(digits == 0, 21, tl.where(digits == 1, 10, 0)), tl.where(digits == 2, 10, 11)


@triton.jit
def _find_digit(record, counts, settings, row, rows, real, todo, BLOCK_B: tl.constexpr):
    """Finds the next digit of the threshold of each row that seeks one, and clears its counts."""
    seeking = real & ((todo == SEEK_TOP_K) | (todo == SEEK_TOP_P))
    digits = tl.load(record + rows + row)
    prefix = tl.load(record + 2 * rows + row)
    need = tl.load(record + 3 * rows + row)
    bins = counts + row[:, None] * BINS
    place = tl.arange(0, BLOCK_B)[None, :]
    top_p = tl.load(settings + 2 * rows + row)
    if tl.max((seeking & (todo == SEEK_TOP_P) & (digits == 0)).to(tl.int32)) > 0:
        total = tl.zeros(row.shape, tl.int64)
        for first in range(0, BINS, BLOCK_B):
            total += tl.sum(tl.load(bins + first + place, mask=seeking[:, None], other=0, cache_modifier=".cg"), 1)
        share = tl.maximum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), 1)
        need = tl.where((todo == SEEK_TOP_P) & (digits == 0), share, need)
    above = tl.zeros(row.shape, tl.int64)
    digit = tl.full(row.shape, -1, tl.int64)
    short = need
    for first in range(0, BINS, BLOCK_B):
        bin = (first + place) ^ (BINS - 1)
        count = tl.load(bins + bin, mask=seeking[:, None], other=0, cache_modifier=".cg")
        tl.store(bins + bin, tl.zeros(count.shape, tl.int64), mask=seeking[:, None])
        reach = above[:, None] + tl.cumsum(count, 1)
        at = tl.min(tl.where(reach >= need[:, None], place, BLOCK_B), 1)
        here = (digit < 0) & (at < BLOCK_B)
        digit = tl.where(here, (first + at) ^ (BINS - 1), digit)
        before = tl.sum(tl.where(place < at[:, None], count, 0), 1)
        short = tl.where(here, need - above - before, short)
        above += tl.sum(count, 1)
    _, width = _digit_bits(digits)
    prefix = (prefix << width) | digit
    missing = digit < 0  # fewer tokens are left than top-k takes
    ends = (digits == 2) | missing
    found = tl.where(missing, 0, prefix)
    next = tl.where((todo == SEEK_TOP_K) & (top_p < 1), SEEK_TOP_P, SAMPLE)
    tl.store(record + row, tl.where(ends, next, todo).to(tl.int64), mask=seeking)
    tl.store(record + rows + row, tl.where(ends, 0, digits + 1), mask=seeking)
    tl.store(record + 2 * rows + row, tl.where(ends, 0, prefix), mask=seeking)
    tl.store(record + 3 * rows + row, short, mask=seeking)
    tl.store(record + 4 * rows + row, found, mask=seeking & ends & (todo == SEEK_TOP_K))
    stored = tl.load(record + 5 * rows + row)
    tl.store(record + 5 * rows + row, tl.maximum(stored, found), mask=seeking & ends)


@triton.jit(do_not_specialize=["rows", "splits", "tiles"], do_not_specialize_on_alignment=PER_ROW)
def _search_again(
    hidden,
    lm_head,
    bias,
    keys,
    settings,
    edit_indptr,
    edit_ids,
    edit_ops,
    edit_values,
    allowed,
    state,
    record,
    counts,
    arrivals,
    out_token,
    out_logit,
    out_log_prob,
    rows,
    vocab,
    splits,
    tiles,
    scale,
    softcap,
    H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Grid: that of `_score_tokens`. Takes every row of the record one step further; ends at once if there is none.

    Rows that seek their threshold histogram the next digit of the logits that match the known prefix, by count for
    top-k and by mass for top-p. Rows that know it sample. The last program of a row tile concludes the step.
    """
    row_tiles = tl.cdiv(rows, BLOCK_T)
    program = tl.program_id(0)
    split = program // row_tiles
    row = program % row_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    real = row < rows
    row = tl.minimum(row, rows - 1)
    todo = tl.where(real, tl.load(record + row), 0)
    if tl.max(todo) > 0:
        seeking, sampling = (todo == SEEK_TOP_K) | (todo == SEEK_TOP_P), todo == SAMPLE
        digits = tl.load(record + rows + row)
        prefix = tl.load(record + 2 * rows + row)
        floor = tl.load(record + 5 * rows + row)
        floor = tl.where(sampling, floor, tl.where(todo == SEEK_TOP_P, tl.load(record + 4 * rows + row), 0))
        high = (tl.load(record + 6 * rows + row) - 2147483648).to(tl.int32)
        high = (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        shift, width = _digit_bits(digits)
        key = tl.load(keys + row)
        inverse, greedy = _inverse_temperature(settings, row)
        at = tl.zeros([BLOCK_T], tl.int32)
        end = at
        if edit_ids is not None:
            at, end = _first_edits(edit_indptr, edit_ids, row, split * tiles * BLOCK_V)
        argmax = _no_argmax(BLOCK_T)
        for first in range(split * tiles * BLOCK_V, tl.minimum((split + 1) * tiles * BLOCK_V, vocab), BLOCK_V):
            token = first + tl.arange(0, BLOCK_V)
            z = _logits(hidden, lm_head, bias, token, row, vocab, scale, softcap, H, BLOCK_V, BLOCK_T, BLOCK_K, SOFTCAP)
            edits = (edit_ids, edit_ops, edit_values, allowed)
            s, at = _shape_logits(z, token, first, row, at, end, edits, inverse, vocab, BLOCK_V)
            bits = _radix_key(s)
            kept = (s > float("-inf")) & (bits >= floor[None, :])
            if tl.max(seeking.to(tl.int32)) > 0:
                counted = kept & seeking[None, :] & (bits >> (shift + width)[None, :] == prefix[None, :])
                bin = (bits >> shift[None, :]) & ((1 << width) - 1)[None, :]
                share = tl.where((todo == SEEK_TOP_P)[None, :], tl.exp(s - high[None, :]) * MASS_ONE, 1.0).to(tl.int64)
                tl.atomic_add(counts + row[None, :] * BINS + bin, share, mask=counted, sem="relaxed")
            if tl.max(sampling.to(tl.int32)) > 0:
                s = tl.where(kept & sampling[None, :], s, float("-inf"))
                argmax = _gumbel_argmax(s, first, key, greedy, argmax, BLOCK_V, BLOCK_T)
        zero = tl.zeros([BLOCK_T], tl.float32)
        _store_state(state, rows, splits, row, split, sampling, (zero, zero, zero), argmax)

        tl.debug_barrier()  # all threads' stores come before the counting
        if tl.atomic_add(arrivals + program % row_tiles, 1, sem="acq_rel", scope="gpu") == splits - 1:
            tl.debug_barrier()  # what one thread has seen counted, all may read
            tl.store(arrivals + program % row_tiles, 0)  # for the next pass
            if tl.max(seeking.to(tl.int32)) > 0:
                _find_digit(record, counts, settings, row, rows, real, todo, BLOCK_B)
            if tl.max(sampling.to(tl.int32)) > 0:
                best = tl.full([BLOCK_T], float("-inf"), tl.float32)
                top, mass, chosen, sampled = best, zero, zero, tl.zeros([BLOCK_T], tl.int32)
                for first in range(0, splits, BLOCK_B):
                    some = first + tl.arange(0, BLOCK_B)[None, :]
                    merged = _merge_argmax(state, row[:, None], rows, some, splits)
                    wins = merged[2] > best
                    best = tl.where(wins, merged[2], best)
                    chosen = tl.where(wins, merged[3], chosen)
                    sampled = tl.where(wins, merged[4], sampled)
                    higher = tl.maximum(top, merged[0])
                    base = tl.where(higher == float("-inf"), 0.0, higher)
                    mass = mass * tl.exp(top - base) + merged[1] * tl.exp(merged[0] - base)
                    top = higher
                _write_sample(
                    hidden,
                    lm_head,
                    bias,
                    row,
                    sampling,
                    sampled,
                    chosen - top - tl.log(mass),
                    mass == 0,
                    (out_token, out_logit, out_log_prob),
                    scale,
                    softcap,
                    H,
                    BLOCK_B,
                    SOFTCAP,
                )
                tl.store(record + row, 0, mask=sampling)
