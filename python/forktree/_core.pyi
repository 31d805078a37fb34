from forktree.layout import IntArray

def isas() -> list[tuple[str, str]]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
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
