"""forktree inside other libraries."""
