"""The compiled core as a file: what it exports, where its instructions lie, what it says when it cannot be built."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import forktree
from forktree import _core

ROOT = Path(__file__).parents[2]
VARIANT = re.compile(r"\bforktree::(avx2|avx512|avx512bf16|amx)::")
NEWER = re.compile(r"(\{\w+\} )?(v[a-z]|kmov|tile|tdp)")  # AVX and all that came later


def output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_it_exports_nothing_but_its_entry() -> None:
    symbols = output("nm", "-D", "--defined-only", _core.__file__)
    assert [line.split()[-1] for line in symbols.splitlines()] == ["PyInit__core"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_only_variants_hold_instructions_of_newer_processors() -> None:
    # An inline function of the standard library, compiled with a variant's flags and picked by the linker for
    # everybody, would stop older processors with an illegal instruction.
    names, bad = set(), set()
    for function, instruction in instructions(output("objdump", "-dC", "--no-show-raw-insn", _core.__file__)):
        names.add(function)
        if NEWER.match(instruction) and not VARIANT.search(function):
            bad.add(f"{function}: {instruction}")
    assert "forktree::isas[abi:cxx11]()" in names  # else the file is stripped and this test sees nothing
    assert not bad


def instructions(listing: str) -> Iterator[tuple[str, str]]:
    """(function, instruction) of objdump's listing."""
    function = ""
    for line in listing.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            function = header[1]
        elif code := re.match(r" +[0-9a-f]+:\t(.+)", line):
            yield function, code[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("first", ["torch", "forktree"])
def test_torch_and_the_core_share_one_openmp_runtime(first: str) -> None:
    program = f"import {first}, forktree._core, torch; print(open('/proc/self/maps').read())"
    maps = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment()
    )
    assert len({line.split()[-1] for line in maps.stdout.splitlines() if "libgomp" in line}) == 1


def environment(**more: str) -> dict[str, str]:
    """Of a process that is to import the same forktree."""
    return os.environ | {"PYTHONPATH": str(Path(forktree.__file__).parents[1])} | more


OLD = (
    '#!/bin/sh\n[ "$1" = --version ] && echo "oldcc 4.2" && exit\necho "oldcc: error: no such option: $1" >&2\nexit 1\n'
)
# Takes every probe, but not the sources.
BROKEN = '#!/bin/sh\ncase "$*" in *csrc*) echo "brokencc: no memory" >&2; exit 1;; esac\nexec c++ "$@"\n'


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        (None, "/cxx does not run: No such file or directory; `apt-get install g++`"),
        (OLD, "oldcc 4.2 does not build a program: oldcc: error: no such option: -std=c++17; `apt-get install g++`"),
        (BROKEN, "compiling csrc/ with"),
    ],
    ids=["absent", "old", "broken"],
)
def test_what_is_missing_is_said_in_one_line(tmp_path: Path, compiler: str | None, says: str) -> None:
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    if compiler is BROKEN and shutil.which("c++") is None:
        pytest.skip("c++ is not installed")
    if compiler is not None:
        (tmp_path / "cxx").write_text(compiler)
        (tmp_path / "cxx").chmod(0o755)
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build"), "build_ext"]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"CXX": str(tmp_path / "cxx")}, capture_output=True, text=True
    )
    *before, last = result.stderr.splitlines()
    assert result.returncode == 1
    assert last.startswith("error: ") and "forktree needs a C++17 compiler (g++ 9" in last and says in last
    assert not any("Traceback" in line or "error:" in line for line in before)


