"""The compiled core, `csrc/bindings.cpp`: addresses, sizes, and strides in elements.

Values that are wrong raise a ValueError that names them.
"""

from typing import TypedDict

from forktree.plan.layout import TreeLayout
from forktree.types import IntArray

class Build(TypedDict):
    compiler: str
    flags: str
    isas: str
    openmp: bool
    cuda: str  # architectures it has kernels for, "emulated" or ""
    why_no_cuda: str

build: Build

def isas() -> list[tuple[str, str]]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
def append_kv(
    dtype: int,
    tokens: int,
    heads: int,
    num_slots: int,
    slots: int,
    wide: bool,
    k: int,
    k_row_stride: int,
    k_head_stride: int,
    k_dim: int,
    k_slots: int,
    k_slot_stride: int,
    k_slots_head_stride: int,
    v: int,
    v_row_stride: int,
    v_head_stride: int,
    v_dim: int,
    v_slots: int,
    v_slot_stride: int,
    v_slots_head_stride: int,
    threads: int,
    /,
) -> None: ...
def rotate_rows(
    dtype: int,
    q: int,
    row_stride: int,
    head_stride: int,
    rows: int,
    heads: int,
    dim: int,
    shift: int,
    wide: bool,
    inv_freq: int,
    pairs: int,
    interleaved: bool,
    out: int,
    threads: int,
    /,
) -> None: ...
def score_tokens(
    dtype: int,
    hidden: int,
    row_stride: int,
    rows: int,
    size: int,
    lm_head: int,
    vocab: int,
    bias: int,
    scale: float,
    softcap: float,
    top_k: int,
    keys: int,
    settings: int,
    edit_indptr: int,
    edit_ids: int,
    edit_ops: int,
    edit_values: int,
    allowed: int,
    lse: int,
    entropy: int,
    top_ids: int,
    top_logits: int,
    token: int,
    token_logit: int,
    shaped_log_prob: int,
    threads: int,
    /,
) -> int: ...  # bytes of scratch it took; addresses of what is absent or not asked for are 0
def merge_states(
    dtype: int,
    o: int,
    lse: int,
    states: int,
    heads: int,
    dim: int,
    indptr: int,
    indptr_wide: bool,
    indptr_size: int,
    index: int,
    index_wide: bool,
    index_size: int,
    out: int,
    total: int,
    threads: int,
    /,
) -> None: ...
def tree_attention(
    dtype: int,
    q: int,
    q_row_stride: int,
    q_head_stride: int,
    rows: int,
    heads: int,
    k_dim: int,
    k_slots: int,
    k_slot_stride: int,
    k_head_stride: int,
    v_slots: int,
    v_slot_stride: int,
    v_head_stride: int,
    num_slots: int,
    kv_heads: int,
    v_dim: int,
    plan: int,
    plan_size: int,
    slot_index: int,
    slot_index_size: int,
    scale: float,
    softcap: float,
    sinks: int,
    alibi_slopes: int,
    out: int,
    lse: int,
    num_tokens: int,
    max_partials: int,
    plan_trusted: bool,
    threads: int,
    /,
) -> None: ...

# Only where `build["cuda"]` is not empty.
def cuda_append_kv(
    dtype: int,
    tokens: int,
    heads: int,
    num_slots: int,
    slots: int,
    wide: bool,
    k: int,
    k_row_stride: int,
    k_head_stride: int,
    k_dim: int,
    k_slots: int,
    k_slot_stride: int,
    k_slots_head_stride: int,
    v: int,
    v_row_stride: int,
    v_head_stride: int,
    v_dim: int,
    v_slots: int,
    v_slot_stride: int,
    v_slots_head_stride: int,
    stream: int,
    /,
) -> None: ...
def cuda_rotate_rows(
    dtype: int,
    q: int,
    row_stride: int,
    head_stride: int,
    rows: int,
    heads: int,
    dim: int,
    shift: int,
    wide: bool,
    inv_freq: int,
    pairs: int,
    interleaved: bool,
    out: int,
    stream: int,
    /,
) -> None: ...
def cuda_merge_states(
    dtype: int,
    o: int,
    lse: int,
    states: int,
    heads: int,
    dim: int,
    indptr: int,
    indptr_wide: bool,
    indptr_size: int,
    index: int,
    index_wide: bool,
    index_size: int,
    out: int,
    total: int,
    stream: int,
    /,
) -> None: ...
def cuda_tree_attention(
    dtype: int,
    q: int,
    q_row_stride: int,
    q_head_stride: int,
    heads: int,
    head_dim: int,
    k_slots: int,
    k_slot_stride: int,
    k_head_stride: int,
    v_slots: int,
    v_slot_stride: int,
    v_head_stride: int,
    kv_heads: int,
    plan: int,
    slot_index: int,
    scale: float,
    softcap: float,
    sinks: int,
    alibi_slopes: int,
    out: int,
    lse: int,
    num_tokens: int,
    partials: int,
    max_partials: int,
    counters: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def plan(
    layout: TreeLayout,
    heads: tuple[int, ...],  # query heads, KV heads, head_dim, value_dim, bytes_per_token
    window: int,
    cost_model: tuple[int, ...],
    max_partials: int,
    invariant: bool,
    /,
) -> IntArray: ...
def plan_stats(buffer: IntArray, cost_model: tuple[int, ...]) -> tuple[int, int, int, int, int, int, int, int]: ...
def check_plan_header(buffer: IntArray) -> None: ...
def check_plan_buffer(buffer: IntArray) -> None: ...
