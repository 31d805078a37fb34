"""For machines with a GPU: `run.sh` builds, tests and measures there."""
