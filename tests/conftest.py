import math
import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton's kernels are defined


@pytest.fixture
def threads():
    """Numbers of threads to compare, fewest first. The present one is restored."""
    before = torch.get_num_threads()
    yield 1, 2, 5
    torch.set_num_threads(before)


@pytest.fixture
def shuffled(monkeypatch):
    """Triton's interpreter runs the programs of a grid in random order."""
    from triton.runtime import interpreter

    rng = np.random.default_rng(0)
    place = interpreter.InterpreterBuilder.set_grid_idx

    def permuted(builder, *at):
        key = builder.grid_dim
        if at == (0, 0, 0):
            builder.order = rng.permutation(math.prod(key))
        place(builder, *(int(i) for i in np.unravel_index(builder.order[np.ravel_multi_index(at, key)], key)))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", permuted)
