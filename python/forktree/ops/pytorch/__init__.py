"""PyTorch operations for any device. Attention follows the plan: one matrix product a shared stretch."""

from forktree.ops.pytorch.append_kv import append_kv
from forktree.ops.pytorch.merge_states import merge_states
from forktree.ops.pytorch.rotate_rows import rotate_rows
from forktree.ops.pytorch.tree_attention import tree_attention

__all__ = ["append_kv", "merge_states", "rotate_rows", "tree_attention"]
