"""Search algorithms, one file a family. A module here is found by `forktree.search.registry` without being listed."""
