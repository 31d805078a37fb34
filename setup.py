"""Builds `forktree._core` from `csrc/` with ninja; everything else is declared in pyproject.toml.

A C++17 compiler is all it takes. The CPU kernels are compiled once for every instruction set the compiler knows; the
right one is chosen at run time.
"""

import os
import platform
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

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

AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
ISAS = {"portable": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512bf16": f"{AVX512} -mavx512bf16",
        "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
    }


class NinjaBuild(build_ext):
    """One extension whose sources have flags of their own, compiled in parallel."""

    def build_extension(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
        command = [*shlex.split(compiler)[:1], "-std=c++17"]
        try:
            version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            raise CompileError(f"forktree needs a C++17 compiler (g++ or clang++), found none as {command[0]!r}") from None
        if not self.accepts(command, ""):
            raise CompileError(f"forktree needs a C++17 compiler, got {version.splitlines()[0]}")
        openmp = "-fopenmp" if self.accepts([*command, "-fopenmp"], "") else ""
        isas = {isa: flags for isa, flags in ISAS.items() if self.accepts(command, flags)}

        include = {sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()}
        flags = f"-O3 -g0 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi {openmp}"
        built = " ".join(f"-DFORKTREE_BUILT_{isa.upper()}" for isa in isas)
        link = "-shared" if platform.system() != "Darwin" else "-bundle -undefined dynamic_lookup"
        # The portable objects come first: where the linker may choose between copies of an inline function, it takes
        # one that runs everywhere.
        objects = {f"{name}.o": (name, built) for name in COMMON}
        for isa, isa_flags in isas.items():
            objects |= {f"{name}.{isa}.o": (name, f"-DFORKTREE_ISA={isa} {isa_flags}") for name in KERNELS}

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            f"cxx = {shlex.join(command)} {flags} {' '.join(f'-isystem {i}' for i in sorted(include))}",
            "rule compile",
            "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {shlex.join(command)} {link} {openmp} $in -o $out",
            *(
                f"build {out}: compile {CSRC / name}.cpp\n  flags = {source_flags}"
                for out, (name, source_flags) in objects.items()
            ),
            f"build {target}: link {' '.join(objects)}",
        ]
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        try:
            subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", build], check=True)
        except subprocess.CalledProcessError:
            raise CompileError(f"compiling csrc/ failed, see above; compiler: {version.splitlines()[0]}") from None

    def accepts(self, command: list[str], flags: str) -> bool:
        """Whether the compiler takes these flags, a C++17 program, and links it."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <string_view>\nint main() { return int(std::string_view().size()); }\n")
            probe = [*command, *flags.split(), str(source), "-o", str(source.with_suffix(""))]
            return subprocess.run(probe, capture_output=True).returncode == 0


sources = [f"csrc/{name}.cpp" for name in COMMON + KERNELS]
setup(ext_modules=[Extension("forktree._core", sources)], cmdclass={"build_ext": NinjaBuild})
