"""The operations as torch sees them: `torch.ops.forktree.*`, with what `torch.compile` needs to know of them.

Torch's schemas know tensors and numbers. So each operation is registered with the members of its structures as
arguments, in order, and `through_torch` takes them apart again. The registered operations check their arguments, and
are computed by the compiled kernels; `score_tokens` by PyTorch too. Defined through `torch.library.Library`, as a
`custom_op` costs more a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.library import Library, register_fake

from forktree.ops.assemble import LmHead, VocabPass, VocabPassResult
from forktree.ops.checks import (
    check_append_kv,
    check_lm_head,
    check_merge_states,
    check_plan_tensors,
    check_rotate_rows,
    check_tree_attention,
    check_vocab_pass,
)
from forktree.ops.dispatch import PYTORCH, launcher, select_backend
from forktree.ops.plan_tensors import PlanTensors
from forktree.ops.pool import OPTIONS, AttentionOptions, KVPool

LIBRARY = Library("forktree", "DEF")  # the operations live as long as this object

TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    int: "int",
    bool: "bool",
}


def _members(structure: type, names: tuple[str, ...]) -> str:
    """Members of a structure, as a schema declares arguments."""
    types = get_type_hints(structure)
    return ", ".join(f"{TYPES[types[name]]} {name}" for name in names)


SCHEMAS = {
    "append_kv": "(Tensor k, Tensor v, Tensor slots, Tensor(a!) k_slots, Tensor(b!) v_slots) -> ()",
    "rotate_rows": "(Tensor q, Tensor shift, Tensor inv_freq, bool interleaved, int rotary_dim) -> Tensor",
    "merge_states": "(Tensor o, Tensor lse, Tensor indptr, Tensor index) -> (Tensor, Tensor)",
    "tree_attention": "(Tensor q, Tensor k_slots, Tensor v_slots, Tensor plan, Tensor slot_index, int num_tokens, "
    f"int max_partials, {_members(AttentionOptions, OPTIONS)}) -> (Tensor, Tensor)",
    "score_tokens": "(Tensor hidden, Tensor lm_head, Tensor? bias, float scale, float? softcap, "
    f"{_members(VocabPass, VocabPass._fields)}) -> ({', '.join(['Tensor'] * len(VocabPassResult._fields))})",
}


# ---------------------------------------------------------------------- arguments of `launch`, checked


def _append_kv(k: Tensor, v: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor) -> tuple[Any, ...]:
    pool = KVPool(k_slots, v_slots)
    check_append_kv(k, v, slots, pool)
    return k, v, slots, pool


def _rotate_rows(q: Tensor, shift: Tensor, inv_freq: Tensor, interleaved: bool, rotary_dim: int) -> tuple[Any, ...]:
    check_rotate_rows(q, shift, inv_freq, rotary_dim)
    return q, shift, inv_freq, interleaved, rotary_dim


def _merge_states(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Any, ...]:
    check_merge_states(o, lse, indptr, index)
    return o, lse, indptr, index


def _tree_attention(
    q: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    buffer: Tensor,
    slot_index: Tensor,
    num_tokens: int,
    max_partials: int,
    *options: Any,
) -> tuple[Any, ...]:
    pool, plan = KVPool(k_slots, v_slots), PlanTensors(buffer, slot_index, num_tokens, max_partials)
    chosen = AttentionOptions(*options)
    check_tree_attention(q, pool, chosen.per_head)
    check_plan_tensors(plan, q.device)
    return q, pool, plan, chosen


def _score_tokens(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, *wanted: Any
) -> tuple[Any, ...]:
    lm_head, vocab_pass = LmHead(weight, bias, scale, softcap), VocabPass(*wanted)
    check_lm_head(hidden, lm_head)
    check_vocab_pass(hidden, weight.shape[0], vocab_pass)
    return hidden, lm_head, vocab_pass


ARGUMENTS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "append_kv": _append_kv,
    "rotate_rows": _rotate_rows,
    "merge_states": _merge_states,
    "tree_attention": _tree_attention,
    "score_tokens": _score_tokens,
}


# ---------------------------------------------------------------------- what they return, without values


def _empty_attention(q: Tensor, pool: KVPool, plan: PlanTensors, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    shape = (plan.num_tokens, q.shape[1], pool.v.shape[2])
    return q.new_empty(shape), q.new_empty(shape[:2], dtype=torch.float32)


def _empty_states(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    tokens = indptr.shape[0] - 1
    return o.new_empty(tokens, *o.shape[1:]), lse.new_empty(tokens, o.shape[1])


EMPTY: dict[str, Callable[..., Any]] = {
    "append_kv": lambda *arguments: None,
    "rotate_rows": lambda q, *others: q.new_empty(q.shape),
    "merge_states": _empty_states,
    "tree_attention": _empty_attention,
    "score_tokens": lambda hidden, lm_head, wanted: tuple(VocabPassResult.empty(hidden, wanted)),
}


# ---------------------------------------------------------------------- registration


def _register(operation: str) -> None:
    checked, empty = ARGUMENTS[operation], EMPTY[operation]

    def call(*arguments: Any) -> Any:
        x, *others = given = checked(*arguments)
        backend = select_backend(operation, x, *others)
        if backend in PYTORCH and operation != "score_tokens":
            backend = "cpu" if x.is_cpu else "triton"
        return launcher(backend, operation)(*given)

    LIBRARY.define(operation + SCHEMAS[operation], tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(operation, call, key)
    register_fake(f"forktree::{operation}", lambda *arguments: empty(*checked(*arguments)), lib=LIBRARY)


for name in SCHEMAS:
    _register(name)


# ---------------------------------------------------------------------- `launch` of each operation, seen by torch


def through_torch(operation: str, *arguments: Any) -> Any:
    """What `launch` of a backend returns for the same arguments, by way of the registered operation."""
    return THROUGH[operation](*arguments)


def _attend_through_torch(q: Tensor, pool: KVPool, plan: PlanTensors, options: AttentionOptions) -> Any:
    return torch.ops.forktree.tree_attention.default(q, pool.k, pool.v, *plan[:4], *options.values)


THROUGH: dict[str, Callable[..., Any]] = {
    "append_kv": lambda k, v, slots, pool: torch.ops.forktree.append_kv.default(k, v, slots, pool.k, pool.v),
    "rotate_rows": lambda *arguments: torch.ops.forktree.rotate_rows.default(*arguments),
    "merge_states": lambda *arguments: torch.ops.forktree.merge_states.default(*arguments),
    "tree_attention": _attend_through_torch,
    "score_tokens": lambda hidden, lm_head, wanted: VocabPassResult(
        *torch.ops.forktree.score_tokens.default(hidden, *lm_head, *wanted)
    ),
}
