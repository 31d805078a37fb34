"""CUDA graphs: the kernels of a function, captured once and then launched together without its Python code."""

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from forktree.device.staging import Event

Function = Callable[[], Tensor]


class Graphs(Protocol):
    """Captures functions that read and write only fixed memory of one device."""

    def capture(self, function: Function) -> tuple[Callable[[], None], Tensor]:
        """Captures `function`.

        Returns:
            A callable that runs its kernels again, and the tensor that they write each time. Graphs share memory: a
            result must be copied before another graph runs.
        """
        ...

    def record_event(self) -> Event:
        """An event after all work that the device has been given so far."""
        ...


class CudaGraphs:
    """`Graphs` by CUDA, with one memory pool for what all of them compute on the way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._newest: torch.cuda.CUDAGraph | None = None  # torch refuses a pool whose last graph is gone

    def capture(self, function: Function) -> tuple[Callable[[], None], Tensor]:
        """See `Graphs.capture`; the function runs twice before it is captured."""
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        try:
            with torch.cuda.stream(self._stream):
                with NoHostReads():
                    function()
                function()  # loads kernels and allocates what they keep, neither of which may happen while capturing
                return self._record(function)
        finally:
            now.wait_stream(self._stream)

    def _record(self, function: Function) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # other threads go on
        try:
            result = function()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # it would only say that the capture failed
                graph.capture_end()
            raise
        graph.capture_end()
        self._newest = graph
        return graph.replay, result

    def record_event(self) -> Event:
        """See `Graphs.record_event`."""
        return torch.cuda.current_stream(self._device).record_event()


class NoHostReads(TorchDispatchMode):
    """Runs operations, but refuses those for which the host would have to wait, as these end a capture.

    A trial run within it comes before the capture, because a capture that fails leaves torch's allocator in disorder.
    """

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # operations made of others hide what these do
            result = operation.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if reads_on_host(operation, args):
            raise RuntimeError(f"{operation} needs values on the host")
        result = operation(*args, **kwargs)
        if copies_between_devices(operation, args, result):
            raise RuntimeError(f"{operation} copies between host and device")
        return result


def copies_between_devices(operation: Any, args: Any, result: Any) -> bool:
    """Whether an operation has moved values between host and device."""
    if operation is torch.ops.aten.lift_fresh.default:  # the end of torch.tensor(...)
        return bool(result.device.type != "cpu")
    return operation in COPIES and any(isinstance(x, Tensor) and x.device != result.device for x in args)


COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
MASKABLE = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


def reads_on_host(operation: Any, args: Any) -> bool:
    """Whether the values of tensors decide what the host does next, such as the size of the result."""
    if operation in MASKABLE:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    tags = operation.tags
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
