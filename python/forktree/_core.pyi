"""The compiled core, `csrc/bindings.cpp`. ValueError names what is wrong with values."""

from typing import TypedDict

from forktree.plan.layout import IntArray

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

# By struct of csrc/params.h: its size, and of each member its offset and size.
params: dict[str, tuple[int, dict[str, tuple[int, int]]]]

# Addresses of structs of `forktree.ops.params`.
def append_kv(params: int, threads: int, /) -> None: ...
def rotate_rows(params: int, threads: int, /) -> None: ...
def merge_states(params: int, threads: int, /) -> None: ...
def score_tokens(params: int, threads: int, /) -> int: ...  # bytes of scratch it took
def tree_attention(params: int, threads: int, /) -> None: ...

# Only where `build["cuda"]` is not empty.
def cuda_append_kv(params: int, stream: int, /) -> None: ...
def cuda_rotate_rows(params: int, stream: int, /) -> None: ...
def cuda_merge_states(params: int, stream: int, /) -> None: ...
def cuda_tree_attention(params: int, stream: int, /) -> None: ...
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
    cost_model: tuple[int, ...],
    max_partials: int,
    invariant: bool,
    /,
) -> IntArray: ...
def plan_count(buffer: IntArray, cost_model: tuple[int, ...]) -> tuple[int, int, int, int, int, int, int, int]: ...
def check_plan_buffer(buffer: IntArray) -> None: ...
