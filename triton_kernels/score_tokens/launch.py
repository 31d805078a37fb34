"""Launches the kernels of `forktree.ops.score_tokens`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from forktree.ops.assemble import LmHead, VocabPass, VocabPassResult
from forktree.ops.dispatch import FLOATS, launcher
from forktree.plan.cost_model import multiprocessors
from forktree.triton_kernels.device import architecture, device_of
from forktree.triton_kernels.score_tokens.config import (
    INTERPRETED,
    INTERPRETED_PROGRAMS,
    MAX_LIST,
    MAX_ROWS,
    RADIX_PASSES,
    RECORD_FIELDS,
    STATE_FIELDS,
    config,
    split_vocabulary,
)
from forktree.triton_kernels.score_tokens.nucleus_kernel import BINS, _search_again
from forktree.triton_kernels.score_tokens.pass_kernel import _score_tokens
from forktree.triton_kernels.score_tokens.reduce_kernel import _reduce_scores


def launch(hidden: Tensor, lm_head: LmHead, wanted: VocabPass) -> VocabPassResult:
    """Finds what is `wanted`. More than MAX_LIST best tokens, and fp64, are left to the torch backend."""
    if wanted.top_k > MAX_LIST or hidden.dtype not in FLOATS:
        found: VocabPassResult = launcher("torch", "score_tokens")(hidden, lm_head, wanted)
        return found
    rows, hidden = len(hidden), hidden.contiguous()
    found = VocabPassResult.empty(hidden, wanted)
    keys, settings, indptr, allowed = wanted.keys, wanted.settings, wanted.edit_indptr, wanted.allowed
    for begin in range(0, rows, MAX_ROWS):
        part = slice(begin, begin + MAX_ROWS)
        of_part = wanted._replace(
            keys=None if keys is None else keys[part],
            settings=None if settings is None else settings[:, part].contiguous(),
            edit_indptr=None if indptr is None else indptr[begin : begin + MAX_ROWS + 1],
            allowed=None if allowed is None else allowed[part],
        )
        _launch(hidden[part], lm_head, of_part, VocabPassResult(*(x[part] if len(x) else x for x in found)))
    return found


def _launch(hidden: Tensor, lm_head: LmHead, wanted: VocabPass, found: VocabPassResult) -> None:
    """Scores up to MAX_ROWS rows into `found`."""
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
    listed = MAX_LIST if truncates else max(16, triton.next_power_of_2(top_k))
    row_tiles = triton.cdiv(rows, chosen.block_t)
    splits, tiles_per_split = split_vocabulary(rows, vocab, chosen, programs, lists * listed, truncates)
    state = found.lse.new_empty(STATE_FIELDS, rows, splits)
    best = found.top_ids.new_empty(lists, rows, splits, listed) if lists else None
    record = found.top_ids.new_empty(RECORD_FIELDS, rows) if truncates else None
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
            tiles_per_split,
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
            BLOCK_KEYS=1024,
            BLOCK_SORT=128,
            num_warps=4,
        )
        for _ in range(RADIX_PASSES if truncates else 0):
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
                tiles_per_split,
                scale,
                softcap,
                H=size,
                **tile,
                SOFTCAP=softcap > 0,
                BLOCK_B=64,
                num_warps=chosen.num_warps,
                num_stages=chosen.num_stages,
            )
