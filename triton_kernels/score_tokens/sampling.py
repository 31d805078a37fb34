"""Sampling by the Gumbel trick over tiles of 64 tokens: the state of a row, its merge over splits, and the outcome."""

from __future__ import annotations

import triton
import triton.language as tl

from forktree.ops.sampling import TILE as NOISE_TILE
from forktree.triton_kernels.score_tokens.logits import NO_TOKEN, _soft_capped

TILE = tl.constexpr(NOISE_TILE)


@triton.jit
def _noise(key, tile):
    """Returns what `forktree.ops.sampling.noise` does: the logarithm of an exponential number, and a uniform number.

    Near 0 the exponential number needs every digit: there it is -log(1 - v) = 2 atanh(v / (2 - v)), as a series.
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
def _no_argmax(BLOCK_T: tl.constexpr):
    """Returns the state of no tokens for `_gumbel_argmax`."""
    lowest, zero = tl.full([BLOCK_T], float("-inf"), tl.float32), tl.zeros([BLOCK_T], tl.float32)
    return lowest, zero, lowest, zero, tl.zeros([BLOCK_T], tl.int32)


@triton.jit
def _gumbel_argmax(s, first, key, greedy, argmax, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr):
    """Updates the rows' Gumbel argmax with the shaped logits [V, T] of a tile.

    The state is top, mass, best score, and the shaped logit and token that have this score.
    """
    top, mass, best, chosen, sampled = argmax
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
    wins = score_best > best
    if tl.max(wins.to(tl.int32)) > 0:
        within = tl.arange(0, TILE)[None, :, None]
        reached = (p > 0) & (tl.cumsum(p, 1) > (uniform * masses)[:, None, :])
        reached = tl.where(greedy[None, None, :], s == high[:, None, :], reached)
        at = tl.min(tl.where(reached, within, TILE), 1)
        at = tl.where(at == TILE, tl.max(tl.where(p > 0, within, 0), 1), at)  # rounding: the last possible one
        shaped = tl.sum(tl.where(within == at[:, None, :], s, 0.0), 1)
        of = tl.min(tl.where(score == score_best[None, :], number[:, None], TILES), 0)  # the first of equal ones
        leading = number[:, None] == of[None, :]
        chosen = tl.where(wins, tl.sum(tl.where(leading, shaped, 0.0), 0), chosen)
        sampled = tl.where(wins, tl.sum(tl.where(leading, tile[:, None] * TILE + at, 0), 0), sampled)
        best = tl.where(wins, score_best, best)
    higher = tl.maximum(top, tl.max(high, 0))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    mass = mass * tl.exp(top - base) + tl.sum(masses * tl.exp(high - base[None, :]), 0)
    return higher, mass, best, chosen, sampled


@triton.jit
def _store_state(state, rows, splits, row, split, real, of_logits, argmax):
    """Stores the STATE_FIELDS fields of the rows' state in a split."""
    field = rows * splits
    at = state + row * splits + split
    tl.store(at, of_logits[0], mask=real)
    tl.store(at + field, of_logits[1], mask=real)
    tl.store(at + 2 * field, of_logits[2], mask=real)
    tl.store(at + 3 * field, argmax[0], mask=real)
    tl.store(at + 4 * field, argmax[1], mask=real)
    tl.store(at + 5 * field, argmax[2], mask=real)
    tl.store(at + 6 * field, argmax[3], mask=real)
    tl.store(at + 7 * field, argmax[4].to(tl.float32, bitcast=True), mask=real)


@triton.jit
def _merge_argmax(state, row, rows, split, splits):
    """Merges the Gumbel argmax states of rows [T, 1], or of one row, over splits [1, S] or [S]."""
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
    sampled = tl.min(tl.where(live & (score == best), token, NO_TOKEN), axis, keep_dims=True)  # the lower of equal ones
    shaped = tl.max(tl.where(live & (score == best) & (token == sampled), shaped, float("-inf")), axis)
    return tl.max(top, axis), mass, tl.max(score, axis), shaped, tl.min(sampled, axis)


@triton.jit
def _sample_candidates(s, id, floor, high, key):
    """Samples a candidate that reaches `floor`, as `_gumbel_argmax` does from tiles; also returns its log-prob."""
    p = tl.where(s >= floor, tl.exp(s - high), 0.0)
    tile = id // TILE
    same = tile[:, None] == tile[None, :]
    mass = tl.sum(tl.where(same, p[None, :], 0.0), 1)
    log_exponential, uniform = _noise(key, tile)
    score = tl.where(p > 0, tl.log(mass) - log_exponential, float("-inf"))
    winner = tl.min(tl.where(score == tl.max(score), tile, NO_TOKEN))
    mine = (tile == winner) & (p > 0)
    before = tl.sum(tl.where(same & (id[None, :] <= id[:, None]), p[None, :], 0.0), 1)
    token = tl.min(tl.where(mine & (before > uniform * mass), id, NO_TOKEN))
    token = tl.where(token == NO_TOKEN, tl.max(tl.where(mine, id, 0)), token)
    chosen = tl.max(tl.where(mine & (id == token), s, float("-inf")))
    return token, chosen - high - tl.log(tl.sum(p))


@triton.jit
def _write_sample(
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
    """Writes the tokens sampled for rows [N]; computes their logits once more."""
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
    z = _soft_capped(z * scale, softcap, SOFTCAP)
    tl.store(out_token + row, token.to(tl.int64), mask=real)
    tl.store(out_logit + row, tl.where(wrong, float("nan"), z), mask=real)
    tl.store(out_log_prob + row, tl.where(wrong, float("nan"), log_prob), mask=real)
