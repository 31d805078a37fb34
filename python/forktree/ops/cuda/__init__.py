"""The CUDA kernels of `forktree._core`, fp32, bf16 and fp16: `csrc/*.cu`.

Each module holds the backend's function and `launch`, as in `forktree.ops.cpu`. Kernels go to the current stream of the
tensors' device. In a core built with FORKTREE_CUDA=emulate they take CPU tensors.
"""

from forktree.ops.cuda.append_kv import append_kv
from forktree.ops.cuda.merge_states import merge_states
from forktree.ops.cuda.rotate_rows import rotate_rows
from forktree.ops.cuda.tree_attention import tree_attention

__all__ = ["append_kv", "merge_states", "rotate_rows", "tree_attention"]
