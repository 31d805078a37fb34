"""Settings and fixtures of all tests."""

import gc
import math
import os
import sys

# OpenMP reads these when it is loaded, so they come before torch. One thread is enough for tensors as small as these;
# tests of threads ask for more. Waiting threads sleep: spinning, they would hold up the very threads they wait for.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton's kernels are defined


def pytest_collection_finish():
    """What was imported stays: collections of garbage, of which some tests ask for many, need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """At exit extensions see to it that nothing of theirs is left."""
    gc.unfreeze()


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


PATCHED = set()  # modules whose functions Triton's interpreter has seen


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch):
    """Triton's interpreter prepares all of triton.language anew for every call of a function on the device, though once
    a module is enough, and reduces what it does not know, such as the xor of a sort, number by number in Python."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return
    import triton.language as tl

    reduce = interpreter.ReduceOps.apply_impl

    def call(function, *arguments, **named):
        if (module := function.fn.__module__) not in PATCHED:
            interpreter._patch_lang(function.fn)
            PATCHED.add(module)
        return function.rewrite()(*arguments, **named)

    def reduced(self, operands):
        if self.combine_fn is not tl.standard._xor_combine:
            return reduce(self, operands)
        (x,) = operands
        return self.to_tensor(np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims), x.dtype)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    monkeypatch.setattr(interpreter.ReduceOps, "apply_impl", reduced)