# Real probes; objects that are empty.
HOLLOW = """#!/bin/sh
for word; do [ "$before" = -o ] && out=$word; before=$word; done
case "$*" in *csrc*|*.o\\ *) : > "$out"; : > "$out.d";; *) exec c++ "$@";; esac
"""
NVCC = """#!/bin/sh
[ "$1" = --version ] && echo "Cuda compilation tools, release ${RELEASE:-13.0}, V" && exit
for word; do [ "$before" = -o ] && out=$word; before=$word; done
case "$*" in *$REFUSES*) echo "nvcc fatal: not that" >&2; exit 1;; esac
: > "$out"; : > "$out.d"
"""
SMI = '#!/bin/sh\n[ -n "$CARDS" ] && printf "$CARDS"\n'


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("c++"), reason="needs Linux and c++")
@pytest.mark.parametrize(
    ("settings", "built", "says"),
    [
        ({"CARDS": "8.6\\n9.0\\n9.0\\n"}, "sm_86 sm_90a", ""),
        ({"CARDS": "9.0\\n", "FORKTREE_CUDA_ARCHS": "80;100a"}, "sm_80 sm_100a", ""),
        ({"CARDS": "9.0\\n", "FORKTREE_CUDA": "0"}, "", ""),
        ({"CARDS": "9.0\\n", "RELEASE": "11.8"}, "", "nvcc must be 12.0 or newer, got 'release 11.8'"),
        ({"CARDS": "9.0\\n", "REFUSES": "probe"}, "", "nvcc release 13.0 does not build for 90a: nvcc fatal: not that"),
        ({"CARDS": "9.0\\n", "REFUSES": "csrc"}, "", "nvcc did not compile csrc/"),
        ({"FORKTREE_CUDA": "emulate"}, "emulated", ""),
    ],
    ids=["cards", "named", "off", "old nvcc", "nvcc refuses", "nvcc fails", "emulated"],
)
def test_cuda_is_built_for_what_is_there(tmp_path: Path, settings: dict[str, str], built: str, says: str) -> None:
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    for name, script in {"cxx": HOLLOW, "nvcc": NVCC, "nvidia-smi": SMI}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    ours = {"CXX": str(tmp_path / "cxx"), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "REFUSES": "nothing"}
    named = ("CUDA_HOME", "CUDA_PATH", "FORKTREE_CUDA", "FORKTREE_CUDA_ARCHS", "CXXFLAGS")
    clean = {name: value for name, value in os.environ.items() if name not in named}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build"), "build_ext"]
    result = subprocess.run(command, cwd=ROOT, env=clean | ours | settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (rules,) = (tmp_path / "build").glob("ninja.*/build.ninja")
    text = re.sub(r"\s+(\$\n\s*)?", " ", rules.read_text())
    assert f'FORKTREE_CUDA_BUILT="{built}"' in text
    assert ("append_kv.cu.o" in text) == bool(built)
    assert re.findall(r",code=(\S+)", text) == built.replace("emulated", "").split()
    notices = [line for line in result.stderr.splitlines() if "without CUDA" in line]
    assert len(notices) == bool(says) and all(line.endswith(says) for line in notices)
    reason = says.partition("'")[0] or "FORKTREE_CUDA=0" * (not built)
    assert reason in text  # `forktree env` tells it


WITHOUT_DEVICE = """
#include <cstdio>
#include <exception>
#include "cpu/append_kv.hpp"
int main() {
    forktree::AppendKvParams nothing{};
    nothing.pool.num_kv_heads = 1;
    nothing.pool.k_dim = nothing.pool.v_dim = 8;
    nothing.pool.dtype = forktree::Dtype::bf16;
    nothing.slots.size = 1;
    try {
        forktree::cuda::append_kv(nothing, nullptr);
    } catch (const std::exception& error) {
        std::puts(error.what());
    }
}
"""


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_call_without_a_device_says_so(tmp_path: Path) -> None:
    (tmp_path / "main.cu").write_text(WITHOUT_DEVICE)
    sources = [tmp_path / "main.cu", ROOT / "csrc/cuda/append_kv.cu"]
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-cudart", "static", f"-I{ROOT / 'csrc'}", *sources]
    subprocess.run([*command, "-o", tmp_path / "main"], check=True)
    result = subprocess.run([tmp_path / "main"], capture_output=True, text=True)
    assert result.stdout.startswith("no CUDA device: cudaGetDeviceCount says ")


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
def test_every_module_is_installed(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    sources = {ROOT / "python/forktree": "forktree", ROOT / "triton_kernels": "forktree/triton_kernels"}
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for folder, package in sources.items()
        for path in folder.rglob("*.py")
    }
    installed = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in installed if name.endswith(".py")} == expected
    assert {"forktree/py.typed", "forktree/_core.pyi", "forktree/demo/model/model.safetensors"} <= installed
