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


@pytest.fixture
def bf16_products(monkeypatch):
    """Triton's interpreter keeps bf16 numbers as 16-bit integers, and `tl.dot` multiplies these: here, the numbers."""
    import triton.language as tl
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def numbers(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def product(builder, a, b, *rest):
        return dot(builder, numbers(a), numbers(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", product)
