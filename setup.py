"""Builds `forktree._core` from `csrc/` with ninja; everything else is declared in pyproject.toml.

A C++17 compiler is all it takes. The CPU kernels are compiled once for every instruction set the compiler knows; the
right one is chosen at run time. CXX, CXXFLAGS, LDFLAGS and, on a Mac, ARCHFLAGS mean what they always do.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
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
    "isa",
    "plan",
    "plan_count",
    "plan_view",
    "stretches",
    "append_kv",
    "rotate_rows",
    "merge_states",
    "tree_attention",
]
KERNELS = ["tree_attention_kernel"]  # compiled for each instruction set

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
        with open(build / "build.ninja", "w") as file:
            write_rules(ninja_syntax.Writer(file), compiler, target)
        if subprocess.run([Path(BIN_DIR, "ninja"), "-C", build]).returncode:
            raise CompileError(f"compiling csrc/ with {compiler.version} failed, its errors are above; {NEEDS}")


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


def write_rules(out: ninja_syntax.Writer, compiler: Compiler, target: Path) -> None:
    built = [f"-DFORKTREE_BUILT_{isa.upper()}" for isa in compiler.isas]
    info = {"COMPILER": compiler.version, "FLAGS": shlex.join(compiler.flags), "ISAS": " ".join(compiler.isas)}
    bindings = [*compiler.python, f"-isystem{pybind11.get_include()}"]
    bindings += [f"-DFORKTREE_{name}={json.dumps(value)}" for name, value in info.items()]
    # The portable objects come first: where the linker may choose between copies of an inline function, it takes one
    # that runs everywhere.
    special = {"bindings": bindings, "isa": built, "tree_attention": built}
    objects = {f"{name}.o": (name, special.get(name, [])) for name in COMMON}
    for isa, flags in compiler.isas.items():
        objects |= {f"{name}.{isa}.o": (name, [f"-DFORKTREE_ISA={isa}", *flags]) for name in KERNELS}
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup", "-Wl,-exported_symbol,_PyInit__core"]
    else:
        shared = ["-shared", "-Wl,--version-script=exports.map"]

    command = shell([*compiler.command, *compiler.flags])
    # -MD and not -MMD: a new compiler or pybind11 comes with new headers.
    out.rule("compile", f"{command} $flags -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
    out.rule("link", f"{command} {shell(shared)} $in -o $out {shell(compiler.link)}")
    for name, (source, flags) in objects.items():
        out.build(name, "compile", str(CSRC / f"{source}.cpp"), variables={"flags": shell(flags)})
    out.build(str(target), "link", list(objects))


def shell(words: list[str]) -> str:
    return ninja_syntax.escape(shlex.join(words))


sources = [f"csrc/{name}.cpp" for name in COMMON + KERNELS]
setup(ext_modules=[Extension("forktree._core", sources)], cmdclass={"build_ext": NinjaBuild})
