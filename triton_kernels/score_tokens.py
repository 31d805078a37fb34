"""`forktree.ops.score_tokens`: lm_head streamed once, its logits never leave the multiprocessors.

A step cannot be faster than V * H elements of lm_head leave memory (1.24 GB, 290 us at 4.3 TB/s, for 151,936 x 4,096 in
bf16), as long as its rows are few: one row costs 2 FLOP an element, so that 64 rows want 275 of the 780 TFLOP/s that a
matrix product reaches there. Hence few wide tiles in flight, and everything else beside the loop over them.

Grid: row tiles x splits of the vocabulary, the row tiles innermost, as programs that run together then share what they
read. A program walks the tiles of its split and keeps of each row what can be kept in one pass: maximum, mass and
weighted mass of the logits; the same of the shaped ones; the tile of 64 tokens that leads the draw, and its token; the
best logits as sorted lists in scratch, merged only where a tile holds something better. `_reduce_scores` merges the
splits of each row in a fixed order, and settles top-k, top-p and min-p from the 64 best. Rows whose threshold lies
below those are left to `_search_again`: launched always, ended at once where there is none, it finds the threshold by
radix search over the bits of the logits, three digits each for top-k and top-p, and then draws. The host never waits.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from forktree.ops.assemble import LmHead, VocabPass, VocabPassResult
from forktree.ops.dispatch import FLOATS, launcher
from forktree.ops.sampling import TILE as NOISE_TILE
from forktree.ops.token_request import REPETITION as REPEATED
from forktree.plan.cost_model import multiprocessors
from forktree.triton_kernels.device import architecture, device_of

TILE = tl.constexpr(NOISE_TILE)
REPETITION = tl.constexpr(REPEATED)
LISTED = 64  # the most that lists hold; candidates of draws that truncate
ROWS = 256  # of a launch, which bounds scratch
SCRATCH = 16 << 20  # bytes
PASSES = 7  # of `_search_again`: three digits for top-k, three for top-p, the draw
FIELDS = 8  # of a row's state in a split: top, mass, weighted, shaped top, shaped mass, score, shaped logit, token
RECORD = 7  # of a row left to `_search_again`: todo, digits, prefix, need, top-k's threshold, threshold, shaped top
EMPTY = tl.constexpr(-(2**63))  # of a list: below every key
NOBODY = tl.constexpr(2**31 - 1)
BINS = tl.constexpr(2048)
FIXED = tl.constexpr(float(2**40))  # masses relative to the greatest, as integers: their sums know no order
COUNT, MASS, DRAW = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # what a row left over is to do next
# Where these begin depends on the number of rows: not a reason to compile anew.
OF_ROWS = ["keys", "settings", "edit_indptr", "edit_ids", "edit_ops", "edit_values", "allowed"]
# Triton's interpreter multiplies bf16 as the integers it keeps them in.
WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


# ---------------------------------------------------------------------- logits of a tile


@triton.jit
def _capped(z, softcap, SOFTCAP: tl.constexpr):
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
    """[V, T] of a tile, -inf beyond the vocabulary. The vocabulary is M of the product: wide, where T may be narrow."""
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
    z = _capped(z * scale, softcap, SOFTCAP)
    return tl.where((token < vocab)[:, None], z, float("-inf"))


@triton.jit
def _first_edits(indptr, ids, row, first):
    """Of each row: its first edit at or behind token `first`, and the end of its edits."""
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
def _shaped(z, token, first, row, at, end, edits, inverse, vocab, BLOCK_V: tl.constexpr):
    """Logits of a tile, edited, masked and divided by the temperature; the rows' next edits."""
    ids, operations, values, allowed = edits
    s = z
    if ids is not None:
        here = tl.load(ids + at, mask=at < end, other=NOBODY)
        while tl.min(here) < first + BLOCK_V:
            real = here < first + BLOCK_V
            value = tl.load(values + at, mask=real, other=1.0)
            repeated = tl.load(operations + at, mask=real, other=0) == REPETITION
            divisor = tl.where(repeated, value, 1.0)
            penalised = s * tl.where(s > 0, (1 / divisor)[None, :], value[None, :])
            edited = tl.where(repeated[None, :], penalised, s + value[None, :])
            s = tl.where(token[:, None] == here[None, :], edited, s)
            at += real.to(tl.int32)
            here = tl.load(ids + at, mask=at < end, other=NOBODY)
    if allowed is not None:
        words = (vocab + 31) // 32
        word = tl.load(allowed + row[None, :] * words + (token >> 5)[:, None], mask=(token < vocab)[:, None], other=0)
        s = tl.where(((word >> (token & 31)[:, None]) & 1) != 0, s, float("-inf"))
    return s * inverse[None, :], at


