"""The compiled core, `csrc/bindings.cpp`: addresses, sizes, and strides in elements. ValueError names what is wrong
with values."""

from typing import TypedDict

from forktree.layout import IntArray

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
    v: int,
    v_row_stride: int,
    v_head_stride: int,
    v_dim: int,
    v_slots: int,
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
    v_slots: int,
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
    v: int,
    v_row_stride: int,
    v_head_stride: int,
    v_dim: int,
    v_slots: int,
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
def plan(
    slot_index: IntArray,
    node_begin: IntArray,
    node_len: IntArray,
    node_parent: IntArray,
    node_fork: IntArray,
    node_pos: IntArray,
    row_indptr: IntArray,
    path_indptr: IntArray,
    path_node: IntArray,
    path_stop: IntArray,
    path_top: IntArray,
    causal: IntArray,
    row_token: IntArray,
    row_pos: IntArray,
    mask_indptr: IntArray | None,
    mask_bits: IntArray | None,
    num_tokens: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int,
    target: tuple[int, ...],
    max_partials: int,
    invariant: bool,
    /,
) -> IntArray: ...
def plan_count(buffer: IntArray, target: tuple[int, ...]) -> tuple[int, int, int, int, int, int, int, int]: ...
def check_plan_buffer(buffer: IntArray) -> None: ...
