"""The pass over the vocabulary: what one reading of `lm_head` can keep of every row."""

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
from forktree.triton_kernels.score_tokens.nucleus_kernel import BINS
from forktree.triton_kernels.score_tokens.sampling import _gumbel_argmax, _no_argmax, _store_state
from forktree.triton_kernels.score_tokens.topk_list import EMPTY_KEY, _insert, _pack_keys


@triton.jit(do_not_specialize=["rows", "splits", "tiles"], do_not_specialize_on_alignment=PER_ROW)
def _score_tokens(
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
    lists,
    counts,
    arrivals,
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
    ENTROPY: tl.constexpr,
    LISTS: tl.constexpr,
    LIST: tl.constexpr,
    SHAPED_LIST: tl.constexpr,
    CLEARED: tl.constexpr,
):
    """Grid: row tiles x splits; a split is `tiles` tiles of the vocabulary.

    SHAPED_LIST: the last of the LISTS holds shaped logits. Clears the counts and arrivals of `_search_again`, if given.
    """
    row_tiles = tl.cdiv(rows, BLOCK_T)
    program = tl.program_id(0)
    split = program // row_tiles
    row = program % row_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    real = row < rows
    row = tl.minimum(row, rows - 1)
    if counts is not None:
        for first in range(program * CLEARED, rows * BINS, row_tiles * splits * CLEARED):
            bin = first + tl.arange(0, CLEARED)
            tl.store(counts + bin, tl.zeros([CLEARED], tl.int64), mask=bin < rows * BINS)
        tl.store(arrivals + program % row_tiles, 0, mask=split == 0)

    lowest, zero = tl.full([BLOCK_T], float("-inf"), tl.float32), tl.zeros([BLOCK_T], tl.float32)
    top, mass, weighted = lowest, zero, zero
    minimum = tl.full([BLOCK_T], EMPTY_KEY, tl.int64)
    shaped_minimum = minimum
    list_at = lists
    shaped_at = lists
    if LISTS > 0:
        list_at = lists + (row.to(tl.int64) * splits + split) * LIST
        shaped_at = list_at + (LISTS - 1) * rows.to(tl.int64) * splits * LIST
        place = tl.arange(0, LIST)[None, :]
        for i in tl.static_range(LISTS):
            empty = list_at[:, None] + i * rows.to(tl.int64) * splits * LIST + place
            tl.store(empty, tl.full([BLOCK_T, LIST], EMPTY_KEY, tl.int64), mask=real[:, None])
    argmax = _no_argmax(BLOCK_T)
    key = tl.zeros([BLOCK_T], tl.int64)
    inverse, greedy = zero, real
    at = tl.zeros([BLOCK_T], tl.int32)
    end = at
    if keys is not None:
        key = tl.load(keys + row)
        inverse, greedy = _inverse_temperature(settings, row)
        if edit_ids is not None:
            at, end = _first_edits(edit_indptr, edit_ids, row, split * tiles * BLOCK_V)

    for first in range(split * tiles * BLOCK_V, tl.minimum((split + 1) * tiles * BLOCK_V, vocab), BLOCK_V):
        token = first + tl.arange(0, BLOCK_V)
        z = _logits(hidden, lm_head, bias, token, row, vocab, scale, softcap, H, BLOCK_V, BLOCK_T, BLOCK_K, SOFTCAP)
        higher = tl.maximum(top, tl.max(z, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp(z - base[None, :])
        decay = tl.exp(top - base)
        if ENTROPY:
            shift = tl.where(top == float("-inf"), 0.0, top - base)
            weighted = decay * (weighted + shift * mass)
            weighted += tl.sum(tl.where(p == 0, 0.0, p * (z - base[None, :])), 0)
        mass = mass * decay + tl.sum(p, 0)
        top = higher
        inside = (token < vocab)[:, None]
        if LISTS > SHAPED_LIST:
            minimum = _insert(list_at, real, minimum, tl.where(inside, _pack_keys(z, token[:, None]), EMPTY_KEY), LIST)
        if keys is not None:
            edits = (edit_ids, edit_ops, edit_values, allowed)
            s, at = _shape_logits(z, token, first, row, at, end, edits, inverse, vocab, BLOCK_V)
            argmax = _gumbel_argmax(s, first, key, greedy, argmax, BLOCK_V, BLOCK_T)
            if SHAPED_LIST:
                shaped_key = tl.where(s == float("-inf"), EMPTY_KEY, _pack_keys(s, token[:, None]))
                shaped_minimum = _insert(shaped_at, real, shaped_minimum, shaped_key, LIST)

    _store_state(state, rows, splits, row, split, real, (top, mass, weighted), argmax)
