"""The compiled kernels of `forktree._core`, fp32, bf16 and fp16.

Each module holds the backend's function, which calls the operation registered in `forktree.ops.library`, and
`launch`, what is registered there: it checks the tensors and hands their addresses to C++.
"""

from forktree.ops.cpu.append_kv import append_kv
from forktree.ops.cpu.merge_states import merge_states
from forktree.ops.cpu.rotate_rows import rotate_rows
from forktree.ops.cpu.tree_attention import tree_attention

__all__ = ["append_kv", "merge_states", "rotate_rows", "tree_attention"]
