"""The compiled kernels of `forktree._core`, fp32, bf16 and fp16.

Each module holds the backend's function and `launch`, which checks the tensors and hands their addresses to C++. It is
what `forktree.ops.library` registers with torch; the backend's function goes that way where someone watches.
"""

from forktree.ops.cpu.append_kv import append_kv
from forktree.ops.cpu.merge_states import merge_states
from forktree.ops.cpu.rotate_rows import rotate_rows
from forktree.ops.cpu.tree_attention import tree_attention

__all__ = ["append_kv", "merge_states", "rotate_rows", "tree_attention"]
