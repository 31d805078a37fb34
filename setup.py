"""Builds `forktree._core` from `csrc/` with ninja; everything else is declared in pyproject.toml.

A C++17 compiler is all it takes. The CPU kernels are compiled once for every instruction set the compiler knows; the
right one is chosen at run time. CXX, CXXFLAGS, LDFLAGS and, on a Mac, ARCHFLAGS mean what they always do.

Where nvcc is, `.cu` files are compiled too: for the GPUs present, or for FORKTREE_CUDA_ARCHS ("80;90a;100a").
FORKTREE_CUDA=0 leaves them out; FORKTREE_CUDA=emulate compiles them for the CPU (csrc/gpu/gpu_host.hpp), for tests.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

try:
    import pybind11
    from ninja import BIN_DIR, ninja_syntax
except ImportError as error:  # pip sees to them, unless it is told --no-build-isolation
    sys.exit(f"building forktree needs the Python package {error.name}: pip install ninja 'pybind11>=2.13'")

CSRC = Path(__file__).parent.resolve() / "csrc"
COMMON = [
    "bindings",
    "common/isa",
    "plan/bind_plan",
    "plan/cut_search",
    "plan/planner",
    "plan/serialize",
    "plan/shared_segments",
    "plan/stats",
    "plan/validate",
    "plan/work_items",
    "cpu/append_kv",
    "cpu/rotate_rows",
    "cpu/merge_states",
    "cpu/score_tokens/api",
    "cpu/score_tokens/sample",
    "cpu/tree_attention/api",
]
KERNELS = ["cpu/score_tokens/kernel", "cpu/tree_attention/kernel"]  # compiled for each instruction set
CUDA = {name: (f"cuda/{name}", []) for name in ("append_kv", "rotate_rows", "merge_states", "tree_attention/api")}
CUDA |= {  # object: source and flags
    f"tree_attention/{element.lower()}_{dim}": (
        "cuda/tree_attention/instance",
        [f"-DFORKTREE_ELEMENT={element}", f"-DFORKTREE_HEAD_DIM={dim}"],
    )
    for element in ("Bf16", "Fp16")
    for dim in (64, 96, 128, 256)
}

FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra", "-Wno-psabi"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # g++ 12 finds both in its own AVX-512 intrinsics
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Flags, and a statement that only a compiler and an assembler for such machines take.
ISAS = {
    "portable": ([], ""),
    "avx2": (AVX2, "auto x = _mm256_fmadd_ps(_mm256_cvtph_ps(__m128i()), __m256(), __m256()); (void)x;"),
    "avx512": (AVX512, "auto x = _mm512_and_ps(__m512(), __m512()); (void)x;"),
    "avx512bf16": (
        [*AVX512, "-mavx512bf16"],
        "auto x = _mm512_dpbf16_ps(__m512(), __m512bh(), __m512bh()); (void)x;",
    ),
    "amx": ([*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DFORKTREE_TILES"], "_tile_dpbf16ps(0, 1, 2);"),
}

NEEDS = "forktree needs a C++17 compiler (g++ 9 or clang++ 10, or newer)"
INSTALL = "`apt-get install g++`, `dnf install gcc-c++` or `xcode-select --install` gets one"


class NinjaBuild(build_ext):
    """One extension whose sources have flags of their own, compiled in parallel."""

    def build_extension(self, ext: Extension) -> None:
        if sys.platform == "win32":
            raise CompileError("forktree builds on Linux and macOS; on Windows use it under WSL")
        compiler = Compiler()
        # Not build_temp: an editable install has a new one each time and would compile everything again.
        base = self.get_finalized_command("build").build_base
        build = Path(base, f"ninja.{sysconfig.get_platform()}-{sys.implementation.cache_tag}").resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "exports.map").write_text("{ global: PyInit__core; local: *; };\n")
        cuda = find_cuda(compiler)

        def ninja() -> bool:
            with open(build / "build.ninja", "w") as file:
                write_rules(ninja_syntax.Writer(file), compiler, cuda, target)
            return subprocess.run([Path(BIN_DIR, "ninja"), "-C", build]).returncode == 0

        done = ninja()
        if not done and cuda.built and cuda.built != "emulated":
            cuda = Cuda(why="nvcc did not compile csrc/", notice=True)
            done = ninja()
        if not done:
            raise CompileError(f"compiling csrc/ with {compiler.version} failed, its errors are above; {NEEDS}")
        if cuda.notice:
            print(f"forktree is built without CUDA: {cuda.why}", file=sys.stderr)


class Compiler:
    """The compiler at hand, and the flags it takes; raises CompileError if it cannot build an extension at all."""

    def __init__(self) -> None:
        self.command = find_compiler()
        own = [*mac_architecture(), *shlex.split(os.environ.get("CXXFLAGS", ""))]
        self.flags = [*FLAGS, *own]
        self.link = shlex.split(os.environ.get("LDFLAGS", ""))
        try:
            shown = subprocess.run([*self.command, "--version"], capture_output=True, text=True).stdout
            self.version = shown.partition("\n")[0] or shlex.join(self.command)
            why = self.complaint("#include <string_view>\nint main() { return int(std::string_view().size()); }")
        except OSError as error:
            raise CompileError(
                f"{NEEDS}; {shlex.join(self.command)} does not run: {error.strerror}; {INSTALL}"
            ) from None
        if why:
            raise CompileError(f"{NEEDS}; {self.version} does not build a program: {why}; {INSTALL}")

        # Often one folder, so each is named once.
        headers = dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude"))
        self.python = [f"-isystem{folder}" for folder in headers]
        if self.complaint("#include <Python.h>", *self.python, "-c"):
            raise CompileError(
                f"forktree needs Python.h, there is none in {sysconfig.get_path('include')}; "
                "`apt-get install python3-dev` or `dnf install python3-devel` gets it"
            )
        with_openmp = [*FLAGS, "-fopenmp", *own]
        if not self.complaint("#ifndef _OPENMP\n#error\n#endif\nint main() {}", flags=with_openmp):
            self.flags = with_openmp
        isas = dict(ISAS)
        if "-DFORKTREE_EMULATE_AMX" in own:  # tiles in plain C++, for `make sanitize`
            isas["amx"] = ([*isas["avx512bf16"][0], "-DFORKTREE_TILES"], isas["avx512bf16"][1])
        self.isas = {
            isa: flags
            for isa, (flags, statement) in isas.items()
            if not self.complaint(f"#include <immintrin.h>\nvoid f() {{ {statement} }}" if flags else "", "-c", *flags)
        }

    def complaint(self, program: str, *more: str, flags: list[str] | None = None) -> str:
        """What the compiler has against a program, in one line; "" if it builds."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(program)
            command = [*self.command, *(flags or self.flags), *more, source, "-o", Path(folder, "probe"), *self.link]
            result = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        return "" if result.returncode == 0 else (lines or [f"exit status {result.returncode}"])[0]


