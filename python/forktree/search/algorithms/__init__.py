"""Search algorithms, one file a family."""
