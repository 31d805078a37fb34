"""The compiled core, `csrc/bindings.cpp`: addresses, sizes, and strides in elements. ValueError names what is wrong
with values."""

from typing import TypedDict

class Build(TypedDict):
    compiler: str
    flags: str
    isas: str
    openmp: bool

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
    threads: int,
    /,
) -> None: ...
