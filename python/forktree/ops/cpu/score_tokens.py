"""`forktree.ops.score_tokens` by `csrc/score_tokens.cpp`."""

import torch
from torch import Tensor

from forktree import _core
from forktree.ops.checks import check_draw_tensors, check_lm_head
from forktree.ops.dtypes import dtype_number
from forktree.ops.vocabulary import Vocabulary


def launch(
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    top_k: int,
    entropy: bool,
    keys: Tensor | None,
    settings: Tensor | None,
    truncates: bool,
    edit_indptr: Tensor | None,
    edit_ids: Tensor | None,
    edit_ops: Tensor | None,
    edit_values: Tensor | None,
    allowed: Tensor | None,
) -> Vocabulary:
    edits = edit_indptr, edit_ids, edit_ops, edit_values
    (rows, size), vocab = hidden.shape, lm_head.shape[0]
    check_lm_head(hidden, lm_head, bias, scale, softcap or None)
    check_draw_tensors(hidden, vocab, top_k, keys, settings, edits, allowed)
    dtype = dtype_number("hidden", hidden)
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    found = Vocabulary.empty(hidden, top_k, entropy, keys is not None)
    given = [None if x is None else x.contiguous() for x in (keys, settings, *edits, allowed)]
    addresses = [0 if x is None else x.data_ptr() for x in given]
    addresses += [x.data_ptr() if x.numel() else 0 for x in found]
    _core.score_tokens(
        dtype,
        hidden.data_ptr(),
        hidden.stride(0),
        rows,
        size,
        lm_head.data_ptr(),
        vocab,
        0 if bias is None else bias.data_ptr(),
        scale,
        softcap,
        top_k,
        *(*addresses, torch.get_num_threads()),
    )
    return found
