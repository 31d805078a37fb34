"""The command line: `forktree generate`, `forktree score`, `forktree demo` and `forktree env`."""

from forktree.cli.main import main

__all__ = ["main"]
