"""The machine that runs CUDA code on the CPU (`csrc/gpu/gpu_host.cpp`): its intrinsics, and what it must not let pass.

The cases are in `emulation.cu`, a program of its own, under AddressSanitizer.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Whichever of the two threads comes first.
RACE = r"load_matrix of what thread \d+ has copied, with no barrier since|another warp has read since the last barrier"

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs Linux and g++"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulation") / "emulation"
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [ROOT / "csrc/gpu/gpu_host.cpp", ROOT / "tests/support/emulation.cu"]
    command = [
        "g++",
        *flags,
        "-Wall",
        "-Wextra",
        "-DFORKTREE_EMULATE_CUDA",
        f"-I{ROOT / 'csrc'}",
        "-x",
        "c++",
        *sources,
    ]
    subprocess.run([*command, "-o", path], check=True)
    return path


def run(program, case):
    return subprocess.run([program, case], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})


@pytest.mark.parametrize(
    "case",
    [
        "copies",
        "matrix_loads",
        "products_bf16",
        "products_fp16",
        "exchanges",
        "arrivals",
        "thread_order",
        "arithmetic",
        "fresh_memory_is_nan",
        "after_an_error",
        "no_blocks",
    ],
)
def test_intrinsics_equal_plain_loops(program, case):
    result = run(program, case)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("no_wait", "load_matrix of shared memory that a copy is on its way to"),
        ("no_barrier", RACE),
        ("warp_barrier_only", RACE),
        ("early_refill", "copy16 to shared memory that another warp has read since the last barrier"),
        ("refill_in_flight", "copy16 of shared memory that a copy is on its way to"),
        ("left_on_its_way", "returned with copies on their way"),
        ("not_committed", "returned with copies on their way"),
        ("copy_to_odd", "copy16 of an address that is not a multiple of 16"),
        ("copy_from_odd", "copy16 of an address that is not a multiple of 16"),
        ("copy_behind", "copy16 to byte 512 of 520 of shared memory"),
        ("load_odd", "load16 of an address that is not a multiple of 16"),
        ("store_odd", "store16 of an address that is not a multiple of 16"),
        ("matrix_odd", "load_matrix of an address that is not a multiple of 16"),
        ("matrix_of_global", "load_matrix of an address outside of shared memory"),
        ("two_collectives", "while other lanes of the warp wait for it in"),
        ("two_lines", "shuffle, while other lanes of the warp wait for it in shuffle at line"),
        ("lanes_return", "deadlock, threads 0-31: returned; 32-39: sync_warp at line"),
        ("barrier_in_a_branch", "deadlock, threads 0-31: returned; 32-63: sync_block at line"),
        ("odd_threads", "threads must be a multiple of 32 up to 1024, got 40"),
        ("too_much_shared", "shared memory must be at most 232448 bytes, got 233472"),
    ],
)
def test_misuse_ends_the_launch_with_an_error(program, case, says):
    result = run(program, case)
    assert result.returncode == 1 and "emulated CUDA" in result.stderr and re.search(says, result.stderr)


@pytest.mark.parametrize(
    ("case", "says"), [("no_wait_plain", "use-after-poison"), ("read_behind", "heap-buffer-overflow")]
)
def test_the_sanitizer_sees_shared_memory(program, case, says):
    result = run(program, case)
    assert result.returncode and f"AddressSanitizer: {says}" in result.stderr
