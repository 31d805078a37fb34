"""The compiled core, `csrc/bindings.cpp`. ValueError names what is wrong with values."""

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

# By struct of csrc/params.h: its size, and of each member its offset and size.
params: dict[str, tuple[int, dict[str, tuple[int, int]]]]

# params: a struct of `forktree.ops.params`, packed.
def append_kv(params: bytes, threads: int, /) -> None: ...
def rotate_rows(params: bytes, threads: int, /) -> None: ...
def merge_states(params: bytes, threads: int, /) -> None: ...
def score_tokens(params: bytes, threads: int, /) -> int: ...  # bytes of scratch it took
def tree_attention(params: bytes, threads: int, /) -> None: ...

# Only where `build["cuda"]` is not empty.
def cuda_append_kv(params: bytes, stream: int, /) -> None: ...
def cuda_rotate_rows(params: bytes, stream: int, /) -> None: ...
def cuda_merge_states(params: bytes, stream: int, /) -> None: ...
def cuda_tree_attention(params: bytes, stream: int, /) -> None: ...
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
def check_plan_header(buffer: IntArray) -> None: ...  # sizes, heads and offsets, in constant time
def check_plan_buffer(buffer: IntArray) -> None: ...  # all that a kernel reads: it stays within the buffer
