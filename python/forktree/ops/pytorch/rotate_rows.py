"""`forktree.ops.rotate_rows`: the specification is already whole-array PyTorch."""

from forktree.ops.reference.rotate_rows import launch

__all__ = ["launch"]
