"""The operations as torch sees them: `torch.ops.forktree.*`, with what `torch.compile` needs to know of them.

They check their arguments themselves. Defined through `torch.library.Library`, as a `custom_op` costs more a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from forktree.ops.checks import (
    check_append_kv,
    check_lm_head,
    check_merge_states,
    check_plan_tensors,
    check_rotate_rows,
    check_scores,
    check_tree_attention,
)
from forktree.ops.dispatch import choose, launcher
from forktree.ops.vocabulary import Vocabulary

LIBRARY = Library("forktree", "DEF")  # the operations live as long as this object

SCHEMAS = (
    "append_kv(Tensor k, Tensor v, Tensor slots, Tensor(a!) k_slots, Tensor(b!) v_slots) -> ()",
    "rotate_rows(Tensor q, Tensor shift, Tensor inv_freq, bool interleaved, int rotary_dim) -> Tensor",
    "merge_states(Tensor o, Tensor lse, Tensor indptr, Tensor index) -> (Tensor, Tensor)",
    "tree_attention(Tensor q, Tensor k_slots, Tensor v_slots, Tensor plan, Tensor slot_index, int num_tokens, "
    "int max_partials, float scale, float softcap, Tensor? sinks, Tensor? alibi_slopes) -> (Tensor, Tensor)",
    "score_tokens(Tensor hidden, Tensor lm_head, Tensor? bias, float scale, float softcap, int top_k, bool entropy, "
    "Tensor? keys, Tensor? settings, bool truncates, Tensor? edit_indptr, Tensor? edit_ids, Tensor? edit_ops, "
    "Tensor? edit_values, Tensor? allowed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _implementation(operation: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        backend = choose(operation, *arguments)
        if operation == "score_tokens":
            backend = "torch" if backend == "reference" else backend  # the reference takes request objects
        elif backend in ("reference", "torch"):  # follow plan objects
            backend = "cpu" if arguments[0].is_cpu else "triton"
        return launcher(backend, operation)(*arguments)

    return call


for schema in SCHEMAS:
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, _implementation(name), key)


@register_fake("forktree::append_kv", lib=LIBRARY)
def _(k: Tensor, v: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
    check_append_kv(k, v, slots, k_slots, v_slots)


@register_fake("forktree::rotate_rows", lib=LIBRARY)
def _(q: Tensor, shift: Tensor, inv_freq: Tensor, interleaved: bool, rotary_dim: int) -> Tensor:
    check_rotate_rows(q, shift, inv_freq, rotary_dim)
    return q.new_empty(q.shape)


@register_fake("forktree::merge_states", lib=LIBRARY)
def _(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    check_merge_states(o, lse, indptr, index)
    tokens = indptr.shape[0] - 1
    return o.new_empty(tokens, *o.shape[1:]), lse.new_empty(tokens, o.shape[1])


@register_fake("forktree::tree_attention", lib=LIBRARY)
def _(
    q: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    plan: Tensor,
    slot_index: Tensor,
    num_tokens: int,
    max_partials: int,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_tree_attention(q, k_slots, v_slots, sinks, alibi_slopes)
    check_scores(scale, softcap or None)
    check_plan_tensors(plan, slot_index, q.device)
    shape = (num_tokens, q.shape[1], v_slots.shape[2])
    return q.new_empty(shape), q.new_empty(shape[:2], dtype=torch.float32)


@register_fake("forktree::score_tokens", lib=LIBRARY)
def _(
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    top_k: int,
    entropy: bool,
    keys: Tensor | None,
    *draw: Any,
) -> tuple[Tensor, ...]:
    check_lm_head(hidden, lm_head, bias, scale, softcap or None)
    return tuple(Vocabulary.empty(hidden, top_k, entropy, keys is not None))
