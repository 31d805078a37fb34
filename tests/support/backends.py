"""The backends of this build as tests meet them, and tensors that are hard on them."""

import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from forktree import _core
from forktree.ops import AttentionOptions, KVPool
from forktree.ops.dispatch import CUDA_DIMS, MAX_DIM, launcher, missing
from forktree.ops.plan_tensors import PlanTensors
from forktree.plan.cost_model import CPU, CostModel, compute_bound_gpu, memory_bound_gpu
from forktree.plan.plan import AttentionPlan

NARROW = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *NARROW)
NEW_EMPTY = Tensor.new_empty
CUTS = replace(CPU, units=1000, grain=1)  # cuts wherever it can
GPU_CUTS = replace(memory_bound_gpu(), item=0, grain=0, partial=0)


@dataclass(frozen=True)
class Backend:
    """A backend on a device, with an instruction set, and what a conformance suite takes to try it.

    Attributes:
        name: value of FORKTREE_BACKEND.
        isa: instruction set of the compiled one; "" leaves the choice.
        device: where its tensors lie.
        dtypes: that its `tree_attention` takes, besides fp64.
        head_dims: of K and of V, that are tried in most tests.
        layouts: how many random layouts of each kind are tried.
        cost_models: of the plans that are tried.
    """

    name: str
    isa: str = ""
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = FLOATS
    head_dims: tuple[tuple[int, int], ...] = ((8, 8),)
    layouts: int = 8
    cost_models: tuple[CostModel | None, ...] = (None,)

    def __str__(self) -> str:
        return "-".join(filter(None, (self.name, self.isa, "gpu" * (self.device == "cuda"))))

    @property
    def for_gpus(self) -> bool:
        """Whether its `tree_attention` is written for tensor cores, even where they are emulated."""
        return self.device == "cuda" or self.name == "cuda"

    @property
    def interpreted(self) -> bool:
        return self.name == "triton" and self.device == "cpu"

    def takes(self, dtype: torch.dtype, dim: int, value_dim: int) -> bool:
        """Whether there is a kernel of `tree_attention` for these."""
        if self.name == "cuda":
            return dtype in self.dtypes and dim == value_dim and dim in CUDA_DIMS
        return self.name != "triton" or max(dim, value_dim) <= MAX_DIM

    @property
    def absent(self) -> str:
        """Why it cannot run here."""
        if self.device == "cuda":
            if not torch.cuda.is_available():
                return "needs a CUDA device"
            return missing(self.name) or "the CUDA core is emulated" * (_core.build["cuda"] == "emulated")
        if self.name == "triton":
            return "Triton compiles here" if torch.cuda.is_available() else missing(self.name)
        if self.name == "cuda" and _core.build["cuda"] != "emulated":
            return "needs a core built with FORKTREE_CUDA=emulate, as `make proof` does"
        return dict(_core.isas())[self.isa] if self.isa else ""


REFERENCE, TORCH = Backend("reference"), Backend("torch", cost_models=(None, CUTS))
ISAS = [Backend("cpu", isa, cost_models=(None, CUTS)) for isa, why_not in _core.isas() if not why_not]
SCATTERED = replace(CPU, units=100, grain=1, item=100, segment=1, partial=1)
TRITON = Backend("triton", layouts=2, cost_models=(CPU, SCATTERED))
CUDA = Backend(
    "cuda",
    dtypes=NARROW,
    head_dims=tuple((dim, dim) for dim in CUDA_DIMS),
    layouts=3,
    cost_models=(None, CUTS),
)
ON_GPU = [
    Backend(
        name,
        device="cuda",
        dtypes=dtypes,
        head_dims=((64, 64),),
        layouts=3,
        cost_models=(memory_bound_gpu(), compute_bound_gpu(), GPU_CUTS),
    )
    for name, dtypes in (("triton", FLOATS), ("cuda", NARROW))
]
EMULATED = [CUDA] * (not CUDA.absent)  # the CUDA kernels on the CPU
INTERPRETED = [TRITON] * (find_spec("triton") is not None and not TRITON.absent)
COMPILED = [*ISAS, *EMULATED]
ONE_ISA = [REFERENCE, TORCH, Backend("cpu"), *EMULATED, *INTERPRETED]  # for what no instruction set changes
EXACT = [b for b in ONE_ISA if not b.interpreted]  # the interpreter rounds to bf16 in a way of its own
HOST = [REFERENCE, TORCH, *ISAS, *EMULATED, *INTERPRETED]
EVERY = [*HOST, *ON_GPU]


def each_of(names: Sequence[str], cases: Iterable[tuple[Any, ...]]) -> Any:
    """A test with the fixture `backend` and other arguments, once for each case.

    Those on a GPU are collected everywhere.

    Args:
        names: of the arguments after `backend`.
        cases: a backend, and a value for each name.
    """
    params = []
    for backend, *values in cases:
        marks = []
        if backend.device == "cuda":
            marks = [pytest.mark.gpu, pytest.mark.skipif(bool(backend.absent), reason=backend.absent or "is there")]
        params.append(pytest.param(backend, *values, marks=marks, id="-".join(map(shown, (backend, *values)))))
    return pytest.mark.parametrize(("backend", *names), params, indirect=["backend"])


def each(*backends: Backend) -> Any:
    """`each_of` without other arguments."""
    return each_of((), ((b,) for b in backends))


def each_dtype(*backends: Backend) -> Any:
    """`each_of` with the dtypes that each backend takes."""
    return each_of(("dtype",), ((b, dtype) for b in backends for dtype in b.dtypes))


def shown(x: Any) -> str:
    return str(x).removeprefix("torch.")


def _spoilt(like: Tensor, *shape: Any, **options: Any) -> Tensor:
    empty = NEW_EMPTY(like, *shape, **options)
    return empty.fill_(torch.nan) if empty.is_floating_point() else empty.fill_(-(2**30))


@contextmanager
def sentinels(device: str = "cpu") -> Iterator[None]:
    """What is not written of an output shows: it is NaN."""
    if device == "cpu":
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Tensor, "new_empty", _spoilt)
            yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def on(device: str, *values: Any) -> list[Any]:
    return [x.to(device) if isinstance(x, Tensor) else x for x in values]


def by_reference(operation: str, *arguments: Any) -> Any:
    """What the specification of an operation gives for the arguments of `launch`."""
    return launcher("reference", operation)(*arguments)


def specified(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, options: AttentionOptions | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of `tree_attention` by its specification."""
    options = AttentionOptions() if options is None else options
    out, lse = by_reference("tree_attention", q, KVPool(k, v), PlanTensors.of(plan, q.device), options)
    return out, lse


def off_alignment(x: Tensor) -> Tensor:
    """A copy at an address that is a multiple of one element only."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


# Copies with other strides, dense in the last dimension: pools as people have them.
DENSE = {
    "K and V beside each other in a slot": lambda x: torch.stack([x, x], 1)[:, 1],
    "K and V beside each other in a head": lambda x: torch.stack([x, x], 2)[:, :, 1],
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "slots an odd number apart": lambda x: torch.cat([x.flatten(1), x[:, 0, :1]], 1)[:, :-1].unflatten(1, x.shape[1:]),
    "heads an odd number apart": lambda x: torch.cat([x, x[..., :1]], 2)[..., :-1],
    "off alignment": off_alignment,
}


def sparse(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory where they are written or read."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)