@dataclass
class Cuda:
    """How `.cu` files are compiled and linked; why they are not."""

    built: str = ""  # architectures, or "emulated"
    why: str = ""
    notice: bool = False  # of what was asked for, or could be expected
    command: list[str] = field(default_factory=list)
    link: list[str] = field(default_factory=list)


def find_cuda(compiler: Compiler) -> Cuda:
    setting = os.environ.get("FORKTREE_CUDA", "")
    if setting == "emulate":
        command = [*compiler.command, *compiler.flags, "-Wno-unknown-pragmas", "-DFORKTREE_EMULATE_CUDA", "-x", "c++"]
        return Cuda("emulated", command=command)
    if setting == "0":
        return Cuda(why="the core was built with FORKTREE_CUDA=0")
    if setting:
        raise CompileError(f"FORKTREE_CUDA must be 0 or emulate, or not be set, got {setting!r}")
    asked = os.environ.get("FORKTREE_CUDA_ARCHS", "")
    archs = [arch for arch in re.split("[; ,]+", asked) if arch] or present_archs()
    if not archs:
        return Cuda(why="there was no GPU where the core was built, and FORKTREE_CUDA_ARCHS named none")
    nvcc = find_nvcc()
    if not nvcc:
        return Cuda(why="there is no nvcc in PATH or CUDA_HOME", notice=True)
    return nvcc_for(archs, nvcc, compiler)


