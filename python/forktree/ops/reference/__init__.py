"""Dense PyTorch in fp32 or fp64: the specification of every operation."""

from forktree.ops.reference.append_kv import append_kv
from forktree.ops.reference.merge_states import merge_states
from forktree.ops.reference.rotate_rows import rotate_rows
from forktree.ops.reference.score_tokens import score_tokens
from forktree.ops.reference.tree_attention import tree_attention

__all__ = ["append_kv", "merge_states", "rotate_rows", "score_tokens", "tree_attention"]
