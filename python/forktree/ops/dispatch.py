"""Which backend computes an operation.

`FORKTREE_BACKEND` names one; else this table:

    tensors on  operation       dtype              backend  why
    CPU         all             fp32, bf16, fp16   cpu      compiled for this machine
    GPU         tree_attention  bf16, fp16         cuda     narrow: see `plan.cost_model`; Dk = Dv among `CUDA_DIMS`;
                                                            pools `in_chunks`
    GPU         tree_attention  fp32, bf16, fp16   triton   wide; any other head dim up to 256, or strides; fp32, which
                                                            has no exact product on tensor cores
    GPU         score_tokens    fp32, bf16, fp16   triton   see below
    GPU         the others      fp32, bf16, fp16   cuda     one launch bound by memory: the cheaper one to launch
    any         all             fp64, the rest     torch

Where the core was built without CUDA, `triton` stands in for `cuda`; where Triton is not installed, `torch` for it.

`score_tokens` has no kernel in CUDA: where `FORKTREE_BACKEND` is `cuda`, this table holds for it. A call reads V * H
elements of lm_head: 1.24 GB for 151,936 x 4,096 in bf16, 290 us at the 4.3 TB/s of an H200. T rows want 2 * T * V * H
operations meanwhile: 64 rows 275 TFLOP/s, a third of what a bf16 product reaches. Triton's tiles take the instructions
that CUDA C++ would (`wgmma`, `tcgen05`: bench/kernels.py), so that arithmetic leaves it nothing to win there. From some
180 rows on the product itself is what takes time.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from forktree import _core
from forktree.ops.pool import KVPool
from forktree.plan.cost_model import ROOFLINE_ROWS

BACKENDS = {
    "reference": "forktree.ops.reference",
    "torch": "forktree.ops.pytorch",
    "cpu": "forktree.ops.cpu",
    "triton": "forktree.triton_kernels",
    "cuda": "forktree.ops.cuda",
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what the compiled kernels take
PYTORCH = ("reference", "torch")  # which tracers and autograd see through
CUDA_DIMS = (64, 96, 128, 256)
MAX_DIM = 256  # of Triton's tiles: those of larger heads do not fit shared memory


def select_backend(operation: str, x: Tensor, *others: Any) -> str:
    """Name of the backend for a call with these arguments: x and, of tree_attention, the pool.

    Raises:
        ValueError: FORKTREE_BACKEND names one that cannot do it.
    """
    name = os.environ.get("FORKTREE_BACKEND")
    if not name or (name == "cuda" and operation == "score_tokens" and not missing(name)):
        return _best(operation, x, *others)
    if why := missing(name) or unsupported_reason(name, x):
        raise ValueError(f"FORKTREE_BACKEND={name}: {why}; available: {', '.join(available())}")
    return name


def must_dispatch(x: Tensor) -> bool:
    """Whether torch must see a call on x, since a tracer, autograd or a subclass wants to know of it.

    Otherwise the detour is saved.
    """
    return torch.compiler.is_compiling() or x.requires_grad or type(x) is not Tensor


def available() -> list[str]:
    """Names of the backends that are there."""
    return [name for name in BACKENDS if not missing(name)]


@lru_cache
def launcher(backend: str, operation: str) -> Callable[..., Any]:
    """`launch` of a backend: takes arguments that were checked. Its signature depends on the operation alone."""
    launch: Callable[..., Any] = importlib.import_module(f"{BACKENDS[backend]}.{operation}").launch
    return launch


@lru_cache
def missing(name: str) -> str:
    """Why there is no such backend here; "" if there is."""
    if name not in BACKENDS:
        return "there is no such backend"
    if name == "triton":
        if find_spec("triton") is None:
            return "Triton is not installed"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return "there is no GPU that this torch can use (on the CPU its interpreter runs it: TRITON_INTERPRET=1)"
    if name == "cuda" and not _core.build.get("cuda"):
        return str(_core.build.get("why_no_cuda", "the core was built without CUDA"))
    return ""


def unsupported_reason(name: str, x: Tensor) -> str:
    """Why a backend that is there cannot take x; "" if it can."""
    if name in ("reference", "torch"):
        return ""
    if x.dtype not in FLOATS:
        return f"expected fp32, bf16 or fp16, got {x.dtype}: leave it to the torch backend"
    if name == "cpu":
        return "" if x.is_cpu else f"expected tensors on the CPU, got {x.device}"
    on_cpu = os.environ.get("TRITON_INTERPRET") == "1" if name == "triton" else _core.build["cuda"] == "emulated"
    if x.is_cpu != on_cpu:
        return f"expected tensors on {'the CPU' if on_cpu else 'a GPU'}, got {x.device}"
    return ""


def _best(operation: str, x: Tensor, *others: Any) -> str:
    if x.dtype not in FLOATS or not (x.is_cpu or x.is_cuda):
        return "torch"
    if x.is_cpu:
        return "cpu"
    triton = "torch" if missing("triton") else "triton"
    if operation == "score_tokens":
        return triton
    cuda = triton if missing("cuda") else "cuda"
    if operation != "tree_attention":
        return cuda
    pool: KVPool = others[0]
    (rows, heads, dim), (_, kv_heads, value_dim) = x.shape, pool.v.shape
    if max(dim, value_dim) > MAX_DIM:
        return "torch"
    fits = dim == value_dim and dim in CUDA_DIMS and x.dtype != torch.float32
    narrow = fits and rows * heads <= ROOFLINE_ROWS * kv_heads
    return cuda if narrow and in_chunks(pool.k) and in_chunks(pool.v) else triton


def in_chunks(x: Tensor) -> bool:
    """Whether slots and heads of K or V in 16-bit numbers lie multiples of 16 bytes apart, as the CUDA kernel reads."""
    return not (x.stride(0) % 8 or x.stride(1) % 8)