def present_archs() -> list[str]:
    """Of the GPUs here. From sm_90 on, kernels for the very card are named with an `a`."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = sorted({int(major) * 10 + int(minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", shown, re.M)})
    return [f"{arch}a" if arch >= 90 else str(arch) for arch in found]


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [str(Path(home, "bin")) for home in homes if home]
    return shutil.which("nvcc", path=os.pathsep.join([*places[:-1], os.environ.get("PATH", ""), places[-1]]))


def nvcc_for(archs: list[str], nvcc: str, compiler: Compiler) -> Cuda:
    """nvcc for these architectures, if it can build for them."""

    def refused(why: str) -> Cuda:
        return Cuda(why=why, notice=True)

    version = run_quietly([nvcc, "--version"])
    release = re.search(r"release (\d+)\.(\d+)", version.stdout)
    if not release or int(release[1]) < 12:
        return refused(f"{nvcc} must be 12.0 or newer, got {release[0] if release else version.stdout.strip()!r}")
    if old := [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80]:
        return refused(f"the kernels need architectures of 80 or newer, got {', '.join(old)}")
    command = [nvcc, "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    if len(compiler.command) == 1:
        command.append(f"-ccbin={compiler.command[0]}")
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    with tempfile.TemporaryDirectory() as folder:
        source, probe = Path(folder, "probe.cu"), Path(folder, "probe.o")
        source.write_text("__global__ void f() {}\nint main() { int n; return cudaGetDeviceCount(&n); }\n")
        dry = run_quietly([*command, "--dryrun", "-c", source, "-o", probe])
        folders = re.search("LIBRARIES=(.*)", dry.stderr)
        # Linked in, whole: torch may bring another version of the shared one.
        link = [*shlex.split(folders[1] if folders else ""), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        for step in (
            [*command, "-c", source, "-o", probe],
            [*compiler.command, probe, "-o", probe.with_suffix(""), *link],
        ):
            result = run_quietly(step)
            if result.returncode:
                lines = (result.stderr + result.stdout).strip().splitlines() or [f"exit status {result.returncode}"]
                why = next((line for line in lines if "error" in line or "fatal" in line), lines[0])
                return refused(f"{nvcc} {release[0]} does not build for {', '.join(archs)}: {why}")
    return Cuda(" ".join(f"sm_{arch}" for arch in archs), command=command, link=link)


def run_quietly(command: list) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def find_compiler() -> list[str]:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    # The first word of what built Python: the rest are flags for that machine.
    for name in ((sysconfig.get_config_var("CXX") or "c++").split()[0], "c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise CompileError(f"{NEEDS} and found none; {INSTALL}")


def mac_architecture() -> list[str]:
    """Python from python.org has two architectures; what is built is for this machine unless ARCHFLAGS says more."""
    if sys.platform != "darwin":
        return []
    return shlex.split(os.environ.get("ARCHFLAGS") or f"-arch {platform.machine()}")


def write_rules(out: ninja_syntax.Writer, compiler: Compiler, cuda: Cuda, target: Path) -> None:
    built = [f"-DFORKTREE_BUILT_{isa.upper()}" for isa in compiler.isas]
    info = {"COMPILER": compiler.version, "FLAGS": shlex.join(compiler.flags), "ISAS": " ".join(compiler.isas)}
    info |= {"CUDA_BUILT": cuda.built, "WHY_NO_CUDA": cuda.why}
    bindings = [*compiler.python, f"-isystem{pybind11.get_include()}"]
    bindings += [f"-DFORKTREE_{name}={json.dumps(value)}" for name, value in info.items()]
    bindings += ["-DFORKTREE_CUDA"] * bool(cuda.built)
    # The portable objects come first: where the linker may choose between copies of an inline function, it takes one
    # that runs everywhere.
    special = {"bindings": bindings, "plan/bind_plan": bindings}
    special |= dict.fromkeys(("common/isa", "cpu/score_tokens/api", "cpu/tree_attention/api"), built)
    objects = {f"{name}.o": (name, special.get(name, [])) for name in COMMON}
    for isa, flags in compiler.isas.items():
        objects |= {f"{name}.{isa}.o": (name, [f"-DFORKTREE_ISA={isa}", *flags]) for name in KERNELS}
    if cuda.built == "emulated":
        objects["gpu/gpu_host.o"] = ("gpu/gpu_host", ["-DFORKTREE_EMULATE_CUDA"])
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup", "-Wl,-exported_symbol,_PyInit__core"]
    else:
        shared = ["-shared", "-Wl,--version-script=exports.map"]

    command = shell([*compiler.command, *compiler.flags, f"-I{CSRC}"])
    # -MD and not -MMD: a new compiler or pybind11 comes with new headers.
    out.rule("compile", f"{command} $flags -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
    out.rule("link", f"{command} {shell(shared)} $in -o $out {shell([*cuda.link, *compiler.link])}")
    for name, (source, flags) in objects.items():
        out.build(name, "compile", str(CSRC / f"{source}.cpp"), variables={"flags": shell(flags)})
    linked = list(objects)
    if cuda.built:
        with_headers = shell([*cuda.command, f"-I{CSRC}"])
        out.rule(
            "compile_cuda",
            f"{with_headers} $flags -MD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
        )
        for name, (source, flags) in CUDA.items():
            linked += out.build(
                f"cuda/{name}.cu.o", "compile_cuda", str(CSRC / f"{source}.cu"), variables={"flags": shell(flags)}
            )
    out.build(str(target), "link", linked)


def shell(words: list[str]) -> str:
    return ninja_syntax.escape(shlex.join(words))


# `triton_kernels/` is at the top of the tree but is only ever imported as forktree.triton_kernels: Triton has a package
# of the bare name.
TRITON = "triton_kernels"
KERNELS_PACKAGE = f"forktree.{TRITON}"

sources = [f"csrc/{name}.cpp" for name in COMMON + KERNELS]
setup(
    packages=[*find_packages("python"), KERNELS_PACKAGE, *(f"{KERNELS_PACKAGE}.{p}" for p in find_packages(TRITON))],
    package_dir={"": "python", KERNELS_PACKAGE: TRITON},
    ext_modules=[Extension("forktree._core", sources)],
    cmdclass={"build_ext": NinjaBuild},
)
