"""`csrc/parallel.hpp`, with OpenMP and without: tasks run once each, on no more threads than asked for."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRIVER = r"""
#include "common/parallel.hpp"
#include <cstdio>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

int main() {
    for (int threads : {-1, 0, 1, 2, 5})
        for (int64_t tasks : {0, 1, 3, 1000}) {
            std::vector<int> runs(size_t(tasks), 0);
            std::set<std::thread::id> who;
            std::mutex mutex;
            forktree::parallel(tasks, threads, [&](int64_t task) {
                ++runs[size_t(task)];
                const std::lock_guard<std::mutex> lock(mutex);
                who.insert(std::this_thread::get_id());
            });
            for (int count : runs)
                if (count != 1) return printf("%d threads: one of %d ran %d times\n", threads, int(tasks), count), 1;
            if (int(who.size()) > (threads > 1 ? threads : 1)) return printf("%zu, not %d\n", who.size(), threads), 1;
        }
}
"""


@pytest.mark.parametrize("flags", ["-fopenmp", "-pthread"])
def test_every_task_runs_once(tmp_path: Path, flags: str) -> None:
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None or not (ROOT / "csrc").exists():
        pytest.skip("needs a compiler and the source tree")
    source, program = tmp_path / "driver.cpp", tmp_path / "driver"
    source.write_text(DRIVER)
    command = [compiler, "-std=c++17", "-O1", flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if flags == "-fopenmp" and built.returncode:
        pytest.skip("this compiler has no OpenMP")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