# ---------------------------------------------------------------------- draws


@triton.jit
def _noise(key, tile):
    """`forktree.ops.sampling.noise`: log of the exponential, and the uniform number.

    Near 0 the exponential needs every digit: there -log(1 - v) = 2 atanh(v / (2 - v)), as a series.
    """
    z = (key.to(tl.uint64) ^ tile.to(tl.uint64)) + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    high, low = (z >> 32).to(tl.int64), (z & 0xFFFFFFFF).to(tl.int64)
    v = (high.to(tl.float32) + 0.5) * 2.0**-32
    rest = ((0xFFFFFFFF - high).to(tl.float32) + 0.5) * 2.0**-32
    y = v / (2 - v)
    square = y * y
    series = tl.full(y.shape, 1 / 17, tl.float32)
    for i in tl.static_range(8):
        series = series * square + 1 / (15 - 2 * i)
    exponential = tl.where(v < 0.5, 2 * y * series, -tl.log(rest))
    return tl.log(exponential), low.to(tl.float32) * 2.0**-32


@triton.jit
def _lead(s, first, key, greedy, leader, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr):
    """Takes a tile's shaped logits [V, T] into the rows' state: top, mass, best score, its shaped logit and token."""
    top, mass, best, chosen, drawn = leader
    TILES: tl.constexpr = BLOCK_V // TILE
    number = tl.arange(0, TILES)
    tile = first // TILE + number
    s = tl.reshape(s, [TILES, TILE, BLOCK_T])
    high = tl.max(s, 1)
    base = tl.where(high == float("-inf"), 0.0, high)
    p = tl.exp(s - base[:, None, :])
    masses = tl.sum(p, 1)
    log_exponential, uniform = _noise(key[None, :], tile[:, None])
    score = tl.where(greedy[None, :], high, base + tl.log(masses) - log_exponential)
    score = tl.where(high == float("-inf"), float("-inf"), score)
    score_best = tl.max(score, 0)
    leads = score_best > best
    if tl.max(leads.to(tl.int32)) > 0:
        within = tl.arange(0, TILE)[None, :, None]
        reached = (p > 0) & (tl.cumsum(p, 1) > (uniform * masses)[:, None, :])
        reached = tl.where(greedy[None, None, :], s == high[:, None, :], reached)
        at = tl.min(tl.where(reached, within, TILE), 1)
        at = tl.where(at == TILE, tl.max(tl.where(p > 0, within, 0), 1), at)  # rounding: the last that can be
        shaped = tl.sum(tl.where(within == at[:, None, :], s, 0.0), 1)
        of = tl.min(tl.where(score == score_best[None, :], number[:, None], TILES), 0)  # the first of equals
        leading = number[:, None] == of[None, :]
        chosen = tl.where(leads, tl.sum(tl.where(leading, shaped, 0.0), 0), chosen)
        drawn = tl.where(leads, tl.sum(tl.where(leading, tile[:, None] * TILE + at, 0), 0), drawn)
        best = tl.where(leads, score_best, best)
    higher = tl.maximum(top, tl.max(high, 0))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    mass = mass * tl.exp(top - base) + tl.sum(masses * tl.exp(high - base[None, :]), 0)
    return higher, mass, best, chosen, drawn


@triton.jit
def _nobody_leads(BLOCK_T: tl.constexpr):
    """The state that `_lead` begins with."""
    lowest, zero = tl.full([BLOCK_T], float("-inf"), tl.float32), tl.zeros([BLOCK_T], tl.float32)
    return lowest, zero, lowest, zero, tl.zeros([BLOCK_T], tl.int32)


@triton.jit
def _tempered(settings, row):
    """Of each row: 1 / temperature, and whether the most likely token is taken."""
    temperature = tl.load(settings + row).to(tl.float32)
    greedy = temperature == 0
    return 1 / tl.where(greedy, 1.0, temperature), greedy


# ---------------------------------------------------------------------- lists


@triton.jit
def _ordered(x):
    """int32 that compare as the numbers do."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _keys(x, token):
    """int64 that compare as (number, lower token first) do."""
    return (_ordered(x).to(tl.int64) << 32) | (token ^ NOBODY).to(tl.int64)


@triton.jit
def _unkeyed(key):
    """Number and token; -inf where the list is empty."""
    bits = (key >> 32).to(tl.int32)
    x = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(key == EMPTY, float("-inf"), x), (key & 0x7FFFFFFF).to(tl.int32) ^ NOBODY


@triton.jit
def _listed(at, real, least, key, LIST: tl.constexpr):
    """Takes the keys [V, T] of a tile into the rows' lists, descending, at pointers [T]. Returns their least [T]."""
    if tl.max((key > least[None, :]).to(tl.int32)) > 0:
        place = tl.arange(0, LIST)[None, :]
        tl.debug_barrier()  # what other threads have stored
        held = tl.load(at[:, None] + (LIST - 1 - place), mask=real[:, None], other=EMPTY)
        best = tl.bitonic_merge(tl.maximum(tl.topk(tl.trans(key), LIST), held), descending=True)
        tl.debug_barrier()
        tl.store(at[:, None] + place, best, mask=real[:, None])
        least = tl.min(best, 1)
    return least


