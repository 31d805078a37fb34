"""CUDA graphs on the CPU: a capture records operations, a replay runs them again on the very tensors, without Python.

What was baked into the Python code of a captured function (lengths, contents of a plan) is wrong in the next replay,
as it is with CUDA; what a capture forbids raises.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from forktree.device.cuda_graphs import NoHostReads


class Passed:
    """An event that the device has passed already."""

    def synchronize(self) -> None:
        pass


class FakeGraphs:
    """`forktree.device.cuda_graphs.Graphs`. Counts what is captured and replayed."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with NoHostReads():
            function()
        with _no_collection(), _NoReads(), _Recording() as recording:
            result = function()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return replay, result

    def record_event(self) -> Passed:
        return Passed()


class _Recording(TorchDispatchMode):
    """Every operation with its tensors. Those it makes live as long as the recording, at one address."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()  # storages that were there before, and those of results
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            result = operation.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        for x in _tensors((args, kwargs)):
            if x.ndim and _address(x) not in self.known:  # CUDA takes single numbers of the host by value
                if _made_since(x):
                    shape = list(x.shape)
                    raise RuntimeError(f"{operation} reads a tensor {shape} that the host made during the capture")
                self.known.add(_address(x))
        result = operation(*args, **kwargs)
        self.known |= {_address(x) for x in _tensors(result)}
        self.calls.append((operation, args, kwargs, result))
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        for operation, args, kwargs, result in self.calls:
            again = operation(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if _address(old) != _address(new):  # else a view, or written in place
                    old.copy_(new)


class _NoReads(TorchFunctionMode):
    """Refuses what on a CPU reads a tensor without any operation."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu, Tensor.item):
            raise RuntimeError(f"{function} reads a tensor during the capture")
        return function(*args, **(kwargs or {}))


@contextmanager
def _no_collection() -> Iterator[None]:
    """What is made within stays in the youngest generation of Python's collector, in which nothing else is."""
    gc.collect(1)
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _made_since(x: Tensor) -> bool:
    """Whether no tensor from before `_no_collection` has the storage of x."""
    if not any(other is x for other in gc.get_objects(generation=0)):
        return False
    before = (other for generation in (1, 2) for other in gc.get_objects(generation))
    return not any(issubclass(type(other), Tensor) and _address(other) == _address(x) for other in before)


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
