"""What compilers make of the GPU kernels: registers, spills, shared memory and key instructions. Needs no GPU.

    python bench/kernels.py                                     # compiles, prints, writes bench/results/kernels.json
    python bench/kernels.py --check                             # compiles, and holds the result against that file
    python bench/kernels.py --triton build/triton-3.6 --check   # by the Triton in that folder
    python bench/kernels.py --only tree_attention/bf16          # of Triton's those whose name has it

Every Triton kernel is compiled as its launcher would launch it, for sm_80, sm_90 and sm_100; every `.cu` for sm_80,
sm_90a and sm_100a. Instructions are counted in the machine code, see `INSTRUCTIONS`.

--check fails where a kernel takes a tenth more registers, shared memory or spills than the file says, or has lost a
kind of instruction. Compilers that the file does not know are named, and fail nothing.
"""

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from forktree.ops import AttentionOptions, KVPool
from forktree.ops.assemble import LmHead, VocabPass
from forktree.ops.plan_tensors import PlanTensors

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as up to 3.9; later ones would split products from sums

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "kernels.json"
TRITON_ARCHS = (80, 90, 100)
INSTRUCTIONS = {
    "async copies": r"LDGSTS\.E(\.BYPASS)?\S*\.128",  # 16 bytes from global to shared memory
    "mma": r"HMMA|DMMA",  # mma.sync
    "wgmma": r"HGMMA",
    "tcgen05": r"UTC\w*MMA",  # the product of sm_100
}
PRODUCTS = "|".join(INSTRUCTIONS[kind] for kind in ("mma", "wgmma", "tcgen05"))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMS = (64, 96, 128, 256)
WIDTHS = {"narrow": 8, "wide": 256}  # query rows
TOLERANCE = 1.1


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture by one compiler."""

    registers: int
    spills: int  # bytes of a thread in local memory, arrays included
    loop_spills: int  # loads and stores of local memory in innermost loops over tensor-core products
    shared: int  # bytes of a block, those of dynamic shared memory included where the compiler decides them
    instructions: dict[str, int]


# ---------------------------------------------------------------------- Triton


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


def recorded(call: Callable[[], Any], arch: int) -> dict[str, Launch]:
    """What a launcher launches on a GPU of this architecture, by name of the kernel; nothing is run."""
    from triton.runtime.jit import JITFunction

    launches: dict[str, Launch] = {}

    def record(kernel: Any, grid: Any) -> Callable[..., None]:
        def run(*positional: Any, **named: Any) -> None:
            arguments = dict(zip(kernel.arg_names, positional, strict=False))
            options = {key: value for key, value in named.items() if key not in kernel.arg_names}
            arguments |= {key: value for key, value in named.items() if key in kernel.arg_names}
            launches[kernel.__name__.removeprefix("_")] = Launch(kernel, arguments, options)

        return run

    attention = importlib.import_module("forktree.triton_kernels.tree_attention.launch")
    scores = importlib.import_module("forktree.triton_kernels.score_tokens.launch")
    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "__getitem__", record))
        for module in (attention, scores):
            stack.enter_context(patch.object(module, "architecture", lambda device: arch))
            stack.enter_context(patch.object(module, "multiprocessors", lambda device: 132))
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
        yield f"append_kv/{name}", lambda x=x, pool=pool: launcher("append_kv")(x, x, integers, KVPool(pool, pool))
        inv_freq = meta(64, dtype=torch.float32)
        yield f"rotate_rows/{name}", lambda x=x, f=inv_freq: launcher("rotate_rows")(x, integers, f, False, 128)
        lse = meta(64, 8, dtype=torch.float32)
        yield f"merge_states/{name}", lambda x=x, s=lse: launcher("merge_states")(x, s, integers, integers)
    attention = launcher("tree_attention")
    for name, dim, width, options in attention_cases():
        q, pool = meta(WIDTHS[width], 32, dim, dtype=DTYPES[name]), meta(4096, 8, dim, dtype=DTYPES[name])
        per_head = meta(32, dtype=torch.float32) if options else None
        chosen = AttentionOptions(0.1, 30.0 if options else None, per_head, per_head)
        arguments = q, KVPool(pool, pool), PlanTensors(integers, integers, 64, 64), chosen
        label = f"tree_attention/{name}/{dim}/{width}" + "/softcap,sinks,alibi" * options
        yield label, lambda arguments=arguments: attention(*arguments)
    scores = launcher("score_tokens")
    for name, rows in (("bf16", 16), ("bf16", 64), ("fp32", 16)):
        for kernel in ("score_tokens", "reduce_scores", "search_again")[: 3 if rows == 64 else 1]:
            arguments = everything(DTYPES[name], rows)
            yield f"{kernel}/{name}/{rows}", lambda arguments=arguments: scores(*arguments)


def everything(dtype: torch.dtype, rows: int) -> tuple[Any, ...]:
    """All that `score_tokens` can be asked for at once."""
    vocab, size = 151_936, 4096
    integers, floats = meta(rows + 1, dtype=torch.int32), meta(rows + 1, dtype=torch.float32)
    keys, settings = meta(rows, dtype=torch.int64), meta(4, rows, dtype=torch.float64)
    head = LmHead(meta(vocab, size, dtype=dtype), meta(vocab, dtype=dtype), 1.0, 30.0)
    sample = keys, settings, True, integers, integers, integers, floats, meta(rows, vocab // 32, dtype=torch.int32)
    return meta(rows, size, dtype=dtype), head, VocabPass(64, True, *sample)


def attention_cases() -> Iterator[tuple[str, int, str, bool]]:
    """Element type, head dim, width of the step, options: whatever is compiled to other code."""
    for dim, width in itertools.product(DIMS, WIDTHS):
        if not (dim == 256 and width == "wide"):  # the tiles of narrow steps
            yield "bf16", dim, width, False
    for width in WIDTHS:
        yield "bf16", 128, width, True
        yield "fp16", 128, width, False
    for dim in DIMS:
        yield "fp32", dim, "narrow", False


def compile_triton(name: str, arch: int) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = recorded(dict(triton_calls())[name], arch)[name.split("/")[0]]
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        wanted = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (wanted and type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TRITON_TYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
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
        (row,) = read_machine_code(Path(file.name)).values()
    return replace(row, shared=compiled.metadata.shared)


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
    (rules,) = build.glob("ninja.*/build.ninja")
    nvcc = re.search(r"^  command = (\S*nvcc) ", rules.read_text(), re.MULTILINE)
    if nvcc is None:
        raise SystemExit("the CUDA kernels must be built to be looked at, but were not, as the notice above says")
    release = run([nvcc[1], "--version"]).split("release ")[1].split(",")[0]
    return f"nvcc {release}", read_machine_code(core)


CUDA_ARCHS = "80;90a;100a"


# ---------------------------------------------------------------------- machine code


def cuobjdump() -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = shutil.which("cuobjdump", path=f"{folder}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise SystemExit(f"cuobjdump must be on PATH or in {folder}, found none")
    return found


def read_machine_code(path: Path) -> dict[str, Row]:
    """What every kernel in a cubin or library takes, by name and architecture."""
    usage, code = (run([cuobjdump(), option, path]) for option in ("-res-usage", "-sass"))
    bodies = {}
    for arch, name, body in parts(code, r"\n\s*Function : (\S+)"):
        bodies[arch, name] = body
    rows = {}
    for arch, name, facts in parts(usage, r"\n\s*Function (\S+):"):
        number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", facts)}
        found = {kind: len(re.findall(pattern, bodies[arch, name])) for kind, pattern in INSTRUCTIONS.items()}
        rows[f"{readable(name)} {arch}".strip()] = Row(
            registers=number["REG"],
            spills=number.get("STACK", 0) + number.get("LOCAL", 0),
            loop_spills=loop_spills(bodies[arch, name]),
            shared=number.get("SHARED", 0),
            instructions={kind: count for kind, count in found.items() if count},
        )
    return dict(sorted(rows.items()))


def loop_spills(body: str) -> int:
    """Instructions on local memory between a backward branch and its target, if nothing nearer encloses a product."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", body)]
    products = [at for at, text in code if re.search(PRODUCTS, text)]
    jumps = [
        (int(to, 16), at) for at, text in code for to in re.findall(r"BRA(?:\.\w+)* (?:\S+, )?0x([0-9a-f]+)", text)
    ]
    loops = sorted(((end - begin, begin, end) for begin, end in jumps if begin < end))
    spills = [at for at, text in code if re.search(r"\b(LDL|STL)\b", text)]
    inner = {next(((begin, end) for _, begin, end in loops if begin <= product <= end), None) for product in products}
    return sum(any(loop is not None and loop[0] <= at <= loop[1] for loop in inner) for at in spills)


