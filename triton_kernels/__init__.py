"""Triton kernels, one operation a file, named as in `forktree.ops`. Import as `forktree.triton_kernels`."""

from forktree.triton_kernels.append_kv import append_kv
from forktree.triton_kernels.merge_states import merge_states
from forktree.triton_kernels.rotate_rows import rotate_rows
from forktree.triton_kernels.tree_attention import tree_attention

__all__ = ["append_kv", "merge_states", "rotate_rows", "tree_attention"]