@triton.jit
def _merged(at, splits, SPLITS: tl.constexpr, LIST: tl.constexpr, CHUNK: tl.constexpr, SORTED: tl.constexpr):
    """The best of a row's lists [splits, LIST], descending; the lists are used up.

    No key below the LIST-th of the lists' first ones can be among them: few are left to be sorted.
    """
    floor = tl.full([], EMPTY, tl.int64)
    if SPLITS > LIST:
        split = tl.arange(0, SPLITS)
        floor = tl.min(tl.topk(tl.load(at + split * LIST, mask=split < splits, other=EMPTY), LIST))
    count = 0
    for first in range(0, splits * LIST, CHUNK):
        place = first + tl.arange(0, CHUNK)
        key = tl.load(at + place, mask=place < splits * LIST, other=EMPTY)
        taken = (key >= floor) & (key > EMPTY)
        to = count + tl.cumsum(taken.to(tl.int32), 0) - 1
        count += tl.sum(taken.to(tl.int32))
        tl.debug_barrier()
        tl.store(at + to, key, mask=taken)  # behind what is read later
        tl.debug_barrier()
    best = tl.full([LIST], EMPTY, tl.int64)
    for first in range(0, count, SORTED):
        place = first + tl.arange(0, SORTED)
        key = tl.load(at + place, mask=place < count, other=EMPTY)
        best = tl.bitonic_merge(tl.maximum(tl.topk(key, LIST), tl.flip(best, 0)), descending=True)
    return best


# ---------------------------------------------------------------------- the pass over the vocabulary