def parts(text: str, function: str) -> Iterator[tuple[str, str, str]]:
    """Architecture, function and what is said of it."""
    for arch, of_arch in by_heading(text, r"\narch = (\S+)") if "\narch = " in text else [("", text)]:
        for name, body in by_heading(of_arch, function):
            yield arch, name, body


def by_heading(text: str, heading: str) -> Iterator[tuple[str, str]]:
    """What follows each heading, up to the next."""
    _, *found = re.split(heading, text)
    yield from zip(found[::2], found[1::2], strict=True)


def readable(name: str) -> str:
    """tree_attention<bf16, 128, 1> of a mangled name; Triton's stay as they are."""
    shown = run(["c++filt", name]).strip() if name.startswith("_Z") else name
    shown = re.sub(r"\(anonymous namespace\)::|forktree::|gpu::|void |\(.*$", "", shown)
    return shown.replace("__nv_bfloat16", "bf16").replace("__half", "fp16")


def run(command: list[Any]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ---------------------------------------------------------------------- the table


def collect(triton_only: bool, only: str, jobs: int) -> dict[str, dict[str, Row]]:
    """Rows by compiler and name."""
    import triton

    wanted = [(name, arch) for name, _ in triton_calls() for arch in TRITON_ARCHS if only in name]
    version = f"triton {triton.__version__}"
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = pool.map(compile_triton, *zip(*wanted, strict=True)) if wanted else []
        names = [f"{name} sm_{arch}" for name, arch in wanted]
        found = {version: dict(track(zip(names, rows, strict=True), description=version, total=len(names)))}
    if not triton_only:
        version, cuda = cuda_rows()
        found[version] = cuda
    return found


def complaints(compiler: str, got: dict[str, Row], expected: dict[str, Row]) -> Iterator[str]:
    """What is worse than it was."""
    for name in sorted(got.keys() - expected.keys()):
        yield f"{compiler}: {name} is not in {RESULTS.name}"
    for name in sorted(got.keys() & expected.keys()):
        new, old = got[name], expected[name]
        for what in ("registers", "shared", "spills", "loop_spills"):
            if getattr(new, what) > TOLERANCE * getattr(old, what):
                yield f"{compiler}: {name} has {getattr(new, what)} {what}, expected {getattr(old, what)}"
        if lost := old.instructions.keys() - new.instructions.keys():
            yield f"{compiler}: {name} has lost its {', '.join(sorted(lost))}"


def show(found: dict[str, dict[str, Row]]) -> None:
    for compiler, rows in found.items():
        table = Table("kernel", "registers", "spills", "in loops", "shared", "instructions", title=compiler)
        for name, row in rows.items():
            counts = ", ".join(f"{count} {kind}" for kind, count in row.instructions.items())
            table.add_row(name, str(row.registers), str(row.spills), str(row.loop_spills), str(row.shared), counts)
        Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="hold the result against the file instead of writing it")
    parser.add_argument("--only", default="", help="Triton kernels whose name contains this")
    parser.add_argument("--triton", type=Path, help="folder of another Triton; nvcc is left out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    args = parser.parse_args()
    if args.triton is not None:  # before Triton is imported, here and by the processes that compile
        if not (args.triton / "triton").is_dir():
            parser.error(f"--triton must be a folder with Triton in it, got {args.triton}")
        os.environ["PYTHONPATH"] = f"{args.triton.resolve()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        sys.path.insert(0, str(args.triton.resolve()))

    found = collect(args.triton is not None, args.only, args.jobs)
    show(found)
    table = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not args.check:
        for compiler, rows in found.items():
            merged = (table.get(compiler, {}) if args.only else {}) | {name: asdict(row) for name, row in rows.items()}
            table[compiler] = dict(sorted(merged.items()))
        RESULTS.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
        return
    wrong = []
    for compiler, rows in found.items():
        if compiler not in table:
            print(f"{compiler} is not in {RESULTS.name}: nothing to compare with")
            continue
        wrong += complaints(compiler, rows, {name: Row(**row) for name, row in table[compiler].items()})
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
