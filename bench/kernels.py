"""What compilers make of the GPU kernels: registers, spills, shared memory and key instructions. Needs no GPU.

    python bench/kernels.py                                     # compiles, prints, writes bench/results/kernels.json
    python bench/kernels.py --check                             # compiles, and holds the result against that file
    python bench/kernels.py --triton build/triton-3.6 --check   # by the Triton in that folder
    python bench/kernels.py --only tree_attention/bf16          # those whose name contains it

Every Triton kernel is compiled as its launcher would launch it, for sm_80, sm_90 and sm_100; every `.cu` for sm_80,
sm_90a and sm_100a. Instructions are counted in the machine code, see `INSTRUCTIONS`.

--check fails where a kernel takes a tenth more registers or shared memory than the file says, spills more, or has lost
a kind of instruction. Compilers that the file does not know are named, and fail nothing.
"""

import argparse
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "kernels.json"
TRITON_ARCHS = (80, 90, 100)
CUDA_ARCHS = ("80", "90a", "100a")
INSTRUCTIONS = {
    "async copies": r"LDGSTS\.E(\.BYPASS)?\S*\.128",  # 16 bytes from global to shared memory
    "mma": r"HMMA|DMMA",  # mma.sync
    "wgmma": r"HGMMA",
    "tcgen05": r"UTC\w*MMA",  # the product of sm_100
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMS = (64, 96, 128, 256)
TOLERANCE = 1.1


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture by one compiler."""

    registers: int
    spills: int  # bytes of a thread in local memory
    shared: int  # bytes of a block, those of dynamic shared memory included where the compiler decides them
    instructions: dict[str, int]


# ---------------------------------------------------------------------- Triton


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


def recorded(call: Callable[[], Any], arch: int) -> list[Launch]:
    """What a launcher launches on a GPU of this architecture; nothing is run."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def record(kernel: Any, grid: Any) -> Callable[..., None]:
        def run(*positional: Any, **named: Any) -> None:
            arguments = dict(zip(kernel.arg_names, positional, strict=False))
            options = {key: value for key, value in named.items() if key not in kernel.arg_names}
            arguments |= {key: value for key, value in named.items() if key in kernel.arg_names}
            launches.append(Launch(kernel, arguments, options))

        return run

    attention = importlib.import_module("forktree.triton_kernels.tree_attention")
    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "__getitem__", record))
        stack.enter_context(patch.object(attention, "architecture", lambda device: arch))
        stack.enter_context(patch.object(attention, "multiprocessors", lambda device: 1))
        stack.enter_context(patch.object(attention, "_counters", lambda size, device: meta(size, dtype=torch.int32)))
        call()
    return launches


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def triton_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches of every kernel that ships, by name."""
    from forktree import triton_kernels

    def launcher(operation: str) -> Callable[..., Any]:
        launch: Callable[..., Any] = importlib.import_module(f"{triton_kernels.__name__}.{operation}").launch
        return launch

    integers = meta(64, dtype=torch.int32)
    for name, dtype in DTYPES.items():
        x, pool = meta(64, 8, 128, dtype=dtype), meta(4096, 8, 128, dtype=dtype)
        yield f"append_kv/{name}", lambda x=x, pool=pool: launcher("append_kv")(x, x, integers, pool, pool)
        inv_freq = meta(64, dtype=torch.float32)
        yield f"rotate_rows/{name}", lambda x=x, f=inv_freq: launcher("rotate_rows")(x, integers, f, False, 128)
        lse = meta(64, 8, dtype=torch.float32)
        yield f"merge_states/{name}", lambda x=x, s=lse: launcher("merge_states")(x, s, integers, integers)
    attention = launcher("tree_attention")
    for (name, dtype), dim in itertools.product(DTYPES.items(), DIMS):
        for rows, width in ((8, "narrow"), (256, "wide")):
            for options in (False, True):
                if (options and name != "bf16") or (width == "wide" and name == "fp32"):
                    continue  # the same tiles, in a type of the same size; the same tiles
                q, pool = meta(rows, 32, dim, dtype=dtype), meta(4096, 8, dim, dtype=dtype)
                per_head = meta(32, dtype=torch.float32) if options else None
                arguments = (q, pool, pool, integers, integers, 64, 64, 0.1, 30.0 * options, per_head, per_head)
                label = f"tree_attention/{name}/{dim}/{width}" + "/softcap,sinks,alibi" * options
                yield label, lambda arguments=arguments: attention(*arguments)


def compile_triton(name: str, arch: int) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    (launch,) = recorded(dict(triton_calls())[name], arch)
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        wanted = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (wanted and type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TRITON_TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if wanted and type(value) is int and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (row,) = read_cubin(Path(file.name)).values()
    return Row(row.registers, row.spills, compiled.metadata.shared, row.instructions)


TRITON_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


# ---------------------------------------------------------------------- CUDA


def cuda_rows() -> tuple[str, dict[str, Row]]:
    """nvcc's version, and every kernel of the core as setup.py builds it for CUDA_ARCHS."""
    build = ROOT / "build" / "kernels"
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", build, "--build-lib", build / "lib"]
    subprocess.run(
        command, cwd=ROOT, env=os.environ | {"FORKTREE_CUDA_ARCHS": CUDA_ARCHS}, check=True, stdout=subprocess.DEVNULL
    )
    (core,) = (build / "lib" / "forktree").glob("_core*.so")
    found = subprocess.run([sys.executable, "-c", PRINT_BUILD, core], check=True, capture_output=True, text=True)
    built, why, nvcc = found.stdout.splitlines()
    if not built:
        raise SystemExit(f"the CUDA kernels must be built to be looked at, but {why}")
    return nvcc, read_machine_code(core)


CUDA_ARCHS = "80;90a;100a"


# ---------------------------------------------------------------------- machine code


def cuobjdump() -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = shutil.which("cuobjdump", path=f"{folder}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise SystemExit(f"cuobjdump must be on PATH or in {folder}, found none")
    return found


def read_cubin(path: Path) -> dict[str, Row]:
    """What every kernel of a cubin takes, by its (mangled) name."""
    usage = subprocess.run([cuobjdump(), "-res-usage", path], check=True, capture_output=True, text=True).stdout
    sass = subprocess.run([cuobjdump(), "-sass", path], check=True, capture_output=True, text=True).stdout
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", sass, re.DOTALL))
    rows = {}
    for name, facts in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", facts)}
        found = {kind: len(re.findall(pattern, code[name])) for kind, pattern in INSTRUCTIONS.items()}
        rows[name] = Row(
            registers=number["REG"],
            spills=number.get("STACK", 0) + number.get("LOCAL", 0),
            shared=number.get("SHARED", 0),
            instructions={kind: count for kind, count in found.items() if count},
        )
    return rows