@triton.jit(do_not_specialize=["rows", "splits", "tiles"], do_not_specialize_on_alignment=OF_ROWS)
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
    """Grid: row tiles x splits; a split is `tiles` tiles.

    SHAPED_LIST: the last of the LISTS is one of shaped logits. Clears counts and arrivals of `_search_again`, if given.
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
    least = tl.full([BLOCK_T], EMPTY, tl.int64)
    shaped_least = least
    list_at = lists
    shaped_at = lists
    if LISTS > 0:
        list_at = lists + (row.to(tl.int64) * splits + split) * LIST
        shaped_at = list_at + (LISTS - 1) * rows.to(tl.int64) * splits * LIST
        place = tl.arange(0, LIST)[None, :]
        for i in tl.static_range(LISTS):
            empty = list_at[:, None] + i * rows.to(tl.int64) * splits * LIST + place
            tl.store(empty, tl.full([BLOCK_T, LIST], EMPTY, tl.int64), mask=real[:, None])
    leader = _nobody_leads(BLOCK_T)
    key = tl.zeros([BLOCK_T], tl.int64)
    inverse, greedy = zero, real
    at = tl.zeros([BLOCK_T], tl.int32)
    end = at
    if keys is not None:
        key = tl.load(keys + row)
        inverse, greedy = _tempered(settings, row)
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
            least = _listed(list_at, real, least, tl.where(inside, _keys(z, token[:, None]), EMPTY), LIST)
        if keys is not None:
            edits = (edit_ids, edit_ops, edit_values, allowed)
            s, at = _shaped(z, token, first, row, at, end, edits, inverse, vocab, BLOCK_V)
            leader = _lead(s, first, key, greedy, leader, BLOCK_V, BLOCK_T)
            if SHAPED_LIST:
                shaped_key = tl.where(s == float("-inf"), EMPTY, _keys(s, token[:, None]))
                shaped_least = _listed(shaped_at, real, shaped_least, shaped_key, LIST)

    _store_state(state, rows, splits, row, split, real, (top, mass, weighted), leader)


@triton.jit
def _store_state(state, rows, splits, row, split, real, of_logits, leader):
    field = rows * splits
    at = state + row * splits + split
    tl.store(at, of_logits[0], mask=real)
    tl.store(at + field, of_logits[1], mask=real)
    tl.store(at + 2 * field, of_logits[2], mask=real)
    tl.store(at + 3 * field, leader[0], mask=real)
    tl.store(at + 4 * field, leader[1], mask=real)
    tl.store(at + 5 * field, leader[2], mask=real)
    tl.store(at + 6 * field, leader[3], mask=real)
    tl.store(at + 7 * field, leader[4].to(tl.float32, bitcast=True), mask=real)


@triton.jit
def _merged_leaders(state, row, rows, split, splits):
    """Shaped top and mass, best score, shaped logit and token of it: of rows [T, 1] or one, in splits [1, S] or [S]."""
    field = rows * splits
    at = state + row * splits + split
    live = split < splits
    axis: tl.constexpr = len(at.shape) - 1
    top = tl.load(at + 3 * field, mask=live, other=float("-inf"), cache_modifier=".cg")
    mass = tl.load(at + 4 * field, mask=live, other=0.0, cache_modifier=".cg")
    score = tl.load(at + 5 * field, mask=live, other=float("-inf"), cache_modifier=".cg")
    shaped = tl.load(at + 6 * field, mask=live, other=float("-inf"), cache_modifier=".cg")
    token = tl.load(at + 7 * field, mask=live, other=0.0, cache_modifier=".cg").to(tl.int32, bitcast=True)
    high = tl.max(top, axis, keep_dims=True)
    mass = tl.sum(mass * tl.exp(top - tl.where(high == float("-inf"), 0.0, high)), axis)
    best = tl.max(score, axis, keep_dims=True)
    drawn = tl.min(tl.where(live & (score == best), token, NOBODY), axis, keep_dims=True)  # the lower of equals
    shaped = tl.max(tl.where(live & (score == best) & (token == drawn), shaped, float("-inf")), axis)
    return tl.max(top, axis), mass, tl.max(score, axis), shaped, tl.min(drawn, axis)


# ---------------------------------------------------------------------- one row, all splits


@triton.jit
def _finish(
    hidden,
    lm_head,
    bias,
    row,
    real,
    token,
    log_prob,
    wrong,
    outputs,
    scale,
    softcap,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Writes what was drawn for rows [N]; the token's logit is computed once more."""
    out_token, out_logit, out_log_prob = outputs
    token = tl.where(wrong, 0, token)
    products = tl.zeros([row.shape[0], BLOCK_H], tl.float32)
    for first in range(0, H, BLOCK_H):
        k = first + tl.arange(0, BLOCK_H)[None, :]
        inside = real[:, None] & (k < H)
        h = tl.load(hidden + row[:, None] * H + k, mask=inside, other=0.0).to(tl.float32)
        products += h * tl.load(lm_head + token.to(tl.int64)[:, None] * H + k, mask=inside, other=0.0).to(tl.float32)
    z = tl.sum(products, 1)
    if bias is not None:
        z += tl.load(bias + token).to(tl.float32)
    z = _capped(z * scale, softcap, SOFTCAP)
    tl.store(out_token + row, token.to(tl.int64), mask=real)
    tl.store(out_logit + row, tl.where(wrong, float("nan"), z), mask=real)
    tl.store(out_log_prob + row, tl.where(wrong, float("nan"), log_prob), mask=real)


@triton.jit
def _threshold(s, high, mass, top_k, top_p, min_p, vocab, LIST: tl.constexpr):
    """The threshold of a row, from its best LIST shaped logits, descending; whether it surely is that."""
    rank = tl.arange(0, LIST)
    lowest = tl.min(s)
    complete = (vocab <= LIST) | (lowest == float("-inf"))  # no others are left
    p = tl.exp(s - high)
    bounded = (top_k > 0) & (top_k < vocab)
    floor = tl.max(tl.where(bounded & (rank == top_k - 1), s, float("-inf")))
    unsure = bounded & (complete == 0) & ((top_k > LIST) | (floor == lowest))  # of how much top-k leaves
    p = tl.where(s >= floor, p, 0.0)
    total = tl.where(bounded & (floor > float("-inf")), tl.sum(p), mass)
    reached = tl.cumsum(p, 0) >= tl.where(top_p < 1, top_p * total, float("inf"))
    floor = tl.maximum(floor, tl.max(tl.where(reached, s, float("-inf"))))
    unsure &= top_p < 1
    floor = tl.maximum(floor, high + tl.log(min_p))  # -inf for 0
    return floor, complete | ((floor > lowest) & (unsure == 0))


