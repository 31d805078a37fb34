"""Merges the splits of each row, and settles top-k, top-p and min-p where the row's best tokens suffice."""

from __future__ import annotations

import triton
import triton.language as tl

from forktree.triton_kernels.score_tokens.logits import PER_ROW, _inverse_temperature
from forktree.triton_kernels.score_tokens.nucleus_kernel import SAMPLE, SEEK_TOP_K, SEEK_TOP_P, _radix_key
from forktree.triton_kernels.score_tokens.sampling import _merge_argmax, _sample_candidates, _write_sample
from forktree.triton_kernels.score_tokens.topk_list import EMPTY_KEY, _merge_lists, _unpack_keys


@triton.jit
def _threshold(s, high, mass, top_k, top_p, min_p, vocab, LIST: tl.constexpr):
    """Returns the threshold of a row, by its best LIST shaped logits, descending, and whether these settle it."""
    rank = tl.arange(0, LIST)
    lowest = tl.min(s)
    complete = (vocab <= LIST) | (lowest == float("-inf"))  # there are no other tokens
    p = tl.exp(s - high)
    bounded = (top_k > 0) & (top_k < vocab)
    floor = tl.max(tl.where(bounded & (rank == top_k - 1), s, float("-inf")))
    unsure = bounded & (complete == 0) & ((top_k > LIST) | (floor == lowest))  # how much mass top-k leaves
    p = tl.where(s >= floor, p, 0.0)
    total = tl.where(bounded & (floor > float("-inf")), tl.sum(p), mass)
    reached = tl.cumsum(p, 0) >= tl.where(top_p < 1, top_p * total, float("inf"))
    floor = tl.maximum(floor, tl.max(tl.where(reached, s, float("-inf"))))
    unsure &= top_p < 1
    floor = tl.maximum(floor, high + tl.log(min_p))  # -inf for 0
    return floor, complete | ((floor > lowest) & (unsure == 0))


@triton.jit(do_not_specialize=["rows", "splits"], do_not_specialize_on_alignment=PER_ROW)
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
    BLOCK_KEYS: tl.constexpr,
    BLOCK_SORT: tl.constexpr,
):
    """Grid: rows. Merges the splits; rows whose threshold the lists do not settle are left in `record`."""
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

    best = tl.full([LIST], EMPTY_KEY, tl.int64)
    rank = tl.arange(0, LIST)
    list_at = lists
    if LISTS > 0:
        list_at = lists + row.to(tl.int64) * splits * LIST
    if LISTS > SHAPED_LIST:
        best = _merge_lists(list_at, splits, SPLITS, LIST, BLOCK_KEYS, BLOCK_SORT)
        if TOP_K > 0:
            z, id = _unpack_keys(best)
            tl.store(out_top_ids + row * TOP_K + rank, id.to(tl.int64), mask=rank < TOP_K)
            tl.store(out_top_logits + row * TOP_K + rank, z, mask=rank < TOP_K)

    if keys is not None:
        high, shaped_mass, _, shaped, token = _merge_argmax(state, row, rows, split, splits)
        inverse, greedy = _inverse_temperature(settings, row)
        log_prob = tl.where(greedy, 0.0, shaped - high - tl.log(shaped_mass))
        wrong = (tl.abs(lse) < float("inf")) & (shaped_mass > 0) & (tl.abs(high) < float("inf"))
        wrong = wrong == 0
        if record is not None:
            if SHAPED_LIST:
                list_at += (LISTS - 1) * rows.to(tl.int64) * splits * LIST
                best = _merge_lists(list_at, splits, SPLITS, LIST, BLOCK_KEYS, BLOCK_SORT)
            s, id = _unpack_keys(best)
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
                    token, log_prob = _sample_candidates(s, id, floor, high, tl.load(keys + row))
                else:
                    todo = tl.where(bounded, SEEK_TOP_K, tl.where(top_p < 1, SEEK_TOP_P, SAMPLE))
                    tl.store(record + rows + row, 0)
                    tl.store(record + 2 * rows + row, 0)
                    tl.store(record + 3 * rows + row, top_k)
                    tl.store(record + 4 * rows + row, 0)
                    tl.store(record + 5 * rows + row, _radix_key(high + tl.log(min_p)))
                    tl.store(record + 6 * rows + row, _radix_key(high))
            tl.store(record + row, todo)
        one = row + tl.arange(0, 1)
        _write_sample(
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
