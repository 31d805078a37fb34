"""`forktree.ops.rotate_rows`: the specification is already whole-array PyTorch."""

from forktree.ops.reference.rotate_rows import rotate_rows

__all__ = ["rotate_rows"]