@triton.jit
def _drawn_among(s, id, floor, high, key):
    """As `_lead` draws from tiles: of the candidates that reach the threshold one token, and its log-prob."""
    p = tl.where(s >= floor, tl.exp(s - high), 0.0)
    tile = id // TILE
    same = tile[:, None] == tile[None, :]
    mass = tl.sum(tl.where(same, p[None, :], 0.0), 1)
    log_exponential, uniform = _noise(key, tile)
    score = tl.where(p > 0, tl.log(mass) - log_exponential, float("-inf"))
    lead = tl.min(tl.where(score == tl.max(score), tile, NOBODY))
    mine = (tile == lead) & (p > 0)
    before = tl.sum(tl.where(same & (id[None, :] <= id[:, None]), p[None, :], 0.0), 1)
    token = tl.min(tl.where(mine & (before > uniform * mass), id, NOBODY))
    token = tl.where(token == NOBODY, tl.max(tl.where(mine, id, 0)), token)
    chosen = tl.max(tl.where(mine & (id == token), s, float("-inf")))
    return token, chosen - high - tl.log(tl.sum(p))


@triton.jit(do_not_specialize=["rows", "splits"], do_not_specialize_on_alignment=OF_ROWS)
def _reduce_scores(
    hidden,
    lm_head,
    bias,
    keys,
    settings,
    state,
    lists,
    record,
    out_lse,
    out_entropy,
    out_top_ids,
    out_top_logits,
    out_token,
    out_logit,
    out_log_prob,
    rows,
    vocab,
    splits,
    scale,
    softcap,
    H: tl.constexpr,
    SPLITS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    TOP_K: tl.constexpr,
    LISTS: tl.constexpr,
    LIST: tl.constexpr,
    SHAPED_LIST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr,
    SORTED: tl.constexpr,
):
    """Grid: rows. With a record rows may be truncated: those that the lists do not settle are left in it."""
    row = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    field = rows * splits
    at = state + row * splits + split
    tops = tl.load(at, mask=split < splits, other=float("-inf"))
    top = tl.max(tops)
    decay = tl.exp(tops - tl.where(top == float("-inf"), 0.0, top))
    masses = tl.load(at + field, mask=split < splits, other=0.0)
    mass = tl.sum(masses * decay)
    lse = top + tl.log(mass)
    tl.store(out_lse + row, lse)
    if ENTROPY:
        weighted = tl.load(at + 2 * field, mask=split < splits, other=0.0)
        shift = tl.where(tops == float("-inf"), 0.0, tops - top)
        tl.store(out_entropy + row, tl.log(mass) - tl.sum(decay * (weighted + shift * masses)) / mass)

    best = tl.full([LIST], EMPTY, tl.int64)
    rank = tl.arange(0, LIST)
    list_at = lists
    if LISTS > 0:
        list_at = lists + row.to(tl.int64) * splits * LIST
    if LISTS > SHAPED_LIST:
        best = _merged(list_at, splits, SPLITS, LIST, CHUNK, SORTED)
        if TOP_K > 0:
            z, id = _unkeyed(best)
            tl.store(out_top_ids + row * TOP_K + rank, id.to(tl.int64), mask=rank < TOP_K)
            tl.store(out_top_logits + row * TOP_K + rank, z, mask=rank < TOP_K)

    if keys is not None:
        high, shaped_mass, _, shaped, token = _merged_leaders(state, row, rows, split, splits)
        inverse, greedy = _tempered(settings, row)
        log_prob = tl.where(greedy, 0.0, shaped - high - tl.log(shaped_mass))
        wrong = (tl.abs(lse) < float("inf")) & (shaped_mass > 0) & (tl.abs(high) < float("inf"))
        wrong = wrong == 0
        if record is not None:
            if SHAPED_LIST:
                list_at += (LISTS - 1) * rows.to(tl.int64) * splits * LIST
                best = _merged(list_at, splits, SPLITS, LIST, CHUNK, SORTED)
            s, id = _unkeyed(best)
            if SHAPED_LIST == 0:
                s *= inverse
            top_k = tl.load(settings + rows + row).to(tl.int64)
            top_p = tl.load(settings + 2 * rows + row)
            min_p = tl.load(settings + 3 * rows + row).to(tl.float32)
            bounded = (top_k > 0) & (top_k < vocab)
            todo = 0
            if (wrong == 0) & (greedy == 0) & (bounded | (top_p < 1) | (min_p > 0)):
                floor, settled = _threshold(s, high, shaped_mass, top_k, top_p.to(tl.float32), min_p, vocab, LIST)
                if settled:
                    token, log_prob = _drawn_among(s, id, floor, high, tl.load(keys + row))
                else:
                    todo = tl.where(bounded, COUNT, tl.where(top_p < 1, MASS, DRAW))
                    tl.store(record + rows + row, 0)
                    tl.store(record + 2 * rows + row, 0)
                    tl.store(record + 3 * rows + row, top_k)
                    tl.store(record + 4 * rows + row, 0)
                    tl.store(record + 5 * rows + row, _unsigned(high + tl.log(min_p)))
                    tl.store(record + 6 * rows + row, _unsigned(high))
            tl.store(record + row, todo)
        one = row + tl.arange(0, 1)
        _finish(
            hidden,
            lm_head,
            bias,
            one,
            one < rows,
            tl.zeros([1], tl.int32) + token,
            tl.zeros([1], tl.float32) + log_prob,
            (one >= rows) | wrong,
            (out_token, out_logit, out_log_prob),
            scale,
            softcap,
            H,
            BLOCK_H,
            SOFTCAP,
        )


