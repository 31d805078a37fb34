"""PyTorch operations for any device. Attention follows the plan: one matrix product a shared stretch."""

from forktree.ops.torch_backend.append_kv import append_kv
from forktree.ops.torch_backend.merge_states import merge_states
from forktree.ops.torch_backend.rotate_rows import rotate_rows
from forktree.ops.torch_backend.tree_attention import tree_attention

__all__ = ["append_kv", "merge_states", "rotate_rows", "tree_attention"]
