"""Backends that take CPU tensors in this build."""

from forktree import _core

COMPILED = ["cpu"] + ["cuda"] * (_core.build["cuda"] == "emulated")  # leave fp64 to others
BACKENDS = ["reference", "torch", *COMPILED]