# ---------------------------------------------------------------------- rows that the best 64 do not settle


@triton.jit
def _unsigned(x):
    """Integers in [0, 2^32) that compare as the numbers do."""
    return _ordered(x).to(tl.int64) + 2147483648


@triton.jit
def _digit(digits):
    """Where the next digit lies: how many bits are below it, and how many it has: 11, 11, 10."""
    return tl.where(digits == 0, 21, tl.where(digits == 1, 10, 0)), tl.where(digits == 2, 10, 11)


@triton.jit
def _advance(record, counts, settings, row, rows, real, todo, BLOCK_B: tl.constexpr):
    """Finds a digit of the threshold of each row that searches, and clears its counts."""
    seeking = real & ((todo == COUNT) | (todo == MASS))
    digits = tl.load(record + rows + row)
    prefix = tl.load(record + 2 * rows + row)
    need = tl.load(record + 3 * rows + row)
    bins = counts + row[:, None] * BINS
    place = tl.arange(0, BLOCK_B)[None, :]
    top_p = tl.load(settings + 2 * rows + row)
    if tl.max((seeking & (todo == MASS) & (digits == 0)).to(tl.int32)) > 0:
        total = tl.zeros(row.shape, tl.int64)
        for first in range(0, BINS, BLOCK_B):
            total += tl.sum(tl.load(bins + first + place, mask=seeking[:, None], other=0, cache_modifier=".cg"), 1)
        share = tl.maximum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), 1)
        need = tl.where((todo == MASS) & (digits == 0), share, need)
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
    _, width = _digit(digits)
    prefix = (prefix << width) | digit
    missing = digit < 0  # fewer are left than top-k takes
    ends = (digits == 2) | missing
    found = tl.where(missing, 0, prefix)
    next = tl.where((todo == COUNT) & (top_p < 1), MASS, DRAW)
    tl.store(record + row, tl.where(ends, next, todo).to(tl.int64), mask=seeking)
    tl.store(record + rows + row, tl.where(ends, 0, digits + 1), mask=seeking)
    tl.store(record + 2 * rows + row, tl.where(ends, 0, prefix), mask=seeking)
    tl.store(record + 3 * rows + row, short, mask=seeking)
    tl.store(record + 4 * rows + row, found, mask=seeking & ends & (todo == COUNT))
    held = tl.load(record + 5 * rows + row)
    tl.store(record + 5 * rows + row, tl.maximum(held, found), mask=seeking & ends)


@triton.jit(do_not_specialize=["rows", "splits", "tiles"], do_not_specialize_on_alignment=OF_ROWS)
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
    """Grid: that of `_score_tokens`. Takes every row of the record one step on; ends at once where it is empty.

    Who searches adds up, of the logits that begin with the digits known, count or mass by the next digit. Who knows
    the threshold draws. The last program of a row tile concludes.
    """
    row_tiles = tl.cdiv(rows, BLOCK_T)
    program = tl.program_id(0)
    split = program // row_tiles
    row = program % row_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    real = row < rows
    row = tl.minimum(row, rows - 1)
    todo = tl.where(real, tl.load(record + row), 0)
    if tl.max(todo) > 0:
        seeking, drawing = (todo == COUNT) | (todo == MASS), todo == DRAW
        digits = tl.load(record + rows + row)
        prefix = tl.load(record + 2 * rows + row)
        floor = tl.load(record + 5 * rows + row)
        floor = tl.where(drawing, floor, tl.where(todo == MASS, tl.load(record + 4 * rows + row), 0))
        high = (tl.load(record + 6 * rows + row) - 2147483648).to(tl.int32)
        high = (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        shift, width = _digit(digits)
        key = tl.load(keys + row)
        inverse, greedy = _tempered(settings, row)
        at = tl.zeros([BLOCK_T], tl.int32)
        end = at
        if edit_ids is not None:
            at, end = _first_edits(edit_indptr, edit_ids, row, split * tiles * BLOCK_V)
        leader = _nobody_leads(BLOCK_T)
        for first in range(split * tiles * BLOCK_V, tl.minimum((split + 1) * tiles * BLOCK_V, vocab), BLOCK_V):
            token = first + tl.arange(0, BLOCK_V)
            z = _logits(hidden, lm_head, bias, token, row, vocab, scale, softcap, H, BLOCK_V, BLOCK_T, BLOCK_K, SOFTCAP)
            edits = (edit_ids, edit_ops, edit_values, allowed)
            s, at = _shaped(z, token, first, row, at, end, edits, inverse, vocab, BLOCK_V)
            bits = _unsigned(s)
            kept = (s > float("-inf")) & (bits >= floor[None, :])
            if tl.max(seeking.to(tl.int32)) > 0:
                counted = kept & seeking[None, :] & (bits >> (shift + width)[None, :] == prefix[None, :])
                bin = (bits >> shift[None, :]) & ((1 << width) - 1)[None, :]
                share = tl.where((todo == MASS)[None, :], tl.exp(s - high[None, :]) * FIXED, 1.0).to(tl.int64)
                tl.atomic_add(counts + row[None, :] * BINS + bin, share, mask=counted, sem="relaxed")
            if tl.max(drawing.to(tl.int32)) > 0:
                s = tl.where(kept & drawing[None, :], s, float("-inf"))
                leader = _lead(s, first, key, greedy, leader, BLOCK_V, BLOCK_T)
        zero = tl.zeros([BLOCK_T], tl.float32)
        _store_state(state, rows, splits, row, split, drawing, (zero, zero, zero), leader)

        tl.debug_barrier()  # what all threads have stored comes before the counting
        if tl.atomic_add(arrivals + program % row_tiles, 1, sem="acq_rel", scope="gpu") == splits - 1:
            tl.debug_barrier()  # what any thread has seen counted, all may read
            tl.store(arrivals + program % row_tiles, 0)  # for the next pass
            if tl.max(seeking.to(tl.int32)) > 0:
                _advance(record, counts, settings, row, rows, real, todo, BLOCK_B)
            if tl.max(drawing.to(tl.int32)) > 0:
                best = tl.full([BLOCK_T], float("-inf"), tl.float32)
                top, mass, chosen, drawn = best, zero, zero, tl.zeros([BLOCK_T], tl.int32)
                for first in range(0, splits, BLOCK_B):
                    some = first + tl.arange(0, BLOCK_B)[None, :]
                    merged = _merged_leaders(state, row[:, None], rows, some, splits)
                    leads = merged[2] > best
                    best = tl.where(leads, merged[2], best)
                    chosen = tl.where(leads, merged[3], chosen)
                    drawn = tl.where(leads, merged[4], drawn)
                    higher = tl.maximum(top, merged[0])
                    base = tl.where(higher == float("-inf"), 0.0, higher)
                    mass = mass * tl.exp(top - base) + merged[1] * tl.exp(merged[0] - base)
                    top = higher
                _finish(
                    hidden,
                    lm_head,
                    bias,
                    row,
                    drawing,
                    drawn,
                    chosen - top - tl.log(mass),
                    mass == 0,
                    (out_token, out_logit, out_log_prob),
                    scale,
                    softcap,
                    H,
                    BLOCK_B,
                    SOFTCAP,
                )
                tl.store(record + row, 0, mask=drawing)


# ---------------------------------------------------------------------- launcher


@dataclass(frozen=True)
class Config:
    block_v: int  # tokens of a tile
    block_t: int  # rows of a tile
    block_k: int  # elements of the product read at once
    num_warps: int
    num_stages: int


INTERPRETED = Config(128, 16, 32, 4, 1)  # small tiles: several of each for small tests
INTERPRETED_PROGRAMS = 3


def config(arch: int, itemsize: int, rows: int) -> Config:
    """What is launched on an architecture (80, 90, ...) for so many rows.

    Two programs of four warps share a multiprocessor's registers: while one looks at its logits the other streams. But
    on sm_80 and sm_100 64 rows spill heavily in four warps, in the loop over elements too, and have eight, one program.
    What is left spills beside that loop (bench/kernels.py), mostly in sorting. A stage takes (block_v + block_t) *
    block_k elements of shared memory. fp32 products run on the ordinary cores. Nothing of this was measured.
    """
    if itemsize == 4:
        return Config(64, 16, 32, 4, 3)
    block_t = 16 if rows <= 16 else 32 if rows <= 32 else 64
    large = 90 <= arch < 120  # in shared memory
    return Config(128, block_t, 64, 4 if block_t < 64 or arch == 90 else 8, 4 if large else 3)


def launch(hidden: Tensor, lm_head: LmHead, wanted: VocabPass) -> VocabPassResult:
    """More than 64 best tokens, and fp64, are left to the torch backend."""
    if wanted.top_k > LISTED or hidden.dtype not in FLOATS:
        found: VocabPassResult = launcher("torch", "score_tokens")(hidden, lm_head, wanted)
        return found
    rows, hidden = len(hidden), hidden.contiguous()
    found = VocabPassResult.empty(hidden, wanted)
    keys, settings, indptr, allowed = wanted.keys, wanted.settings, wanted.edit_indptr, wanted.allowed
    for begin in range(0, rows, ROWS):
        part = slice(begin, begin + ROWS)
        of_part = wanted._replace(
            keys=None if keys is None else keys[part],
            settings=None if settings is None else settings[:, part].contiguous(),
            edit_indptr=None if indptr is None else indptr[begin : begin + ROWS + 1],
            allowed=None if allowed is None else allowed[part],
        )
        _launch(hidden[part], lm_head, of_part, VocabPassResult(*(x[part] if len(x) else x for x in found)))
    return found


def divided(rows: int, vocab: int, chosen: Config, programs: int, listed: int, truncates: bool) -> tuple[int, int]:
    """Splits of the vocabulary, and tiles of each: work for so many programs, in bounded scratch. listed: of a row."""
    room = (SCRATCH - truncates * rows * (BINS.value + RECORD) * 8) // (rows * (FIELDS * 4 + listed * 8))
    tiles = triton.cdiv(vocab, chosen.block_v)
    of_split = triton.cdiv(tiles, max(1, min(programs // triton.cdiv(rows, chosen.block_t), room)))
    return triton.cdiv(tiles, of_split), of_split


def _launch(hidden: Tensor, lm_head: LmHead, wanted: VocabPass, found: VocabPassResult) -> None:
    """Up to ROWS rows, into `found`."""
    (weight, bias, scale, softcap), (rows, size) = lm_head, hidden.shape
    vocab, top_k, truncates = len(weight), wanted.top_k, wanted.has_truncation
    edits, allowed = wanted.edits, wanted.allowed
    softcap = softcap or 0.0
    if hidden.is_cpu:
        chosen, programs = INTERPRETED, INTERPRETED_PROGRAMS
    else:
        chosen = config(architecture(hidden.device), hidden.element_size(), rows)
        programs = 2 * multiprocessors(hidden.device)
    own_list = truncates and (edits[1] is not None or allowed is not None)
    lists = int(own_list) + int(top_k > 0 or (truncates and not own_list))
    listed = LISTED if truncates else max(16, triton.next_power_of_2(top_k))
    row_tiles = triton.cdiv(rows, chosen.block_t)
    splits, of_split = divided(rows, vocab, chosen, programs, lists * listed, truncates)
    state = found.lse.new_empty(FIELDS, rows, splits)
    best = found.top_ids.new_empty(lists, rows, splits, listed) if lists else None
    record = found.top_ids.new_empty(RECORD, rows) if truncates else None
    counts = found.top_ids.new_empty(rows, BINS.value) if truncates else None
    arrivals = found.top_ids.new_empty(row_tiles, dtype=torch.int32) if truncates else None
    tile = dict(BLOCK_V=chosen.block_v, BLOCK_T=chosen.block_t, BLOCK_K=chosen.block_k)
    head = hidden, weight, bias, wanted.keys, wanted.settings
    lists_of = dict(LISTS=lists, LIST=listed, SHAPED_LIST=int(own_list))
    with device_of(hidden):
        _score_tokens[(row_tiles * splits,)](
            *head,
            *edits,
            allowed,
            state,
            best,
            counts,
            arrivals,
            rows,
            vocab,
            splits,
            of_split,
            scale,
            softcap,
            H=size,
            **tile,
            SOFTCAP=softcap > 0,
            ENTROPY=wanted.entropy,
            **lists_of,
            CLEARED=1024,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )
        _reduce_scores[(rows,)](
            *head,
            state,
            best,
            record,
            *found,
            rows,
            vocab,
            splits,
            scale,
            softcap,
            H=size,
            SPLITS=triton.next_power_of_2(splits),
            SOFTCAP=softcap > 0,
            ENTROPY=wanted.entropy,
            TOP_K=top_k,
            **lists_of,
            BLOCK_H=1024,
            CHUNK=1024,
            SORTED=128,
            num_warps=4,
        )
        for _ in range(PASSES if truncates else 0):
            _search_again[(row_tiles * splits,)](
                *head,
                *edits,
                allowed,
                state,
                record,
                counts,
                arrivals,
                *found[4:],
                rows,
                vocab,
                splits,
                of_split,
                scale,
                softcap,
                H=size,
                **tile,
                SOFTCAP=softcap > 0,
                BLOCK_B=64,
                num_warps=chosen.num_warps,
                num_stages=chosen.num_stages,
            )
